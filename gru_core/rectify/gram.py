"""The three numbers behind every rule: inner products of forget gradient and retain gradient.

Both gradients are lists of tensors, one per parameter, never flattened or copied to the host. Products
accumulate in float32 or better per tensor and in float64 over tensors, whatever the gradients' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_CHUNK = 1 << 24
"""Elements per dot product: bounds the float32 copy of a bf16 gradient, and BLAS takes 32-bit sizes."""


@dataclass(frozen=True)
class Gram:
    """Inner products over all trainable parameters at once.

    Attributes:
        uu: <g_u, g_u>, squared norm of the forget gradient.
        ur: <g_u, m>, negative where the two conflict.
        rr: <m, m>, squared norm of the (smoothed) retain gradient.
    """

    uu: float
    ur: float
    rr: float

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two; 0 where one of them is zero."""
        scale = math.sqrt(self.uu) * math.sqrt(self.rr)
        return max(-1.0, min(1.0, self.ur / scale)) if scale > 0 else 0.0

    def scaled(self, factor: float) -> Gram:
        """The Gram matrix of ``g_u`` and ``factor * m``."""
        return Gram(self.uu, self.ur * factor, self.rr * factor * factor)

    def norm(self, w_u: float, w_r: float) -> float:
        """Norm of ``w_u g_u + w_r m``, without another pass over the gradients."""
        return math.sqrt(max(0.0, w_u * w_u * self.uu + 2 * w_u * w_r * self.ur + w_r * w_r * self.rr))


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """<a, b> as a float64 scalar tensor on the tensors' device (no synchronisation)."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, flat_a.numel(), _CHUNK):
        x, y = flat_a[start : start + _CHUNK], flat_b[start : start + _CHUNK]
        if x.dtype in (torch.bfloat16, torch.float16):
            x, y = x.float(), y.float()
        total += torch.dot(x, y)
    return total


def gram(forget: Sequence[torch.Tensor], retain: Sequence[torch.Tensor]) -> Gram:
    """Gram matrix of two gradients; one host synchronisation for all three numbers.

    Args:
        forget: ``g_u``, one tensor per parameter.
        retain: ``m``, the same shapes.
    """
    return Gram(*torch.stack([_total(forget, forget), _total(forget, retain), _total(retain, retain)]).tolist())


def squared_norm(gradients: Sequence[torch.Tensor]) -> float:
    """<g, g> over all tensors; the same bits as the entry of :func:`gram`."""
    return float(_total(gradients, gradients))


def _total(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of dot products over tensors, a float64 scalar tensor."""
    return torch.stack([dot(x, y) for x, y in zip(a, b, strict=True)]).sum()
