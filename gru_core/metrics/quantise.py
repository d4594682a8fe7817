"""Quantisation: what comes back when the weights are rounded to 8 or 4 bits (arXiv 2410.16454).

The linear layers of the transformer blocks go through their quantised form and back, in place, in the weights' own
type; embeddings, head and norms stay as they are, as deployed formats leave them. A model with adapters is measured as
it ships: adapters added to the weights first. One layer's whole weight at a time is gathered, so that the result does
not depend on how a model is spread; a copy of the rounded weights (of this rank's shards) is kept in host memory.

Shape legend: O output channels, I inputs of a linear layer, G groups of S inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from gru_core import adapters
from gru_core.benchmarks.base import Benchmark
from gru_core.blocks import blocks
from gru_core.config import EvaluateConfig, QuantiseConfig
from gru_core.errors import InputError
from gru_core.metrics.lent import values_kept
from gru_core.metrics.subject import ModelMetric, Subject, row_metrics
from gru_core.parallel import Group, local, reshard, unwrap
from gru_core.sharding import gathered, own_rows


def round_trip(weight_OI: torch.Tensor, bits: int, group_size: int | None = None) -> torch.Tensor:
    """Symmetric rounding to nearest: ``s round(w / s)`` with ``s = max |w| / (2^(bits-1) - 1)`` over a group.

    Absmax quantisation of arXiv 2208.07339, equation 1, for each output channel, or for each ``group_size`` inputs of
    one as in arXiv 2206.01861 (the last group may be shorter).
    """
    weight_OGS = _grouped(weight_OI, group_size)
    top = 2 ** (bits - 1) - 1
    scale_OG1 = weight_OGS.abs().amax(-1, keepdim=True) / top
    codes_OGS = (weight_OGS / scale_OG1.masked_fill(scale_OG1 == 0, 1.0)).round().clamp(-top, top)
    return (codes_OGS * scale_OG1).flatten(1)[:, : weight_OI.shape[1]]


def _grouped(weight_OI: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """(O, G, S), with zeros behind the last inputs: they change no group's largest weight."""
    inputs = weight_OI.shape[1]
    size = min(group_size or inputs, inputs)
    return F.pad(weight_OI, (0, -inputs % size)).unflatten(1, (-1, size))


def _bitsandbytes(weight_OI: torch.Tensor, bits: int, group_size: int | None) -> torch.Tensor:
    """Blockwise 8-bit (arXiv 2110.02861) and NF4 (arXiv 2305.14314); blocks run over the rows' ends."""
    from bitsandbytes import functional

    blocks_of = {} if group_size is None else {"blocksize": group_size}
    if bits == 8:
        codes, state = functional.quantize_blockwise(weight_OI.contiguous(), **blocks_of)
        return functional.dequantize_blockwise(codes, state)
    codes, state = functional.quantize_4bit(weight_OI.contiguous(), quant_type="nf4", **blocks_of)
    return functional.dequantize_4bit(codes, state)


def _torchao(weight_OI: torch.Tensor, bits: int, group_size: int | None) -> torch.Tensor:
    """Weight-only integers, symmetric: codes -2^(bits-1) to 2^(bits-1) - 1, the largest weight between the ends."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    weight_OGS = _grouped(weight_OI, group_size)
    holder = skip_init(nn.Linear, 1, 1, bias=False)  # no random number is drawn
    holder.weight = nn.Parameter(weight_OGS.flatten(1).contiguous(), requires_grad=False)
    kind = getattr(torch, f"int{bits}")
    quantize_(holder, IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerGroup(weight_OGS.shape[2])))
    weight: Any = holder.weight
    return weight.dequantize()[:, : weight_OI.shape[1]]


METHODS: dict[str, Callable[[torch.Tensor, int, int | None], torch.Tensor]] = {
    "round_trip": round_trip,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
}


class Layer(NamedTuple):
    """A linear layer whose weight changes.

    Attributes:
        module: it, or what carries its adapter.
        rounded: whether it stands in a transformer block (an adapter elsewhere is added, and no more).
    """

    module: Any
    rounded: bool

    @property
    def base(self) -> Any:
        return getattr(self.module, "base_layer", self.module)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (I, O), as GPT-2 has it."""
        return not isinstance(self.base, nn.Linear)

    def weight_OI(self) -> torch.Tensor:
        """The whole weight, the adapter's part included, in float32 at least."""
        own = gathered(self.base.weight.detach())
        weight_OI = _precise(own.T if self.transposed else own)
        if self.module is self.base:
            return weight_OI
        a, b, factor = adapters.parts(self.module)
        return weight_OI + factor * (_precise(gathered(b.detach())) @ _precise(gathered(a.detach())))

    def put(self, weight_OI: torch.Tensor, group: Group) -> None:
        """Write this rank's part of a whole weight."""
        whole, weight = weight_OI.T if self.transposed else weight_OI, self.base.weight
        local(weight).copy_(whole[own_rows(weight, group)])


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def layers(model: nn.Module) -> list[Layer]:
    """The layers that change, each weight once.

    Raises:
        InputError: the blocks hold weights that are in no linear layer (fused experts), or no linear layer at all.
    """
    from transformers.pytorch_utils import Conv1D

    inside = {id(module) for block in blocks(model) for module in block.modules()}
    found: dict[int, Layer] = {}
    for name, module in model.named_modules():
        if adapters.is_adapter(name) or name.endswith(".base_layer"):
            continue
        layer = Layer(module, id(module) in inside)
        if isinstance(layer.base, nn.Linear | Conv1D) and (layer.rounded or layer.module is not layer.base):
            found.setdefault(id(layer.base.weight), layer)
    others = [n for block in blocks(model) for n, p in block.named_parameters() if p.dim() > 2]
    if others or not any(layer.rounded for layer in found.values()):
        what = f"{others[0]!r} is in no linear layer" if others else "its blocks have none"
        raise InputError(f"quantise rounds the linear layers of a model's blocks: {what}")
    return list(found.values())


@contextmanager
def quantised(model: nn.Module, config: QuantiseConfig, bits: int, group: Group) -> Iterator[None]:
    """``model`` with weights of ``bits`` bits, adapters added to them before; afterwards as it was, bit for bit."""
    chosen, method = layers(model), METHODS[config.method]
    with values_kept([layer.base.weight for layer in chosen]):
        with torch.no_grad():
            for layer in chosen:
                weight_OI = layer.weight_OI()
                layer.put(method(weight_OI, bits, config.group_size) if layer.rounded else weight_OI, group)
        with adapters.switched_off(model) if adapters.has(model) else nullcontext():
            yield


def _check(config: EvaluateConfig, benchmark: Benchmark | None) -> None:
    del benchmark
    row_metrics(config, "quantise")
    method = config.quantise.method
    if method != "round_trip" and find_spec(method) is None:
        raise InputError(f"evaluate.quantise.method: {method} is not installed (pip install {method}, or: round_trip)")


def _run(subject: Subject) -> dict[str, float]:
    """``quantise/B_bit``: the study's forget metric with weights of B bits, ``quantise/B_bit_retention``: its
    retention metric; ``quantise``: the forget metric at the fewest bits."""
    config, model = subject.config.quantise, unwrap(subject.model)
    forgetting, *retention = row_metrics(subject.config, "quantise")
    reshard(model)
    scores: dict[str, float] = {}
    for bits in sorted(config.bits, reverse=True):
        with quantised(model, config, bits, subject.group):
            found = subject.score([forgetting, *retention])
        scores[f"quantise/{bits}_bit"] = found[forgetting]
        scores |= {f"quantise/{bits}_bit_retention": found[name] for name in retention}
    return {"quantise": scores[f"quantise/{min(config.bits)}_bit"], **scores}


metric = ModelMetric("forget", _run, _check)
