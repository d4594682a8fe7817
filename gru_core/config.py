"""One run's configuration: frozen dataclasses that refuse a bad value at construction.

``pipelines.settings`` reads YAML into these. Every section can be built on its own, so that ``gru_core`` is
usable as a library. An error is a :class:`~gru_core.errors.ConfigError`: field, value, what is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from gru_core.errors import ConfigError

# Read by pydantic (when it validates YAML) and by nothing else: unknown keys and silent casts are refused.
_STRICT = {"extra": "forbid", "strict": True}


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(name, value, allowed)


def _finite(value: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class ModelConfig:
    """The model that is to forget."""

    __pydantic_config__ = _STRICT
    path: str = "prepared"
    """A local folder, a hub id, or ``prepared``: the target model that ``gru prepare`` makes (and caches)."""
    dtype: Literal["float32", "bfloat16", "pure_bfloat16"] = "float32"
    """Compute type. ``bfloat16`` computes in bf16 over float32 weights, gradients and optimizer state;
    ``pure_bfloat16`` stores everything in bf16 too: small updates are then lost, and a warning says so."""
    lora: None = None
    """Reserved for adapters; full parameters are trained."""
    system_prompt: str | None = None
    """System message, for tokenizers with a chat template."""
    chat_date: str = "10 Apr 2025"
    """The date that templates with a clock are given, so that a prompt is the same every day."""

    def __post_init__(self) -> None:
        _check(bool(self.path), "model.path", self.path, "a folder, a hub id or 'prepared'")
        dtypes = ("float32", "bfloat16", "pure_bfloat16")
        _check(self.dtype in dtypes, "model.dtype", self.dtype, ", ".join(dtypes))
        _check(self.lora is None, "model.lora", self.lora, "null (adapters are not built yet)")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is to be forgotten, what is to be kept, and the rows that score both."""

    __pydantic_config__ = _STRICT
    name: str = "authors"
    """``authors`` (built in), ``tofu`` or ``jsonl``."""
    split: str = "forget10"
    """Forget split: of ``authors`` and ``tofu``, ``forget01``, ``forget05`` or ``forget10``."""
    data_dir: str | None = None
    """``tofu``: a local folder of its JSON files; null loads ``locuslab/TOFU`` from the hub."""
    forget: str | None = None
    """``jsonl``: file of rows to forget."""
    retain: str | None = None
    """``jsonl``: file of rows to keep."""
    retain_rows: int | None = None
    """Keep only the first n rows of the retain set (named ``retain-first-n`` in results); null: all."""
    seed: int = 0
    """``authors``: seed of the generated biographies."""

    def __post_init__(self) -> None:
        rows = self.retain_rows
        _check(rows is None or rows >= 1, "benchmark.retain_rows", rows, "null or a whole number from 1")


@dataclass(frozen=True)
class UnlearnConfig:
    """Objective, length and optimizer of one run."""

    __pydantic_config__ = _STRICT
    objective: str = "npo"
    """``ga``, ``wga``, ``npo`` or ``simnpo``."""
    steps: int = 60
    """Optimizer steps."""
    batch_size: int = 32
    """Rows of each stream (forget, retain) per optimizer step, over all workers."""
    lr: float = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or falling to (almost) 0 at the last step."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    clip: float | None = 1.0
    """Largest gradient norm, applied after rectification; null: no clipping."""
    beta: float | None = None
    """Inverse temperature of wga, npo and simnpo; null: the objective's published value."""
    delta: float = 0.0
    """simnpo: margin, nats per token."""
    forget_weight: float = 1.0
    """Factor on the forget loss."""
    evaluate_every: int = 20
    """Steps between evaluations during the run (the start and the last step are always evaluated)."""
    collapse: float = 10.0
    """Ends the run as ``collapsed`` once the retain loss exceeds this multiple of its start (of 1 nat, where
    it started below)."""
    dropout: bool = False
    """Keep the model's dropout on during unlearning."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every"):
            value = getattr(self, name)
            _check(value >= 1, f"unlearn.{name}", value, "a whole number from 1")
        _check(_finite(self.lr) and self.lr > 0, "unlearn.lr", self.lr, "a number above 0")
        schedules = ("constant", "linear", "cosine")
        _check(self.schedule in schedules, "unlearn.schedule", self.schedule, ", ".join(schedules))
        _check(0 <= self.warmup <= self.steps, "unlearn.warmup", self.warmup, f"0 to steps ({self.steps})")
        for name in ("weight_decay", "forget_weight"):
            value = getattr(self, name)
            _check(_finite(value) and value >= 0, f"unlearn.{name}", value, "a number from 0")
        for name in ("clip", "beta"):
            value = getattr(self, name)
            _check(value is None or (_finite(value) and value > 0), f"unlearn.{name}", value, "null or above 0")
        _check(_finite(self.delta), "unlearn.delta", self.delta, "a finite number")
        _check(_finite(self.collapse) and self.collapse > 1, "unlearn.collapse", self.collapse, "above 1")


@dataclass(frozen=True)
class RectifyConfig:
    """How forget gradient and retain gradient become one update (``gru_core/rectify``)."""

    __pydantic_config__ = _STRICT
    rule: str = "gru"
    """``none`` (plain unlearning), ``sum`` (gradient difference) or ``gru``."""
    strength: float = 1.0
    """gru: share of the conflict that is removed; 0 plain, 1 as published, above 1 repairs."""
    ema: float = 0.8
    """Weight of the current retain gradient in its moving average, (0, 1]; 1: no average."""
    cosine_clip: float | None = None
    """gru: remove at most this share of the forget gradient's norm; null: no limit."""
    retain_weight: float = 0.0
    """Weight of the retain gradient itself: for ``sum`` the one of gradient difference, for ``gru`` added."""
    retain_weight_at: Literal["outside", "inside"] = "outside"
    """gru: add the retain gradient after rectification, or before (it is then rectified too)."""
    repair: float = 0.0
    """gru: repair margin kappa; above 0 it takes the place of strength and cosine clip."""

    def __post_init__(self) -> None:
        for name in ("strength", "retain_weight", "repair"):
            value = getattr(self, name)
            _check(_finite(value) and value >= 0, f"rectify.{name}", value, "a number from 0")
        _check(_finite(self.ema) and 0 < self.ema <= 1, "rectify.ema", self.ema, "above 0, at most 1")
        clip = self.cosine_clip
        ok = clip is None or (_finite(clip) and 0 < clip <= 1)
        _check(ok, "rectify.cosine_clip", clip, "null, or above 0 and at most 1")
        places = ("outside", "inside")
        _check(
            self.retain_weight_at in places,
            "rectify.retain_weight_at",
            self.retain_weight_at,
            ", ".join(places),
        )
        if self.repair > 0:
            _check(clip is None, "rectify.cosine_clip", clip, "null where rectify.repair is above 0")


@dataclass(frozen=True)
class RetainConfig:
    """The rows and the loss that stand for what is to be kept."""

    __pydantic_config__ = _STRICT
    loss: str = "nll"
    size: int | float = 1.0
    """A share in (0, 1] (a float) or a row count from 1 (an integer); subsets are nested by ``train.seed``."""
    include_scored: bool = False
    """Let rows that score retention train too, as the published protocols do; marked in the results."""

    def __post_init__(self) -> None:
        size, whole = self.size, isinstance(self.size, int) and not isinstance(self.size, bool)
        ok = (whole and size >= 1) or (isinstance(size, float) and 0 < size <= 1)
        _check(ok, "retain.size", size, "a share above 0 and at most 1.0, or a row count from 1")


@dataclass(frozen=True)
class TrainConfig:
    """Workers, seed, checkpoints."""

    __pydantic_config__ = _STRICT
    workers: int = 0
    """Ray Train workers; 0 runs in this process."""
    cpus_per_worker: int = 1
    """CPUs, and torch threads, of each worker (and of each trial with ``workers: 0``)."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs of each worker; ``auto``: 1 where the cluster has GPUs, else 0. A fraction shares one GPU."""
    micro_batch: int | None = None
    """Rows per forward pass on each worker; null: all of the worker's rows at once. Accumulation follows."""
    strategy: Literal["ddp"] = "ddp"
    seed: int = 0
    """Data order, retain subset, search."""
    checkpoint_every: int = 20
    """Steps between checkpoints; the last two are kept."""
    max_failures: int = 1
    """Times that a run is restarted from its last checkpoint when a worker dies."""

    def __post_init__(self) -> None:
        lowest = {"workers": 0, "cpus_per_worker": 1, "seed": 0, "checkpoint_every": 1, "max_failures": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            _check(value >= low, f"train.{name}", value, f"a whole number from {low}")
        gpus, micro = self.gpus_per_worker, self.micro_batch
        _check(
            gpus == "auto" or (not isinstance(gpus, str) and _finite(gpus) and gpus >= 0),
            "train.gpus_per_worker", gpus, "auto, or a number from 0",
        )  # fmt: skip
        _check(micro is None or micro >= 1, "train.micro_batch", micro, "null or a whole number from 1")
        _check(self.strategy == "ddp", "train.strategy", self.strategy, "ddp")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured at every evaluation, and the two numbers that span the trade-off."""

    __pydantic_config__ = _STRICT
    metrics: tuple[str, ...] = ("extraction_strength", "model_utility")
    """Names from ``gru_core.metrics.METRICS``."""
    unlearning: str = "extraction_strength"
    """Forget-set metric, lower when forgotten, behind the unlearning score."""
    retention: str = "model_utility"
    """Utility metric, higher is better, behind the retention score."""
    rows: int | None = None
    """Score only the first n rows of each set; null: all."""
    batch_rows: int = 64
    """Sequences per forward pass."""
    max_new_tokens: int = 200
    """Longest greedy generation (ROUGE)."""

    def __post_init__(self) -> None:
        _check(len(self.metrics) > 0, "evaluate.metrics", self.metrics, "at least one metric")
        for name in ("batch_rows", "max_new_tokens"):
            value = getattr(self, name)
            _check(value >= 1, f"evaluate.{name}", value, "a whole number from 1")
        _check(self.rows is None or self.rows >= 1, "evaluate.rows", self.rows, "null or a whole number from 1")


@dataclass(frozen=True)
class PrepareConfig:
    """How ``gru prepare`` makes the target model and the retain model."""

    __pydantic_config__ = _STRICT
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
            _check(value >= 1, f"prepare.{name}", value, "a whole number from 1")
        _check(self.tokenizer in ("word", "bpe"), "prepare.tokenizer", self.tokenizer, "word, bpe")
        _check(_finite(self.lr) and self.lr > 0, "prepare.lr", self.lr, "a number above 0")
        _check(0 <= self.warmup <= self.steps, "prepare.warmup", self.warmup, f"0 to steps ({self.steps})")
        decay = self.weight_decay
        _check(_finite(decay) and decay >= 0, "prepare.weight_decay", decay, "a number from 0")
        _check(self.hidden % self.heads == 0, "prepare.heads", self.heads, f"a divisor of hidden ({self.hidden})")


@dataclass(frozen=True)
class FamilyConfig:
    """One family of a search: fixed settings over the base config, and what it searches."""

    __pydantic_config__ = _STRICT
    fixed: dict[str, Any] = field(default_factory=dict)
    """Dotted config keys that this family sets."""
    space: dict[str, Any] = field(default_factory=dict)
    """Dotted config keys that this family searches, besides the shared ``search.space``."""


@dataclass(frozen=True)
class SearchConfig:
    """What ``gru search`` varies. A dimension is ``{low, high, log?, step?}`` or a list of choices."""

    __pydantic_config__ = _STRICT
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
        _check(self.trials >= 1, "search.trials", self.trials, "a whole number from 1")
        samplers = ("optuna", "random", "grid")
        _check(self.sampler in samplers, "search.sampler", self.sampler, ", ".join(samplers))
        _check(
            self.concurrent is None or self.concurrent >= 1,
            "search.concurrent",
            self.concurrent,
            "null or from 1",
        )
        known = {"unlearning", "retention"}
        ok = 0 < len(set(self.metrics)) == len(self.metrics) and set(self.metrics) <= known
        _check(ok, "search.metrics", list(self.metrics), "unlearning, retention, or both")


@dataclass(frozen=True)
class TrackConfig:
    """Where MLflow records."""

    __pydantic_config__ = _STRICT
    uri: str | None = None
    """Tracking URI; null: ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` in the working folder."""
    experiment: str = "gru"


@dataclass(frozen=True)
class OutputConfig:
    """Where files go."""

    __pydantic_config__ = _STRICT
    dir: str = "runs/gru"


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run, a search, a preparation or an evaluation."""

    __pydantic_config__ = _STRICT
    model: ModelConfig = field(default_factory=ModelConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    rectify: RectifyConfig = field(default_factory=RectifyConfig)
    retain: RetainConfig = field(default_factory=RetainConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    retain_model: str | None = None
    """Folder or hub id of a model trained without the forget set, ``prepared``, or null."""
    search: SearchConfig = field(default_factory=SearchConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        workers, batch = self.train.workers, self.unlearn.batch_size
        if workers > 1:
            _check(batch >= workers, "unlearn.batch_size", batch, f"at least train.workers ({workers})")
