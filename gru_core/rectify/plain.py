"""``none``: plain unlearning. The retain stream is not even read."""

from __future__ import annotations

from typing import ClassVar

from gru_core.config import RectifyConfig
from gru_core.rectify.gram import Gram


class Plain:
    """``(1, 0)``."""

    uses: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: RectifyConfig) -> None:
        del config  # nothing of it applies

    def weights(self, gram: Gram, drift: float) -> tuple[float, float]:
        return 1.0, 0.0
