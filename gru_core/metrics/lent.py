"""A model that is changed for a while; afterwards everything is as it was, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gru_core.parallel import local


@contextmanager
def values_kept(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """``parameters`` may change (this rank's shards of them); costs a copy of them in host memory."""
    copies = [local(p.detach()).to("cpu", copy=True) for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, copy in zip(parameters, copies, strict=True):
                local(p).copy_(copy)


@contextmanager
def learning(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """``parameters`` may be trained, without dropout: gradients on and none there yet, every module in evaluation
    mode. Values, gradients, ``requires_grad`` and modes come back."""
    states = [(p, p.requires_grad, p.grad) for p in parameters]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with values_kept(parameters), torch.enable_grad():
            for p in parameters:
                p.grad = None
                p.requires_grad_(True)
            yield
    finally:
        for p, required, gradient in states:
            p.requires_grad_(required)
            p.grad = gradient
        for module, mode in modes:
            module.training = mode
