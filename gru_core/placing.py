"""A model where it trains: adapters, activation checkpointing, device, strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from gru_core import adapters, models, sharding
from gru_core.blocks import checkpoint_activations
from gru_core.config import ModelConfig, TrainConfig
from gru_core.errors import InputError
from gru_core.losses import Frozen
from gru_core.parallel import Group, unwrap, wrap

Start = Callable[[], nn.Module] | str
"""A whole starting model on the CPU, or the path that each rank reads its own part from."""


def place(start: Start, model: ModelConfig, train: TrainConfig, group: Group, what: str = "model.path") -> nn.Module:
    """The model to train, on every rank: with adapters where ``model.lora`` asks for them, under DDP or FSDP2.

    Raises:
        InputError: the model cannot be read, or adapters fit no layer of it.
    """
    if train.strategy == "fsdp":
        return sharding.load(_path(start, what), model, train, group, train.seed, what)
    net = _whole(start, model, what)
    if model.lora is not None:
        net.name_or_path = model.path  # type: ignore[assignment]
        adapters.add(net, model.lora)
        adapters.initialise(net, train.seed)
    if train.activation_checkpointing:
        checkpoint_activations(net)
    return wrap(net.to(group.device), group)


def place_frozen(
    start: Start, model: ModelConfig, train: TrainConfig, group: Group, what: str = "model.path"
) -> nn.Module:
    """A model to evaluate or to compare with, spread as the trained one is; no gradients."""
    if train.strategy == "fsdp":
        net = sharding.load(_path(start, what), replace(model, lora=None), train, group, what=what)
    else:
        net = _whole(start, model, what)
        if train.activation_checkpointing:  # a metric may train it for a while
            checkpoint_activations(net)
        net = net.to(group.device)
    net.eval().requires_grad_(False)
    return net


def frozen(trained: nn.Module, start: Start, model: ModelConfig, train: TrainConfig, group: Group) -> Frozen:
    """The starting model for retain losses that compare with it: the trained one with its adapters switched off, or a
    second copy where there are none."""
    if model.lora is not None:
        return lambda: adapters.switched_off(unwrap(trained))
    copy = place_frozen(start, model, train, group)

    @contextmanager
    def held() -> Iterator[nn.Module]:
        yield copy

    return held


def _whole(start: Start, model: ModelConfig, what: str) -> nn.Module:
    return models.load_model(start, model, what) if isinstance(start, str) else start()


def _path(start: Start, what: str) -> str:
    if isinstance(start, str):
        return start
    raise InputError(f"{what}: strategy fsdp reads a model from its folder, each worker its own part")
