"""Forward and backward passes of one rank's share of a global batch.

Every loss is a sum divided by the *global* count of its unit over the step, times the number of ranks, because DDP
and FSDP2 average gradients: N ranks take the step of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from gru_core.batch import TokenBatch, TokenRow, collate
from gru_core.config import ModelConfig
from gru_core.logprobs import answer_counts, answer_kl, answer_nll
from gru_core.models import compute_dtype
from gru_core.objectives import AnswerLosses
from gru_core.parallel import Group, is_sharded, no_sync, reshard, unwrap
from gru_core.retain import RetainLoss

Frozen = Callable[[], AbstractContextManager[nn.Module]]
"""Gives the frozen starting model for the time of one forward pass."""


@dataclass(frozen=True)
class Rows:
    """A tokenised dataset.

    Attributes:
        rows: token rows.
        reference: summed NLL of each row under the starting model, (n,), or None.
    """

    rows: Sequence[TokenRow]
    reference: torch.Tensor | None = None


class Portion(NamedTuple):
    """A micro-batch, and whether it counts: under FSDP2 a rank that is done joins the others with one that does not."""

    batch: TokenBatch
    counts: bool


class Losses:
    """Forward passes of this rank's share of a global batch.

    Args:
        model: a causal LM, plain, DDP-wrapped or sharded.
        micro_batch: rows per forward pass; None: all of the rank's rows at once.
        frozen: the starting model, for retain losses that compare with it.
    """

    def __init__(
        self,
        model: nn.Module,
        model_config: ModelConfig,
        group: Group,
        micro_batch: int | None,
        frozen: Frozen | None = None,
    ) -> None:
        self.model, self.group, self.micro_batch, self.frozen = model, group, micro_batch, frozen
        self.sharded = is_sharded(model)
        # FSDP2 casts by itself, where it gathers a block's weights.
        half = model_config.dtype == "bfloat16" and not self.sharded
        self._autocast = compute_dtype(model_config) if half else None
        self._pad = getattr(unwrap(model).config, "pad_token_id", None) or 0

    def batches(self, data: Rows, positions: Sequence[int]) -> list[Portion]:
        """Micro-batches of this rank's share of ``positions``; under FSDP2 equally many on every rank."""
        mine = self.group.share(positions)
        longest = -(-len(positions) // self.group.size)
        size = self.micro_batch or max(1, longest)
        chunks = [(mine[i : i + size], True) for i in range(0, len(mine), size)]
        if self.sharded:
            chunks += [([positions[0]], False)] * (-(-longest // size) - len(chunks))
        return [Portion(collate([data.rows[i] for i in c], c, self._pad), counts) for c, counts in chunks]

    def forward(
        self, batch: TokenBatch, reference: torch.Tensor | None = None, *, divergence: bool = False
    ) -> AnswerLosses:
        """Answer losses of one micro-batch, ``kl_BT1`` only where ``divergence`` asks for it.

        With gradients the forward goes through DDP, where there is one. Without, it goes past it: DDP may start a
        collective in its forward, and a rank without rows would leave the others waiting in it.
        """
        batch = batch.to(self.group.device)
        frozen_BTV = self._frozen_logits(batch) if divergence else None
        logits_BTV = self._logits(self.model if torch.is_grad_enabled() else unwrap(self.model), batch)
        nll_BT1 = answer_nll(logits_BTV, batch.labels_BT)
        known_B = None if reference is None else reference[batch.index_B.cpu()].to(nll_BT1)
        kl_BT1 = None if frozen_BTV is None else answer_kl(frozen_BTV, logits_BTV, batch.labels_BT)
        return AnswerLosses(nll_BT1, answer_counts(batch.labels_BT), known_B, kl_BT1)

    def _logits(self, model: nn.Module, batch: TokenBatch) -> torch.Tensor:
        with torch.autocast(self.group.device.type, self._autocast, enabled=self._autocast is not None):
            return model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False).logits

    def _frozen_logits(self, batch: TokenBatch) -> torch.Tensor:
        assert self.frozen is not None, "this retain loss needs the starting model"
        with torch.no_grad(), self.frozen() as model:
            logits = self._logits(model, batch)
            if model is not unwrap(self.model):  # a copy gives its whole weights back; the trained model needs its own
                reshard(model)
            return logits

    def accumulate(
        self,
        data: Rows,
        positions: Sequence[int],
        loss_sum: Callable[[AnswerLosses], torch.Tensor],
        unit: Literal["token", "sequence"],
        weight: float,
        *,
        divergence: bool = False,
    ) -> float:
        """Backward of ``weight * loss_sum / global count`` over all micro-batches, one synchronisation.

        Returns:
            This rank's part of the mean loss: the sum over ranks is the global mean, unweighted.
        """
        count = global_count(data.rows, positions, unit)
        portions = self.batches(data, positions)
        total = torch.zeros((), dtype=torch.float64, device=self.group.device)
        for i, (batch, counts) in enumerate(portions):
            with no_sync(self.model, active=i < len(portions) - 1):
                loss = loss_sum(self.forward(batch, data.reference, divergence=divergence))
                (loss * (weight * self.group.size / count * counts)).backward()
            total += loss.detach() * counts
        return float(total) / count

    @torch.no_grad()
    def mean(self, data: Rows, positions: Sequence[int], loss: RetainLoss) -> float:
        """Global mean loss without gradients, the same on every rank."""
        portions = self.batches(data, positions)
        values = [(self.forward(b, divergence=loss.needs_frozen), counts) for b, counts in portions]
        reshard(self.model)
        total = sum(float(loss.loss_sum(value)) * counts for value, counts in values)
        return self.group.sum([total])[0] / global_count(data.rows, positions, loss.unit)


@torch.no_grad()
def reference_losses(losses: Losses, data: Rows, group: Group) -> torch.Tensor:
    """Summed NLL of every row under the model as it stands, (n,) float64 on the CPU, the same on every rank.

    Taken once, before the first step: the frozen starting model then needs no second copy in memory.
    """
    mine: list[tuple[int, float]] = []
    chunk = (losses.micro_batch or 64) * group.size
    places = range(len(data.rows))
    for start in range(0, len(places), chunk):
        for batch, counts in losses.batches(data, places[start : start + chunk]):
            values = losses.forward(batch).nll_B
            if counts:
                mine += zip(batch.index_B.tolist(), values.tolist(), strict=True)
    reshard(losses.model)
    out = torch.zeros(len(data.rows), dtype=torch.float64)
    for part in group.gather(mine):
        for place, value in part:
            out[place] = value
    return out


def global_count(rows: Sequence[TokenRow], positions: Sequence[int], unit: Literal["token", "sequence"]) -> int:
    """Units of the global batch, known on every rank before the first forward pass."""
    return len(positions) if unit == "sequence" else sum(rows[i].answer_length for i in positions)
