"""``ga``: gradient ascent, ``-CE`` over answer tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from gru_core.config import UnlearnConfig
from gru_core.objectives.base import AnswerLosses


class GradientAscent:
    unit: ClassVar[Literal["token", "sequence"]] = "token"
    needs_reference: ClassVar[bool] = False
    default_beta: ClassVar[float | None] = None

    def __init__(self, config: UnlearnConfig) -> None:
        del config

    def loss_sum(self, losses: AnswerLosses) -> torch.Tensor:
        return -losses.nll_BT1.sum()
