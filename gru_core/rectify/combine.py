"""One in-place pass: ``g_u <- w_u g_u + w_r m``."""

from __future__ import annotations

from collections.abc import Sequence

import torch


@torch.no_grad()
def combine(forget: Sequence[torch.Tensor], retain: Sequence[torch.Tensor], w_u: float, w_r: float) -> None:
    """Write the update over the forget gradient. Weights of 1 and 0 cost nothing and change no bit.

    Args:
        forget: ``g_u``, one tensor per parameter; overwritten.
        retain: ``m``, the same shapes; left alone.
    """
    if w_u != 1.0:
        torch._foreach_mul_(list(forget), w_u)
    if w_r != 0.0:
        torch._foreach_add_(list(forget), list(retain), alpha=w_r)
