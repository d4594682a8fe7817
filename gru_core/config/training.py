"""One run: objective, rule, retain data, workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gru_core.config.checks import STRICT, check, finite


@dataclass(frozen=True)
class UnlearnConfig:
    """Objective, length and optimizer of one run."""

    __pydantic_config__ = STRICT
    objective: str = "npo"
    """``ga``, ``wga``, ``npo`` or ``simnpo``."""
    steps: int = 60
    """Optimizer steps."""
    batch_size: int = 32
    """Rows of each stream (forget, retain) per optimizer step, over all workers. A text that is longer than the model
    takes counts as several, one for each piece of it."""
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
            check(value >= 1, f"unlearn.{name}", value, "a whole number from 1")
        check(finite(self.lr) and self.lr > 0, "unlearn.lr", self.lr, "a number above 0")
        schedules = ("constant", "linear", "cosine")
        check(self.schedule in schedules, "unlearn.schedule", self.schedule, ", ".join(schedules))
        check(0 <= self.warmup <= self.steps, "unlearn.warmup", self.warmup, f"0 to steps ({self.steps})")
        for name in ("weight_decay", "forget_weight"):
            value = getattr(self, name)
            check(finite(value) and value >= 0, f"unlearn.{name}", value, "a number from 0")
        for name in ("clip", "beta"):
            value = getattr(self, name)
            check(value is None or (finite(value) and value > 0), f"unlearn.{name}", value, "null or above 0")
        check(finite(self.delta), "unlearn.delta", self.delta, "a finite number")
        check(finite(self.collapse) and self.collapse > 1, "unlearn.collapse", self.collapse, "above 1")


@dataclass(frozen=True)
class RectifyConfig:
    """How forget gradient and retain gradient become one update (``gru_core/rectify``)."""

    __pydantic_config__ = STRICT
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
            check(finite(value) and value >= 0, f"rectify.{name}", value, "a number from 0")
        check(finite(self.ema) and 0 < self.ema <= 1, "rectify.ema", self.ema, "above 0, at most 1")
        clip = self.cosine_clip
        ok = clip is None or (finite(clip) and 0 < clip <= 1)
        check(ok, "rectify.cosine_clip", clip, "null, or above 0 and at most 1")
        places = ("outside", "inside")
        check(
            self.retain_weight_at in places,
            "rectify.retain_weight_at",
            self.retain_weight_at,
            ", ".join(places),
        )
        if self.repair > 0:
            check(clip is None, "rectify.cosine_clip", clip, "null where rectify.repair is above 0")


@dataclass(frozen=True)
class RetainConfig:
    """The rows and the loss that stand for what is to be kept."""

    __pydantic_config__ = STRICT
    loss: str = "nll"
    """``nll``, or ``kl``: divergence from the starting model's distribution."""
    size: int | float = 1.0
    """A share in (0, 1] (a float) or a row count from 1 (an integer); subsets are nested by ``train.seed``."""
    include_scored: bool = False
    """Let rows that score retention train too, as the published protocols do; marked in the results."""

    def __post_init__(self) -> None:
        size, whole = self.size, isinstance(self.size, int) and not isinstance(self.size, bool)
        ok = (whole and size >= 1) or (isinstance(size, float) and 0 < size <= 1)
        check(ok, "retain.size", size, "a share above 0 and at most 1.0, or a row count from 1")


@dataclass(frozen=True)
class TrainConfig:
    """Workers, seed, checkpoints."""

    __pydantic_config__ = STRICT
    workers: int = 0
    """Ray Train workers; 0 runs in this process."""
    cpus_per_worker: int = 1
    """CPUs, and torch threads, of each worker (and of each trial with ``workers: 0``)."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs of each worker; ``auto``: 1 where the cluster has GPUs, else 0. A fraction shares one GPU."""
    micro_batch: int | None = None
    """Rows per forward pass on each worker; null: all of the worker's rows at once. Accumulation follows."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """``ddp``: every worker holds the model. ``fsdp``: weights, gradients, moving average and optimizer state are
    spread over the workers (FSDP2), for models larger than one GPU."""
    activation_checkpointing: bool = False
    """Keep one activation a transformer block and compute the others again in the backward pass."""
    cpu_offload: bool = False
    """fsdp: keep the shards and the optimizer in host memory."""
    seed: int = 0
    """Data order, retain subset, search."""
    checkpoint_every: int = 20
    """Steps between checkpoints; the last two are kept."""
    max_failures: int = 1
    """Times that a run is restarted from its last checkpoint when a worker dies."""
    min_workers: int | None = None
    """After a loss go on with at least this many workers, and grow again when machines come back; null: wait until
    all ``workers`` can be had. The global batch stays what it is."""
    hang_timeout: float = 1800.0
    """Seconds without a sign of life after which the workers count as hung and are started again."""
    grace: float = 30.0
    """Seconds that a stopped run (SIGTERM) has to write its checkpoint."""

    def __post_init__(self) -> None:
        lowest = {"workers": 0, "cpus_per_worker": 1, "seed": 0, "checkpoint_every": 1, "max_failures": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            check(value >= low, f"train.{name}", value, f"a whole number from {low}")
        gpus, micro = self.gpus_per_worker, self.micro_batch
        check(
            gpus == "auto" or (not isinstance(gpus, str) and finite(gpus) and gpus >= 0),
            "train.gpus_per_worker", gpus, "auto, or a number from 0",
        )  # fmt: skip
        check(micro is None or micro >= 1, "train.micro_batch", micro, "null or a whole number from 1")
        check(self.strategy in ("ddp", "fsdp"), "train.strategy", self.strategy, "ddp, fsdp")
        if self.strategy == "fsdp":
            check(self.workers >= 1, "train.workers", self.workers, "from 1 with train.strategy fsdp")
        offload, fewest = self.cpu_offload, self.min_workers
        check(not offload or self.strategy == "fsdp", "train.cpu_offload", offload, "false without strategy fsdp")
        ok = fewest is None or 1 <= fewest <= self.workers
        check(ok, "train.min_workers", fewest, f"null, or 1 to train.workers ({self.workers})")
        for name in ("hang_timeout", "grace"):
            value = getattr(self, name)
            check(finite(value) and value > 0, f"train.{name}", value, "seconds, above 0")
