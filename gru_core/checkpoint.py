"""Checkpoints: plain directories of safetensors and JSON, written whole or not at all.

    step-00000020/
        config.json, model.safetensors    weights, readable by transformers
        optimizer.safetensors             AdamW's moments, by parameter number
        ema.safetensors                   the retain gradient's moving average, where there is one
        rng.safetensors                   torch (CPU, CUDA) and NumPy generator states
        reference.safetensors             the starting model's losses, where the objective needs them
        state.json                        step (which is also the data position), drift, sizes of all files

A directory is written under another name and renamed; ``state.json`` lists every file's size, so that a
truncated one is noticed and the checkpoint before it is used.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from gru_core.errors import StorageError
from gru_core.parallel import unwrap

_KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, besides weights and optimizer state, which load straight into their objects."""

    folder: Path
    step: int
    state: dict[str, Any]


def latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint under ``folder``; a damaged one is passed over."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        found = read(candidate)
        if found is not None:
            return found
    return None


def read(folder: Path) -> Checkpoint | None:
    """The checkpoint in ``folder``, or None where it is damaged."""
    try:
        state = json.loads((folder / "state.json").read_text())
        whole = all((folder / name).stat().st_size == size for name, size in state["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return Checkpoint(folder, int(state["step"]), state) if whole else None


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    momentum: list[torch.Tensor] | None,
    state: dict[str, Any],
    reference: torch.Tensor | None = None,
) -> Path:
    """Write ``folder/step-NNNNNNNN`` and drop all but the last two. Call on rank 0 only.

    Raises:
        StorageError: the disk is full or gone; names the last whole checkpoint, which is left alone.
    """
    target, part = folder / f"step-{step:08d}", folder / f".part-{step:08d}"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _write(part, unwrap(model), optimizer, momentum, reference)
        files = {f.name: f.stat().st_size for f in sorted(part.iterdir())}
        (part / "state.json").write_text(json.dumps(state | {"step": step, "files": files}))
        for file in part.iterdir():
            _sync(file)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        last = latest(folder)
        kept = f"the last whole checkpoint is {last.folder}" if last else "there is no earlier checkpoint"
        raise StorageError(f"cannot write checkpoint {target}: {error}; {kept}") from error
    for old in sorted(folder.glob("step-*"))[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters (tied ones once) and persistent buffers by name: the tensors themselves, not copies."""
    kept = model.state_dict().keys()
    named = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in kept}
    return {name: t.detach() for name, t in named.items()}


def _write(
    part: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    momentum: list[torch.Tensor] | None,
    reference: torch.Tensor | None,
) -> None:
    model.config.save_pretrained(part)  # type: ignore[union-attr, operator]
    tensors = {name: t.contiguous() for name, t in weights(model).items()}
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    moments = {
        f"{number}.{name}": torch.as_tensor(value).detach().contiguous()
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    save_file(moments, part / "optimizer.safetensors")
    if momentum is not None:
        save_file({str(i): m.contiguous() for i, m in enumerate(momentum)}, part / "ema.safetensors")
    save_file(_rng_tensors(), part / "rng.safetensors")
    if reference is not None:
        save_file({"nll": reference}, part / "reference.safetensors")


def _rng_tensors() -> dict[str, torch.Tensor]:
    _, keys, position, has_gauss, cached = np.random.get_state()
    python = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_cached": torch.tensor([cached], dtype=torch.float64),
        "python": torch.tensor(python[1], dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def _restore_rng(tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors["torch"])
    position, has_gauss = tensors["numpy_position"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(tensors["numpy_cached"])))
    random.setstate((3, tuple(tensors["python"].tolist()), None))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)


def load(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
    """Put weights, optimizer state and RNG states back.

    Returns:
        EMA buffer and reference losses, each None where the run has none.

    Raises:
        StorageError: the checkpoint does not belong to this model.
    """
    folder, inner = checkpoint.folder, unwrap(model)
    stored = load_file(folder / "model.safetensors", device=str(device))
    own = weights(inner)
    if stored.keys() != own.keys() or any(stored[k].shape != own[k].shape for k in own):
        raise StorageError(f"checkpoint {folder} belongs to another model")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    settings = optimizer.state_dict()
    settings["state"] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors", device=str(device)).items():
        number, name = key.split(".", 1)
        settings["state"].setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict(settings)
    momentum = None
    if (folder / "ema.safetensors").exists():
        tensors = load_file(folder / "ema.safetensors", device=str(device))
        # Cloned: a view into the file has another alignment, and BLAS then adds up in another order.
        momentum = [tensors[str(i)].clone() for i in range(len(tensors))]
    reference = None
    if (folder / "reference.safetensors").exists():
        reference = load_file(folder / "reference.safetensors")["nll"]
    _restore_rng(load_file(folder / "rng.safetensors"))
    return momentum, reference
