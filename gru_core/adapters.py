"""Low-rank adapters (LoRA, arXiv 2106.09685) through ``peft``: put in, switch off, save, merge.

Adapters are injected into the model in place: its class, its forward and its block structure stay what they are, so
that sharding and evaluation need to know nothing of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gru_core.config import LoraConfig
from gru_core.errors import InputError

_NAME = "default"
_MARK = ".lora_"


def add(model: Any, config: LoraConfig) -> None:
    """Freeze ``model`` and give its linear layers adapters, in float32 at least; nothing changes in what it computes.

    Call :func:`initialise` (or load weights) before use: the adapters' values are whatever ``peft`` drew.

    Raises:
        InputError: a name in ``model.lora.targets`` that no layer has, or a model without linear layers.
    """
    from peft import LoraConfig as PeftConfig

    targets = _targets(model, config.targets)
    try:
        with torch.random.fork_rng():
            model.add_adapter(
                PeftConfig(
                    r=config.rank, lora_alpha=config.alpha,  # type: ignore[arg-type]
                    lora_dropout=config.dropout, bias="none",
                    target_modules=targets, task_type="CAUSAL_LM",
                ),
                _NAME,
            )  # fmt: skip
    except ValueError as error:
        raise InputError(f"model.lora.targets: {(str(error).splitlines() or ['refused'])[0]}") from error
    for name, p in model.named_parameters():
        p.requires_grad_(_MARK in name)
        if _MARK in name and p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()


def check(settings: Any, config: LoraConfig) -> None:
    """Refuse adapters that fit no layer, from the model's settings alone.

    Raises:
        InputError: as :func:`add`.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    _targets(model, config.targets)


def _targets(model: Any, wanted: tuple[str, ...]) -> list[str]:
    """Names of the layers to adapt; empty ``wanted``: every linear layer but the output head."""
    from transformers.pytorch_utils import Conv1D  # what GPT-2 calls its linear layers

    head, kinds = model.get_output_embeddings(), (nn.Linear, Conv1D)
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, kinds) and m is not head}
    missing = sorted(set(wanted) - linear)
    if missing:
        raise InputError(f"model.lora.targets: got {missing[0]!r}, allowed: {', '.join(sorted(linear))}")
    if not linear:
        raise InputError("model.lora: the model has no linear layer to adapt")
    return sorted(wanted or linear)


def has(model: nn.Module) -> bool:
    """Whether the model carries adapters."""
    return any(_MARK in name for name, _ in model.named_parameters())


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return _MARK in name


def base_name(name: str) -> str:
    """The name that a frozen parameter has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def initial(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Starting value of one adapter matrix, float32 on the CPU: A uniform as ``nn.Linear`` draws it, B zero.

    It depends on name, shape and seed alone, so that every rank, strategy and restart starts with the same.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    bound = 1 / math.sqrt(shape[1])  # kaiming_uniform_ with a = sqrt(5)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Give every adapter of a model that is not sharded its starting value."""
    for name, p in model.named_parameters():
        if is_adapter(name):
            p.copy_(initial(name, p.shape, seed))


@contextmanager
def switched_off(model: nn.Module) -> Iterator[nn.Module]:
    """The model without what its adapters add: the frozen starting model, at no memory.

    The adapter's output is scaled by 0; switching it off as ``peft`` does would also change ``requires_grad``, which
    DDP and FSDP have taken note of.
    """
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    modes = [(m, m.training) for m in model.modules()]
    for layer in layers:
        layer.set_scale(_NAME, 0.0)
    model.eval()  # the starting model has no dropout, whatever the trained one has
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for layer in layers:
            layer.set_scale(_NAME, 1.0)


@contextmanager
def lent(model: Any, config: LoraConfig, seed: int, device: torch.device) -> Iterator[nn.Module]:
    """A frozen model with new adapters, drawn from ``seed``, on ``device``; its own layers are back afterwards.

    A sharded model gets whole adapters, the same on every rank.
    """
    children = [(module, dict(module._modules)) for module in model.modules()]
    attributes = dict(vars(model))
    add(model, config)
    initialise(model, seed)
    for name, p in model.named_parameters():
        if is_adapter(name):
            p.data = p.data.to(device)
    try:
        yield model
    finally:
        for module, before in children:
            module._modules.update(before)
        for name in vars(model).keys() - attributes.keys():
            delattr(model, name)
        vars(model).update(attributes)


def parts(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (rank, in), B (out, rank) and the factor of a layer with an adapter, which computes with its own weight, as
    (out, in), plus ``factor * B A``."""
    return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight, layer.scaling[_NAME]


def save(model: Any, weights: dict[str, torch.Tensor], base: str, folder: Path) -> None:
    """An adapter folder as ``peft`` reads it: ``PeftModel.from_pretrained(base_model, folder)``.

    Args:
        model: carries the adapters; gives their settings.
        weights: whole adapter tensors by parameter name, on the CPU.
        base: path or hub id of the starting model, noted in the folder.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    settings = model.peft_config[_NAME]
    settings.base_model_name_or_path, settings.inference_mode = base, True
    settings.save_pretrained(str(folder))
    settings.inference_mode = False
    named = {file_name(n): t.contiguous() for n, t in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def file_name(name: str) -> str:
    """The name that ``peft`` gives an adapter parameter in its files."""
    return f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"


def own_name(key: str) -> str:
    """The parameter's name in the model, from the one in a file."""
    return key.removeprefix("base_model.model.").removesuffix(".weight") + f".{_NAME}.weight"


def merged(base: Any, folder: Path) -> Any:
    """``base`` (the starting model, on the CPU) with the adapter in ``folder`` added to its weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
