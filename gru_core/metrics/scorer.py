"""A model as the measuring calls it: plain, or sharded over ranks that must keep in step."""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

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

    def head(self) -> nn.Module | None:
        """The layer that makes logits of hidden states, where the model tells of one."""
        tell = getattr(self.model, "get_output_embeddings", None)
        return tell() if tell is not None else None

    def at(self, place_N: torch.Tensor, **given: Any) -> tuple[torch.Tensor, Any]:
        """A forward pass: its logits (N, V) at the flat positions ``place_N`` of (B, T), and its key-value cache if it
        has one. The output layer is given no other positions where it takes hidden states (B, T, width): with a large
        vocabulary its logits are most of the memory."""
        picked = False

        def pick(_module: nn.Module, hidden: tuple[Any, ...]) -> tuple[Any, ...] | None:
            nonlocal picked
            if picked or not hidden or hidden[0].dim() != 3 or hidden[0].shape[:2] != given["input_ids"].shape:
                return None
            picked = True
            return (hidden[0].flatten(0, 1).index_select(0, place_N)[None], *hidden[1:])

        head = self.head()
        hook = head.register_forward_pre_hook(pick) if head is not None else None
        try:
            found = self.forward(**given)
        finally:
            if hook is not None:
                hook.remove()
        logits = found.logits[0] if picked else found.logits.flatten(0, 1).index_select(0, place_N)
        return logits, getattr(found, "past_key_values", None)

    def continues(self) -> bool:
        """Whether several answers can follow one pass over what they share: the model takes positions, and a cache that
        holds the whole of it."""
        settings: Any = getattr(self.model, "config", None)
        if hasattr(settings, "get_text_config"):  # of a model that sees, too
            settings = settings.get_text_config(decoder=True)
        whole = getattr(settings, "sliding_window", None) is None and not getattr(settings, "is_encoder_decoder", False)
        plain = set(getattr(settings, "layer_types", None) or ()) <= {"full_attention"}
        return whole and plain and self.takes("past_key_values") and self.takes("position_ids")


def is_plain(cache: Any) -> bool:
    """Whether ``cache`` is keys and values of every token, which :func:`picked` can take apart."""
    from transformers.cache_utils import DynamicLayer

    layers: list[Any] = getattr(cache, "layers", [])
    return bool(layers) and all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)


def picked(cache: Any, place_B: torch.Tensor, column_BS: torch.Tensor) -> Any:
    """A cache of B rows for one pass: of row ``place_B`` of ``cache`` the columns ``column_BS``. ``cache`` stays as it
    is."""
    from gru_core.metrics.caches import Picked

    out = copy.copy(cache)
    out.layers = [Picked(layer, place_B, column_BS) for layer in cache.layers]
    return out
