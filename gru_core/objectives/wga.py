"""``wga``: weighted gradient ascent (arXiv 2502.19301): each token's ascent weighted by its own probability.

-mean_t( stopgrad(p_t)^beta nll_t )
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from gru_core.config import UnlearnConfig
from gru_core.objectives.base import AnswerLosses, beta_of


class WeightedGradientAscent:
    unit: ClassVar[Literal["token", "sequence"]] = "token"
    needs_reference: ClassVar[bool] = False
    default_beta: ClassVar[float | None] = 1.0

    def __init__(self, config: UnlearnConfig) -> None:
        self.beta = beta_of(config, 1.0)

    def loss_sum(self, losses: AnswerLosses) -> torch.Tensor:
        nll = losses.nll_BT1
        return -((-self.beta * nll.detach()).exp() * nll).sum()
