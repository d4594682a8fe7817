"""The transformer blocks of a model: units of sharding, and of activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, the units of sharding and of activation checkpointing, in order.

    By the class names that the model itself says must not be split; else the longest list of modules in it.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [m for m in model.modules() if type(m).__name__ in names]
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return found or max(lists, key=len, default=[])


def checkpoint_activations(model: nn.Module) -> None:
    """Keep a block's input alone for the backward pass, and compute the rest of it again there.

    The switch that models have of their own works in train mode only, where dropout would be on, too.
    """
    from torch.utils.checkpoint import checkpoint

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **options)
            return checkpoint(forward, *args, use_reentrant=False, **options)

        return call

    for block in blocks(model):
        block.forward = wrapped(block.forward)
