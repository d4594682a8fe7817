"""The size of a run before it is run: parameters, activations and peak memory of one worker, from shapes alone.

Nothing is allocated and no weight is read: the model is built on the meta device, and what autograd keeps is counted by
running one and two of its blocks on fake tensors, with the model's own code. docs/scaling.md has the formulas.

Shape legend: B rows of a micro-batch, T tokens of its longest row, N answer tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gru_core import adapters, models
from gru_core.blocks import blocks
from gru_core.config import ModelConfig
from gru_core.errors import InputError
from gru_core.metrics.scorer import Scorer


@dataclass(frozen=True)
class Shape:
    """What the numbers follow from; counts are elements, not bytes.

    Attributes:
        parameters: all weights, tied ones once.
        trained: those with a gradient.
        layers: transformer blocks, ``block`` weights in the largest of them.
        root: weights outside the blocks (embeddings, last norm, output head).
        products: weights that multiply every token (6 FLOPs a token and weight in training); no embedding table.
        largest: elements of the largest trained tensor, whose gradient exists twice for a moment.
        head_trained: whether the output head has a gradient.
        vocabulary, hidden, width, intermediate: V, D, attention heads x head size, width of the feed-forward part.
        cache: key and value elements that generation keeps for a token, over all layers.
        trims: whether an evaluation makes logits of answer tokens alone.
    """

    parameters: int
    trained: int
    layers: int
    block: int
    root: int
    products: int
    largest: int
    head_trained: bool
    vocabulary: int
    hidden: int
    width: int
    intermediate: int
    cache: int
    trims: bool


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd keeps from forward to backward: ``fixed`` whatever the rows (bf16 copies of weights under
    autocast), ``row`` for each row of the traced length; of one block, and of everything outside the blocks."""

    block_fixed: int
    block_row: int
    rest_fixed: int
    rest_row: int


def _build(config: Any, settings: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The model of ``config`` on the meta device, adapters included."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, RuntimeError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"model.path: no causal language model can be built from its config.json: {first}") from error
    if settings.lora is not None:
        with torch.device("meta"):
            adapters.add(model, settings.lora)
    return model.eval()  # no dropout, as in training; autograd works all the same


def shape(config: Any, settings: ModelConfig) -> Shape:
    """Counts of a Hugging Face config, from the model built on the meta device.

    Args:
        config: a ``PreTrainedConfig`` of a causal language model.
        settings: for adapters.

    Raises:
        InputError: no causal language model, or none with transformer blocks.
    """
    model = _build(config, settings, torch.float32)
    units = blocks(model)
    if not units:
        raise InputError(f"model.path: {type(model).__name__} has no transformer blocks to plan for")
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    trained = [p for p in parameters if p.requires_grad]
    sizes = [sum(p.numel() for p in block.parameters()) for block in units]
    text = config.get_text_config()
    head = model.get_output_embeddings()  # type: ignore[operator]
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    matrices = sum(p.numel() for block in units for p in block.parameters() if p.dim() >= 2)
    return Shape(
        parameters=total,
        trained=sum(p.numel() for p in trained),
        layers=len(units),
        block=max(sizes),
        root=total - sum(sizes),
        products=matrices + head.weight.numel(),
        largest=max(p.numel() for p in trained),
        head_trained=head.weight.requires_grad,
        vocabulary=head.weight.shape[0],
        hidden=text.hidden_size,
        width=heads * head_dim,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        cache=2 * len(units) * (getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        trims=Scorer.of(model).head() is not None,
    )


def saved(config: Any, settings: ModelConfig, tokens: int, cast: bool) -> Saved:
    """What autograd keeps of rows of ``tokens`` tokens, counted by running the model's code on fake tensors.

    Args:
        config: as for :func:`shape`.
        cast: ``bfloat16`` as FSDP has it: weights arrive in bf16; False: autocast over stored weights.

    Raises:
        InputError: the model's code cannot run on fake tensors.
    """
    try:
        one, two = (
            {rows: _kept_bytes(_shallow(config, depth), settings, rows, tokens, cast) for rows in (1, 2)}
            for depth in (1, 2)
        )
    except (RuntimeError, TypeError, AttributeError) as error:
        kind = getattr(config, "model_type", type(config).__name__)
        raise InputError(f"model.path: activations of model type {kind!r} cannot be counted ({error})") from error
    row, row_block = one[2] - one[1], (two[2] - two[1]) - (one[2] - one[1])
    block_fixed = two[1] - one[1] - row_block
    return Saved(block_fixed, row_block, one[1] - row - block_fixed, row - row_block)


def _shallow(config: Any, layers: int) -> Any:
    """``config`` with few layers and few words: a block does not know how many there are."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return small


def _kept_bytes(config: Any, settings: ModelConfig, rows: int, tokens: int, cast: bool) -> int:
    """Bytes of all storages that a forward pass keeps, weights left out."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    autocast = settings.dtype == "bfloat16" and not cast
    model = _build(config, settings, models.weight_dtype(settings))
    with FakeTensorMode():
        _fake(model, torch.bfloat16 if cast else None)
        with _recording(model) as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mask = torch.ones((rows, 1, tokens, tokens), dtype=torch.bool)  # as rows of unequal length get it
            ids = torch.zeros((rows, tokens), dtype=torch.int64)
            out = model(input_ids=ids, attention_mask=mask, use_cache=False)
        del out
    return sum(kept.values())


def _fake(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give parameters and buffers of a model on the meta device fake memory on the CPU, where kernels choose as they
    do with real tensors; tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in made:
                made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=dtype or p.dtype), requires_grad=p.requires_grad)
            module._parameters[name] = made[id(p)] if p is not None else None
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


@contextlib.contextmanager
def _recording(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps, by the storage's identity."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # an identity must not be used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
