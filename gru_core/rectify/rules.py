"""What a rule is: a pure map from the Gram matrix and the drift to two weights; the update is
``w_u g_u + w_r m``."""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

from gru_core.rectify.gram import Gram


class Rule(Protocol):
    """A rule, built from a :class:`~gru_core.config.RectifyConfig`.

    Attributes:
        uses: fields of ``rectify`` that have an effect with this rule. Without ``ema`` the rule takes no
            retain gradient, and the step skips the retain pass.
    """

    uses: ClassVar[frozenset[str]]

    def weights(self, gram: Gram, drift: float) -> tuple[float, float]:
        """``(w_u, w_r)``; finite for every finite Gram matrix, zeros included.

        Args:
            gram: inner products, ``m`` debiased where it is a moving average.
            drift: smoothed retain loss above its starting value, nats, at least 0.
        """
        ...


def finite_ratio(numerator: float, denominator: float) -> float:
    """``numerator / denominator``, 0 where that is not a finite number (a zero or denormal gradient)."""
    if denominator == 0:
        return 0.0
    ratio = numerator / denominator
    return ratio if math.isfinite(ratio) else 0.0
