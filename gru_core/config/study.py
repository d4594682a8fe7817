"""What surrounds a run: preparation, search, requests, tracking, output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gru_core.config.checks import STRICT, check, finite


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
class RequestsConfig:
    """What ``gru requests`` runs: one unlearning run for each of several forget sets."""

    __pydantic_config__ = STRICT
    splits: tuple[str, ...] = ()
    """Values of ``benchmark.split``, each once, in the order of the requests."""
    sequential: bool = False
    """True: each request starts from the model that the one before left (sustainability), and is scored against the
    first one's start. False: each starts from ``model.path`` (scalability)."""
    passes: float | None = None
    """Passes over each forget set, so that a larger one gets more steps: rows x passes / ``unlearn.batch_size``,
    rounded up. Null: ``unlearn.steps`` for each."""

    def __post_init__(self) -> None:
        splits, passes = list(self.splits), self.passes
        check(passes is None or (finite(passes) and passes > 0), "requests.passes", passes, "null or a number above 0")
        check(len(set(splits)) == len(splits), "requests.splits", splits, "values of benchmark.split, each once")


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
