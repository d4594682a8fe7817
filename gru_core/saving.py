"""A trained model as a Hugging Face folder: whole weights, or an adapter, and the model that it is merged into."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gru_core import adapters, checkpoint_tensors, models, sharding
from gru_core.checkpoint import Checkpoint, open_up
from gru_core.config import ModelConfig
from gru_core.parallel import Group, is_sharded, unwrap


def save(model: nn.Module, tokenizer: Any, base: str, folder: Path, group: Group) -> None:
    """Write ``folder`` whole or not at all; call on every rank, rank 0 writes.

    A sharded model is gathered tensor by tensor into rank 0's host memory, which must hold it once.

    Args:
        base: path or hub id of the starting model, which an adapter names.
    """
    net: Any = unwrap(model)
    adapted = adapters.has(net)
    names = {n for n, p in net.named_parameters() if adapters.is_adapter(n)} if adapted else None
    gathered: dict[str, torch.Tensor] = {}
    if is_sharded(net) or adapted:
        for name, tensor in sharding.whole(net, names):
            if group.rank == 0:
                gathered[name] = tensor
    if group.rank != 0:
        return
    part = folder.with_name(f".{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    if adapted:
        adapters.save(net, gathered, base, part)
    else:
        net.save_pretrained(part, state_dict=gathered or None)
    tokenizer.save_pretrained(part)
    _publish(part, folder)


def _publish(part: Path, folder: Path) -> None:
    """``part`` under its name, readable as other new files are."""
    for file in part.glob("*.safetensors"):
        open_up(file)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def save_merged(adapter: Path, tokenizer: Any, config: ModelConfig, folder: Path) -> None:
    """The starting model with the adapter in ``adapter`` added to its weights, in float32, as a folder of its own.

    Raises:
        InputError: the starting model cannot be read.
    """
    part = folder.with_name(f".{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    precise = replace(config, lora=None, dtype="float32")  # bf16 would round most of a small adapter away
    models.save_model(adapters.merged(models.load_model(config.path, precise), adapter), tokenizer, part)
    _publish(part, folder)


def restore(checkpoint: Checkpoint, config: ModelConfig) -> Any:
    """The model of a checkpoint, whole, on the CPU, in this process alone, however many ranks wrote it.

    Raises:
        InputError: the starting model, which an adapter needs, cannot be read.
        StorageError: the checkpoint does not belong to the model.
    """
    if config.lora is not None:
        model: Any = models.load_model(config.path, config)
        adapters.add(model, config.lora)
    else:
        from transformers import AutoModelForCausalLM

        settings = models.load_settings(str(checkpoint.folder), "checkpoint")
        with torch.random.fork_rng():
            model = AutoModelForCausalLM.from_config(settings, dtype=models.weight_dtype(config))
        _generation(model, checkpoint.folder)
    checkpoint_tensors.fill(checkpoint.folder, checkpoint_tensors.Held(model, None, None).weights(), None)
    return model


def _generation(model: Any, folder: Path) -> None:
    """The generation settings in ``folder``, such as tokens that end a turn, where there are any."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
