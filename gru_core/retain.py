"""Retain losses: what the retain gradient is the gradient of. Sums, divided by the global count of a unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from gru_core.errors import unknown
from gru_core.objectives.base import AnswerLosses


@dataclass(frozen=True)
class RetainLoss:
    """A retain loss.

    Attributes:
        unit: what the sum is divided by.
        loss_sum: the sum over the batch's units, differentiable.
        needs_frozen: whether it compares with the starting model's distributions (``kl_BT1`` must be there).
    """

    unit: Literal["token", "sequence"]
    loss_sum: Callable[[AnswerLosses], torch.Tensor]
    needs_frozen: bool = False


def _divergence(losses: AnswerLosses) -> torch.Tensor:
    assert losses.kl_BT1 is not None, "kl needs the starting model"
    return losses.kl_BT1.sum()


RETAIN_LOSSES: dict[str, RetainLoss] = {
    "nll": RetainLoss("token", lambda losses: losses.nll_BT1.sum()),
    "kl": RetainLoss("token", _divergence, needs_frozen=True),
}


def build_retain_loss(name: str) -> RetainLoss:
    """The retain loss called ``name``; InputError where there is none."""
    if name not in RETAIN_LOSSES:
        raise unknown("retain loss", name, RETAIN_LOSSES)
    return RETAIN_LOSSES[name]
