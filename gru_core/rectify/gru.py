"""``gru``: Gradient Rectified Unlearning (arXiv 2503.09117, the closed form of its projection problem).

    min_x ||x - g_u||^2   subject to   <x, m> >= 0

Strength and repair margin are ours: strength scales what is removed, the margin moves the constraint to
``<x, m> >= kappa * drift * ||g_u|| ||m||``.
"""

from __future__ import annotations

import math
from typing import ClassVar

from gru_core.config import RectifyConfig
from gru_core.rectify.gram import Gram
from gru_core.rectify.rules import finite_ratio


class Gru:
    """``(1, w_r)`` with

    - ``lambda max(0, -ur)/rr``, lambda the strength;
    - with a cosine clip c, where ``ur < 0``: ``lambda min(-cos, c) sqrt(uu/rr)``;
    - with a repair margin kappa instead of both: ``max(0, kappa drift sqrt(uu rr) - ur)/rr``;
    - with a retain weight beta *outside*: beta is added to that;
    - with beta *inside*: the same formulas for the gradient ``g_u + beta m`` of the joint objective.
    """

    uses: ClassVar[frozenset[str]] = frozenset(
        {"strength", "ema", "cosine_clip", "retain_weight", "retain_weight_at", "repair"}
    )

    def __init__(self, config: RectifyConfig) -> None:
        self.config = config

    def weights(self, gram: Gram, drift: float) -> tuple[float, float]:
        c = self.config
        beta = c.retain_weight
        if c.retain_weight_at == "inside" and beta > 0:
            # <g_u + beta m, .>: the joint gradient is what conflicts, and what is rectified.
            uu = max(0.0, gram.uu + 2 * beta * gram.ur + beta * beta * gram.rr)
            gram = Gram(uu, gram.ur + beta * gram.rr, gram.rr)
        return 1.0, beta + self._rectification(gram, drift)

    def _rectification(self, gram: Gram, drift: float) -> float:
        c = self.config
        if c.repair > 0:
            margin = c.repair * drift * math.sqrt(gram.uu) * math.sqrt(gram.rr)
            return finite_ratio(max(0.0, margin - gram.ur), gram.rr)
        if gram.ur >= 0:
            return 0.0
        if c.cosine_clip is None:
            return c.strength * finite_ratio(-gram.ur, gram.rr)
        removed = min(-gram.cosine, c.cosine_clip)
        return c.strength * finite_ratio(removed * math.sqrt(gram.uu), math.sqrt(gram.rr))
