"""A model as the measuring calls it: plain, or sharded over ranks that must keep in step."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import nn

from gru_core.parallel import Forward


class Scorer(NamedTuple):
    """A model as the measuring uses it.

    Attributes:
        model: for its settings and its signature.
        forward: what is called for a forward pass.
        device: where inputs go.
    """

    model: nn.Module
    forward: Forward
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module) -> Scorer:
        """A model that this process holds alone."""
        return cls(model, model, next(model.parameters()).device)

    def takes(self, name: str) -> bool:
        """Whether the model's forward has an argument of this name."""
        return name in inspect.signature(self.model.forward).parameters

    def continues(self) -> bool:
        """Whether several answers can follow one pass over their prompt: the model takes positions, and a cache whose
        rows can be repeated and hold the whole prompt."""
        settings = getattr(self.model, "config", None)
        whole = getattr(settings, "sliding_window", None) is None and not getattr(settings, "is_encoder_decoder", False)
        plain = set(getattr(settings, "layer_types", None) or ()) <= {"full_attention"}
        return whole and plain and self.takes("past_key_values") and self.takes("position_ids")
