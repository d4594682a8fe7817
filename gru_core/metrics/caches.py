"""A layer of a key-value cache whose rows are parts of what other rows have cached.

Shape legend: B rows, S cached tokens, K tokens fed, H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class Picked(DynamicLayer):
    """Keys and values picked from ``source`` when their layer's turn comes, and not kept behind it: memory holds those
    of one layer, close at hand for its attention."""

    def __init__(self, source: DynamicLayer, place_B: torch.Tensor, column_BS: torch.Tensor) -> None:
        super().__init__()
        self.source, self.place_B1, self.column_BS = source, place_B[:, None], column_BS
        self.dtype, self.device, self.is_initialized = source.dtype, source.device, True

    def get_seq_length(self, *_: Any) -> int:
        return self.column_BS.shape[1]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, K, D) each to (B, H, S + K, D)."""
        return self._behind(self.source.keys, key_states), self._behind(self.source.values, value_states)

    def _behind(self, cached: torch.Tensor | None, fed_BHKD: torch.Tensor) -> torch.Tensor:
        assert cached is not None  # see ``scorer.is_plain``
        place_B1, column_BS = (index.to(cached.device) for index in (self.place_B1, self.column_BS))
        found_BSHD = cached.transpose(1, 2)[place_B1, column_BS]
        return torch.cat([found_BSHD.transpose(1, 2), fed_BHKD], dim=2)
