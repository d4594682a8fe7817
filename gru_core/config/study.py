"""What surrounds a run: evaluation, preparation, search, tracking, output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gru_core.config.checks import STRICT, check, finite


@dataclass(frozen=True)
class LmEvalConfig:
    """How the metrics ``lm_eval:TASK`` are measured: tasks of EleutherAI's lm-eval (the extra ``eval``)."""

    __pydantic_config__ = STRICT
    limit: int | None = None
    """Only the first n documents of each task; null: all."""
    num_fewshot: int | None = None
    """Answered examples before each question; null: as the task defines it (0 where it does not). A task that is
    defined with 0, such as WMDP's, keeps 0."""
    include_path: str | None = None
    """Folder of further task files (``*.yaml``), which win over lm-eval's; without Python code (``!function``)."""
    data: dict[str, str] = field(default_factory=dict)
    """Task to a local file in place of its data set from the hub: JSON rows ``{question, choices, answer}``, the
    answer a position in choices from 0, as WMDP and MMLU have them."""

    def __post_init__(self) -> None:
        check(self.limit is None or self.limit >= 1, "evaluate.lm_eval.limit", self.limit, "null or from 1")
        shots = self.num_fewshot
        check(shots is None or shots >= 0, "evaluate.lm_eval.num_fewshot", shots, "null or a whole number from 0")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured at every evaluation, and the two numbers that span the trade-off."""

    __pydantic_config__ = STRICT
    metrics: tuple[str, ...] = ("extraction_strength", "model_utility")
    """Names from ``gru_core.metrics.METRICS`` or ``MODEL_METRICS``, or ``lm_eval:TASK``."""
    final: tuple[str, ...] = ()
    """Further metrics, measured only where a run ends (and of the models before it): for what takes long."""
    unlearning: str = "extraction_strength"
    """Forget-set metric, lower when forgotten, behind the unlearning score."""
    retention: str = "model_utility"
    """Utility metric, higher is better, behind the retention score."""
    rows: int | None = None
    """Score only the first n rows of each set; null: all."""
    batch_rows: int = 64
    """Sequences per forward pass where all are as long as the longest; of shorter ones there are more."""
    max_new_tokens: int = 200
    """Longest greedy generation (ROUGE)."""
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)

    def __post_init__(self) -> None:
        check(len(self.metrics) > 0, "evaluate.metrics", self.metrics, "at least one metric")
        for name in ("batch_rows", "max_new_tokens"):
            value = getattr(self, name)
            check(value >= 1, f"evaluate.{name}", value, "a whole number from 1")
        check(self.rows is None or self.rows >= 1, "evaluate.rows", self.rows, "null or a whole number from 1")


@dataclass(frozen=True)
class PrepareConfig:
    """How ``gru prepare`` makes the target model and the retain model."""

    __pydantic_config__ = STRICT
    base: str | None = None
    """Folder or hub id of the model to fine-tune; null: a small Llama from scratch with its own tokenizer."""
    tokenizer: Literal["word", "bpe"] = "word"
    """Tokenizer of the small Llama, trained on the benchmark's texts."""
    vocab_size: int = 4096
    hidden: int = 96
    layers: int = 2
    heads: int = 4
    intermediate: int = 256
    steps: int = 900
    batch_size: int = 32
    lr: float = 1e-2
    warmup: int = 20
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden", "layers", "heads", "intermediate", "steps", "batch_size"):
            value = getattr(self, name)
            check(value >= 1, f"prepare.{name}", value, "a whole number from 1")
        check(self.tokenizer in ("word", "bpe"), "prepare.tokenizer", self.tokenizer, "word, bpe")
        check(finite(self.lr) and self.lr > 0, "prepare.lr", self.lr, "a number above 0")
        check(0 <= self.warmup <= self.steps, "prepare.warmup", self.warmup, f"0 to steps ({self.steps})")
        decay = self.weight_decay
        check(finite(decay) and decay >= 0, "prepare.weight_decay", decay, "a number from 0")
        check(self.hidden % self.heads == 0, "prepare.heads", self.heads, f"a divisor of hidden ({self.hidden})")


@dataclass(frozen=True)
class FamilyConfig:
    """One family of a search: fixed settings over the base config, and what it searches."""

    __pydantic_config__ = STRICT
    fixed: dict[str, Any] = field(default_factory=dict)
    """Dotted config keys that this family sets."""
    space: dict[str, Any] = field(default_factory=dict)
    """Dotted config keys that this family searches, besides the shared ``search.space``."""


@dataclass(frozen=True)
class SearchConfig:
    """What ``gru search`` varies. A dimension is ``{low, high, log?, step?}`` or a list of choices."""

    __pydantic_config__ = STRICT
    trials: int = 24
    """Trials over all families, the same number for each."""
    sampler: Literal["optuna", "random", "grid"] = "optuna"
    metrics: tuple[str, ...] = ("unlearning", "retention")
    """Scores that are maximised together."""
    space: dict[str, Any] = field(default_factory=dict)
    """Dotted config keys that every family searches."""
    families: dict[str, FamilyConfig] = field(default_factory=dict)
    """Families with a sampler of their own each; empty: plain, sum and rectified as DESIGN describes."""
    concurrent: int | None = None
    """Trials at a time; null: as many as the resources hold."""

    def __post_init__(self) -> None:
        check(self.trials >= 1, "search.trials", self.trials, "a whole number from 1")
        samplers = ("optuna", "random", "grid")
        check(self.sampler in samplers, "search.sampler", self.sampler, ", ".join(samplers))
        check(
            self.concurrent is None or self.concurrent >= 1,
            "search.concurrent",
            self.concurrent,
            "null or from 1",
        )
        known = {"unlearning", "retention"}
        ok = 0 < len(set(self.metrics)) == len(self.metrics) and set(self.metrics) <= known
        check(ok, "search.metrics", list(self.metrics), "unlearning, retention, or both")


@dataclass(frozen=True)
class TrackConfig:
    """Where MLflow records."""

    __pydantic_config__ = STRICT
    uri: str | None = None
    """Tracking URI; null: ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` in the working folder."""
    experiment: str = "gru"


@dataclass(frozen=True)
class OutputConfig:
    """Where files go."""

    __pydantic_config__ = STRICT
    dir: str = "runs/gru"
    storage: str | None = None
    """Storage that all machines reach, such as ``s3://bucket/folder``, where they share no file system: the
    output folder is then kept there, and ``dir`` is each machine's own copy."""
    merged: bool = False
    """With ``model.lora``: also write the model with its adapter merged in."""
