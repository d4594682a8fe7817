"""``npo``: negative preference optimisation (arXiv 2404.05868, eq. 3).

-(2/beta) mean_seq log sigmoid( beta (NLL - NLL_ref) )
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch.nn.functional import logsigmoid

from gru_core.config import UnlearnConfig
from gru_core.objectives.base import AnswerLosses, beta_of


class NegativePreference:
    unit: ClassVar[Literal["token", "sequence"]] = "sequence"
    needs_reference: ClassVar[bool] = True
    default_beta: ClassVar[float | None] = 0.1

    def __init__(self, config: UnlearnConfig) -> None:
        self.beta = beta_of(config, 0.1)

    def loss_sum(self, losses: AnswerLosses) -> torch.Tensor:
        assert losses.reference_B is not None, "npo needs the starting model's losses"
        margin_B = losses.nll_B - losses.reference_B
        return -(2 / self.beta) * logsigmoid(self.beta * margin_B).sum()
