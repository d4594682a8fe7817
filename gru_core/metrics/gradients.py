"""Gradient norms of single answers, for membership inference; the model's own gradients stay as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gru_core.batch import IGNORE, TokenRow, collate
from gru_core.errors import InputError
from gru_core.logprobs import answer_counts, answer_nll
from gru_core.metrics.base import LOST_NLL
from gru_core.parallel import is_sharded


def gradient_norms(model: nn.Module, rows: Sequence[TokenRow], device: torch.device) -> list[float]:
    """For each row the mean over the parameter tensors of the L2 norm of the gradient of its answer's mean NLL, the
    closing token left out (0 for a row without another). Row by row, and without any communication.

    With adapters the tensors are those of the starting model, so that numbers before and after compare.

    Raises:
        InputError: the model is sharded, so that no rank has a gradient of its own.
    """
    if is_sharded(model):
        raise InputError("mia_gradnorm needs whole gradients: not with train.strategy fsdp (allowed: ddp)")
    with _gradients_of(model) as parameters:
        return [_norm(model, parameters, row, device) for row in rows]


@contextmanager
def _gradients_of(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters to derive by, frozen ones included; afterwards each is as before."""
    chosen = [p for name, p in model.named_parameters() if "lora_" not in name]
    before = [p.requires_grad for p in chosen]
    for p in chosen:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield chosen
    finally:
        for p, required in zip(chosen, before, strict=True):
            p.requires_grad_(required)


def _norm(model: nn.Module, parameters: Sequence[nn.Parameter], row: TokenRow, device: torch.device) -> float:
    batch = collate([row], [0], 0).to(device)
    labels_BT = batch.labels_BT.clone()
    if row.has_eos:
        labels_BT[0, -1] = IGNORE
    logits = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False).logits
    loss = answer_nll(logits, labels_BT).sum() / answer_counts(labels_BT).sum().clamp(min=1)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)  # not backward: DDP would listen
    norms = [float(g.double().norm()) if g is not None else 0.0 for g in found]
    mean = math.fsum(norms) / len(norms)
    return mean if math.isfinite(mean) else LOST_NLL
