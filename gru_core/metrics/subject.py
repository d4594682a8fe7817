"""Metrics that work on the model itself and not on measured rows: they change its weights for a while, or have another
library question it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gru_core.benchmarks.base import Benchmark
from gru_core.config import EvaluateConfig, ModelConfig
from gru_core.metrics.base import Role
from gru_core.parallel import Group

CHANCE = "chance"
"""The further score that says what guessing scores: as ``evaluate.unlearning`` the end of forgetting."""


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, with what it is evaluated on; every rank of ``group`` has one.

    Attributes:
        model: as it trains: plain, in DDP or sharded.
        score: scores of metrics over rows, by name, of the model as it stands; all ranks call it together.
    """

    model: nn.Module
    tokenizer: Any
    benchmark: Benchmark
    config: EvaluateConfig
    model_config: ModelConfig
    group: Group
    score: Callable[[Sequence[str]], Mapping[str, float]]


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
