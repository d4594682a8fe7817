"""Metrics that work on the model itself and not on measured rows: they change its weights for a while, or have another
library question it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from gru_core.benchmarks.base import Benchmark
from gru_core.config import EvaluateConfig, ModelConfig
from gru_core.errors import ConfigError
from gru_core.metrics.base import Role
from gru_core.parallel import Group

CHANCE = "chance"
"""The further score that says what guessing scores: as ``evaluate.unlearning`` the end of forgetting."""


class Score(Protocol):
    """Scores of metrics over rows, by name, of the model as it stands; all ranks call it together."""

    def __call__(self, names: Sequence[str], data: Benchmark | None = None) -> Mapping[str, float]:
        """``data``: rows to take in place of the subject's own."""
        ...


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, with what it is evaluated on; every rank of ``group`` has one.

    Attributes:
        model: as it trains: plain, in DDP or sharded.
        score: metrics over rows of the model as it stands.
    """

    model: nn.Module
    tokenizer: Any
    benchmark: Benchmark
    config: EvaluateConfig
    model_config: ModelConfig
    group: Group
    score: Score


@dataclass(frozen=True)
class ModelMetric:
    """One number about a model, or several under one name.

    Attributes:
        role: as :class:`~gru_core.metrics.base.Metric`.
        run: called on every rank with the same subject, gives the same scores on each: its own name, further ones
            behind ``NAME/``; always finite. Weights, gradients, train mode and random state are as before afterwards.
        check: raises InputError where it cannot be run with these settings, on this benchmark (None: not known yet).
    """

    role: Role
    run: Callable[[Subject], Mapping[str, float]]
    check: Callable[[EvaluateConfig, Benchmark | None], None]


def row_metrics(config: EvaluateConfig, asking: str) -> tuple[str, ...]:
    """The study's forget metric, and its retention metric where that is one over rows: what :attr:`Subject.score`
    gives, and metric ``asking`` looks at.

    Raises:
        ConfigError: the forget metric is not one over rows.
    """
    from gru_core.metrics import METRICS  # which imports the metrics that call this

    if config.unlearning not in METRICS:
        allowed = ", ".join(sorted(name for name, metric in METRICS.items() if metric.role == "forget"))
        raise ConfigError("evaluate.unlearning", config.unlearning, f"{allowed} ({asking} measures it again)")
    return (config.unlearning, *([config.retention] if config.retention in METRICS else []))
