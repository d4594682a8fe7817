"""FSDP2: weights, gradients, moving average and optimizer state spread over the ranks, block by block.

A model is built without storage (parameters on the meta device), sharded, and then filled: each rank reads from the
safetensors files the rows of every tensor that are its own, and never holds another's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gru_core import adapters, models
from gru_core.blocks import blocks, checkpoint_activations
from gru_core.config import ModelConfig, TrainConfig
from gru_core.parallel import Group, local
from gru_core.weight_files import WeightFiles


def shard(model: nn.Module, model_config: ModelConfig, train: TrainConfig, group: Group) -> None:
    """Spread ``model`` over the ranks, in place. Gradients are reduced in float32.

    ``bfloat16`` gathers and computes in bf16 over float32 shards.
    """
    ranks: Any = group.process_group or dist.group.WORLD
    mesh = DeviceMesh.from_group(ranks, group.device.type)
    half = models.compute_dtype(model_config) == torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None
    on_gpu = group.device.type == "cuda"
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy or MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if train.cpu_offload else OffloadPolicy(),
    }
    for block in blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def load(
    path: str, model_config: ModelConfig, train: TrainConfig, group: Group, seed: int = 0, what: str = "model.path"
) -> nn.Module:
    """A causal LM from a folder or the hub, each rank with its shards alone; call on every rank.

    Args:
        model_config: with ``lora``, the model gets adapters, drawn from ``seed``.

    Raises:
        InputError: the model cannot be read, or its files name tensors in another way than the model does.
    """
    folder = models.local_folder(path, what)
    model = _empty(folder, model_config, what)
    files = WeightFiles(folder, model, f"{what}: {path!r}")
    if model_config.lora is not None:
        adapters.add(model, model_config.lora)
    if train.activation_checkpointing:
        checkpoint_activations(model)
    shard(model, model_config, train, group)
    host = torch.device("cpu")
    _materialise(model, host if train.cpu_offload else group.device, group.device)
    _fill(model, files, seed, group)
    return model


def _empty(folder: Path, config: ModelConfig, what: str) -> Any:
    """The model with parameters that have no storage; its buffers, which no file holds, are computed."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    settings = models.load_settings(str(folder), what)
    with _no_storage(), torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(settings, dtype=models.weight_dtype(config))
    if (folder / "generation_config.json").is_file():  # its end-of-turn tokens end a generation
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    model.name_or_path = str(folder)
    return model


@contextmanager
def _no_storage() -> Iterator[None]:
    """Parameters go to the meta device as they are registered; nothing is written to them, so no memory is touched."""
    original: Any = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None and not param.is_meta:  # a tied one is there already, and stays tied
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _materialise(model: nn.Module, home: torch.device, device: torch.device) -> None:
    """Storage for every shard on ``home``, tied parameters once; buffers to ``device``, where the model computes."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or not p.is_meta:
                continue
            if id(p) not in made:
                made[id(p)] = nn.Parameter(torch.empty_like(p, device=home), requires_grad=p.requires_grad)
            module._parameters[name] = made[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


@torch.no_grad()
def _fill(model: Any, files: WeightFiles, seed: int, group: Group) -> None:
    """This rank's rows of every parameter; adapters from ``seed``; buffers that the files hold."""
    for name, p in model.named_parameters():
        mine = local(p)
        rows = own_rows(p, group) if p.dim() else ...
        if adapters.is_adapter(name):
            mine.copy_(adapters.initial(name, p.shape, seed)[rows])
            continue
        piece = files.piece(adapters.base_name(name), list(p.shape))
        if mine.numel():
            mine.copy_(piece[rows])
    for name, buffer in kept_buffers(model):
        if name in files:  # some models add one later: it then has the value that the model starts with
            buffer.copy_(files.piece(name, list(buffer.shape))[...])


def kept_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that belong to the model's state."""
    kept = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def own_rows(p: torch.Tensor, group: Group) -> slice:
    """The rows (of dimension 0) of a sharded parameter that this rank holds; all where it is whole."""
    if not isinstance(p, DTensor):
        return slice(0, p.shape[0])
    each = -(-p.shape[0] // group.size)  # as torch.chunk cuts
    start = min(group.rank * each, p.shape[0])
    stop = min(start + each, p.shape[0])
    assert stop - start == local(p).shape[0], "another sharding than by rows"
    return slice(start, stop)


def whole(model: nn.Module, names: set[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole parameters, and buffers of the state, on the CPU, one at a time; every rank must go through all of them.

    Args:
        names: only these; None: all.
    """
    for name, p in model.named_parameters():
        if names is None or name in names:
            yield name, gathered(p.detach()).cpu()
    for name, buffer in kept_buffers(model):
        if names is None:
            yield name, buffer.cpu()


def gathered(p: torch.Tensor) -> torch.Tensor:
    """The whole tensor; shards that rest in host memory go to the device first, where the collective is."""
    if not isinstance(p, DTensor):
        return p
    placed: Any = p.to(p.device_mesh.device_type)
    return placed.full_tensor()
