"""Quantisation: a matrix by hand, numpy, the libraries themselves, and a model that is the same afterwards."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gru_core import adapters
from gru_core.blocks import blocks
from gru_core.config import LoraConfig, QuantiseConfig
from gru_core.errors import ConfigError, InputError
from gru_core.metrics import check_metrics
from gru_core.metrics.quantise import METHODS, layers, quantised, round_trip
from gru_core.parallel import Group
from tests import robust
from tests.robust import measured

BOTH = QuantiseConfig(bits=(4, 8), group_size=8)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return robust.train(robust.model(), robust.rows(), 25)


def test_a_matrix_by_hand() -> None:
    """4 bits: codes up to 7. First row: scale 1, 2.4 -> 2, -3.6 -> -4; second: scale 0.5; third: nothing at all."""
    weight = torch.tensor([[7.0, 2.4, -3.6, 0.4], [-3.5, 0.7, 1.3, 3.4], [0.0, 0.0, 0.0, 0.0]])
    wanted = torch.tensor([[7.0, 2.0, -4.0, 0.0], [-3.5, 0.5, 1.5, 3.5], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(round_trip(weight, 4), wanted)
    assert torch.equal(round_trip(weight, 4, 128), wanted), "a group is no longer than a row"
    by_two = torch.tensor([[7.0, 2.0, -3.6, 3.6 / 7], [-3.5, 0.5, 3.4 * 3 / 7, 3.4], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(round_trip(weight, 4, 2), by_two, atol=1e-6)
    by_three = round_trip(weight, 4, 3)  # the last group holds one weight, its own largest
    assert torch.allclose(by_three[:, 3], weight[:, 3])
    assert torch.equal(by_three[:, :3], torch.cat([wanted[:1, :3], torch.tensor([[-3.5, 0.5, 1.5]]), wanted[2:, :3]]))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 16, 48])
def test_against_numpy(bits: int, group: int | None) -> None:
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    size = group or 48
    out = np.empty((24, 48))
    for row, source in enumerate(weight.numpy()):
        for start in range(0, 48, size):
            part = source[start : start + size]
            scale = np.max(np.abs(part)) / (2 ** (bits - 1) - 1)
            out[row, start : start + size] = scale * np.rint(part / scale)
    assert np.allclose(round_trip(weight, bits, group).numpy(), out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1.0, 1e15, 1e38])
def test_any_scale_stays_near_and_finite(scale: float) -> None:
    weight = scale * torch.linspace(-1, 1, 40).reshape(4, 10)
    for bits in (4, 8):
        error = (round_trip(weight, bits, 5) - weight).abs().max()
        assert error <= 0.51 * weight.abs().max() / (2 ** (bits - 1) - 1) + 1e-44


def weights_of(model: nn.Module, config: QuantiseConfig, bits: int) -> dict[str, torch.Tensor]:
    with quantised(model, config, bits, Group()):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_blocks_linear_layers_are_rounded_and_nothing_else(net: nn.Module) -> None:
    found, start = weights_of(net, BOTH, 4), dict(net.named_parameters())
    for name, p in start.items():
        linear = name.startswith("model.layers.") and name.endswith("_proj.weight")
        wanted = round_trip(p.detach(), 4, 8) if linear else p
        assert torch.equal(found[name], wanted), name
        assert linear == (not torch.equal(found[name], p)), name
    assert len(layers(net)) == 14
    assert {id(layer.base) for layer in layers(net)} <= {id(m) for b in blocks(net) for m in b.modules()}


def test_scores_are_those_of_the_rounded_model(net: nn.Module) -> None:
    settings = robust.config("quantise", quantise=BOTH)
    scores = measured(net, settings).scores
    for bits in (8, 4):
        other = copy.deepcopy(net)
        with torch.no_grad():
            for p, value in zip(other.parameters(), weights_of(net, BOTH, bits).values(), strict=True):
                p.copy_(value)
        wanted = measured(other, robust.config("forget_probability", "retain_probability")).scores
        assert scores[f"quantise/{bits}_bit"] == wanted["forget_probability"]
        assert scores[f"quantise/{bits}_bit_retention"] == wanted["retain_probability"]
    assert scores["quantise"] == scores["quantise/4_bit"]
    plain = scores["forget_probability"]
    assert 0 < abs(scores["quantise/8_bit"] - plain) < abs(scores["quantise/4_bit"] - plain)


@pytest.mark.parametrize("lora", [False, True])
def test_the_model_is_as_before(net: nn.Module, lora: bool) -> None:
    model = copy.deepcopy(net).train()
    if lora:
        adapters.add(model, LoraConfig(rank=2))
        adapters.initialise(model, 1)
    for p in model.parameters():
        p.grad = torch.rand_like(p) if p.requires_grad else None
    before = robust.state(model)
    measured(model, robust.config("quantise", quantise=BOTH))
    assert robust.same(robust.state(model), before)
    with pytest.raises(RuntimeError, match="halfway"), quantised(model, BOTH, 4, Group()):
        raise RuntimeError("halfway")
    assert robust.same(robust.state(model), before)


def test_adapters_are_rounded_with_what_they_add_to(net: nn.Module) -> None:
    """As peft merges them; a model whose adapters stay beside rounded weights scores differently."""
    model = copy.deepcopy(net)
    adapters.add(model, LoraConfig(rank=2))
    for n, p in model.named_parameters():
        if adapters.is_adapter(n):
            p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
    merged = copy.deepcopy(model)
    from peft.tuners.lora import LoraLayer

    for _, module in list(merged.named_modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, LoraLayer):
                layer.merge()  # type: ignore[operator]
                setattr(module, child, layer.base_layer)
    settings = robust.config("quantise", quantise=BOTH)
    found, wanted = measured(model, settings).scores, measured(merged, settings).scores
    assert found == pytest.approx(wanted, rel=1e-4)
    assert abs(found["quantise"] - measured(net, settings).scores["quantise"]) > 1e-3, "the adapters were lost"


def test_layers_that_are_stored_the_other_way_round() -> None:
    """GPT-2 keeps (inputs, outputs): the scale is still one of an output channel."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=40, n_embd=16, n_layer=1, n_head=2))
    per_channel = QuantiseConfig(group_size=None)
    name = "transformer.h.0.mlp.c_fc.weight"
    start = dict(model.named_parameters())[name].detach()
    assert torch.equal(weights_of(model, per_channel, 4)[name], round_trip(start.T, 4).T)
    assert len(layers(model)) == 4


def test_weights_in_no_linear_layer_are_refused() -> None:
    """Fused experts would stay whole, and the score would say that nothing comes back."""
    model = robust.model()
    blocks(model)[0].register_parameter("experts", nn.Parameter(torch.zeros(2, 3, 4)))
    with pytest.raises(InputError, match="'experts' is in no linear layer"):
        layers(model)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_a_library_that_is_not_there_is_refused(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gru_core.metrics.quantise.find_spec", lambda name: None)
    settings = robust.config("quantise", quantise=QuantiseConfig(method=method))
    with pytest.raises(InputError, match=f"evaluate.quantise.method: {method} is not installed .pip install {method}"):
        check_metrics(settings, True, None)


def test_bad_settings_are_refused() -> None:
    for bits in ((), (4, 4), (1,), (16,)):
        with pytest.raises(ConfigError, match=r"evaluate.quantise.bits"):
            QuantiseConfig(bits=bits)
    with pytest.raises(ConfigError, match="each at most once of 4, 8 with method torchao"):
        QuantiseConfig(bits=(6,), method="torchao")
    with pytest.raises(ConfigError, match=r"evaluate.quantise.group_size: got 100, allowed: null, 64, 128"):
        QuantiseConfig(method="bitsandbytes", group_size=100)
    with pytest.raises(ConfigError, match=r"evaluate.quantise.method: got 'gptq'"):
        QuantiseConfig(method="gptq")  # type: ignore[arg-type]


# --- the libraries, where they are installed ---------------------------------------------------------------


def installed(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@installed("torchao")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 8, 20])
def test_torchao_rounds_between_both_ends(bits: int, group: int | None) -> None:
    """Its integers, by hand: scale ``max |w| / ((2^bits - 1) / 2)``, codes -2^(bits-1) to 2^(bits-1) - 1. The largest
    weight itself lies half-way between two codes: either will do."""
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    size, ends = group or 24, 2 ** (bits - 1)
    found = METHODS["torchao"](weight, bits, group)
    for part, got in zip(weight.split(size, dim=1), found.split(size, dim=1), strict=True):
        largest = part.abs().amax(1, keepdim=True)
        scale = largest / ((2**bits - 1) / 2)
        wanted = (part / scale).round().clamp(-ends, ends - 1) * scale
        apart = (got - wanted).abs()
        assert (apart < 1e-6)[part.abs() < largest].all()
        assert (apart < 1.001 * scale).all()


@installed("bitsandbytes")
@pytest.mark.parametrize("group", [None, 128])
def test_bitsandbytes_takes_the_nearest_of_its_codes(group: int | None) -> None:
    from bitsandbytes import functional

    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    codes = functional.get_4bit_type("nf4", device="cpu") if hasattr(functional, "get_4bit_type") else None
    assert codes is not None
    blocks_BS = weight.reshape(-1, group or 64)
    scale_B1 = blocks_BS.abs().amax(1, keepdim=True)
    nearest = (blocks_BS[..., None] / scale_B1[..., None] - codes).abs().argmin(-1)
    wanted = (codes[nearest] * scale_B1).reshape(weight.shape)
    assert torch.allclose(METHODS["bitsandbytes"](weight, 4, group), wanted, atol=1e-5)
    eight = METHODS["bitsandbytes"](weight, 8, group)
    assert 0 < (eight - weight).abs().max() < 0.03 * weight.abs().max()


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_a_whole_model_through_a_library(net: nn.Module, method: Any) -> None:
    if importlib.util.find_spec(method) is None:
        pytest.skip(f"{method} is not installed")
    model = copy.deepcopy(net)
    before = robust.state(model)
    scores = measured(model, robust.config("quantise", quantise=QuantiseConfig(method=method))).scores
    assert robust.same(robust.state(model), before)
    plain = scores["forget_probability"]
    assert abs(scores["quantise/8_bit"] - plain) < abs(scores["quantise/4_bit"] - plain)
