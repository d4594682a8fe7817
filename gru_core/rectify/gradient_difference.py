"""``sum``: gradient difference, the weighted sum of both gradients (arXiv 2203.12817; TOFU's GradDiff)."""

from __future__ import annotations

from typing import ClassVar

from gru_core.config import RectifyConfig
from gru_core.errors import ConfigError
from gru_core.rectify.gram import Gram


class GradientDifference:
    """``(1, beta)``, beta the retain weight.

    Raises:
        ConfigError: the retain weight is 0, which is plain unlearning under another name.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"retain_weight", "ema"})

    def __init__(self, config: RectifyConfig) -> None:
        if config.retain_weight <= 0:
            raise ConfigError("rectify.retain_weight", config.retain_weight, "above 0 with rule 'sum'")
        self.retain_weight = config.retain_weight

    def weights(self, gram: Gram, drift: float) -> tuple[float, float]:
        return 1.0, self.retain_weight
