"""``simnpo``: NPO without a reference, length-normalised (arXiv 2410.07163).

-(2/beta) mean_seq log sigmoid( beta (NLL/|y| - delta) )
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch.nn.functional import logsigmoid

from gru_core.config import UnlearnConfig
from gru_core.objectives.base import AnswerLosses, beta_of


class SimpleNegativePreference:
    unit: ClassVar[Literal["token", "sequence"]] = "sequence"
    needs_reference: ClassVar[bool] = False
    default_beta: ClassVar[float | None] = 4.5

    def __init__(self, config: UnlearnConfig) -> None:
        self.beta, self.delta = beta_of(config, 4.5), config.delta

    def loss_sum(self, losses: AnswerLosses) -> torch.Tensor:
        per_token_B = losses.nll_B / losses.tokens_B
        return -(2 / self.beta) * logsigmoid(self.beta * (per_token_B - self.delta)).sum()
