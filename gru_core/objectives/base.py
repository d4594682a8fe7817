"""What a forget objective is. Shape legend: B rows, T-1 shifted positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch

from gru_core.config import UnlearnConfig


@dataclass(frozen=True)
class AnswerLosses:
    """What the model says of a batch's answers.

    Attributes:
        nll_BT1: ``-log p(y_t)`` in nats on answer tokens, 0 elsewhere, float32, differentiable.
        tokens_B: answer tokens of each row.
        reference_B: summed NLL of each row under the frozen starting model; None where no objective asks.
        kl_BT1: ``KL(starting model || model)`` in nats on answer tokens, 0 elsewhere, differentiable; None where no
            retain loss asks.
    """

    nll_BT1: torch.Tensor
    tokens_B: torch.Tensor
    reference_B: torch.Tensor | None = None
    kl_BT1: torch.Tensor | None = None

    @property
    def nll_B(self) -> torch.Tensor:
        return self.nll_BT1.sum(-1)


class Objective(Protocol):
    """A loss to be minimised, as a sum that the step divides by the global count of ``unit``.

    Attributes:
        unit: what the published loss averages over.
        needs_reference: whether ``reference_B`` must be there.
        default_beta: inverse temperature where the config leaves it open; None: the objective has none.
    """

    unit: ClassVar[Literal["token", "sequence"]]
    needs_reference: ClassVar[bool]
    default_beta: ClassVar[float | None]

    def loss_sum(self, losses: AnswerLosses) -> torch.Tensor:
        """Scalar: the sum over all units of the batch."""
        ...


def beta_of(config: UnlearnConfig, default: float) -> float:
    return default if config.beta is None else config.beta
