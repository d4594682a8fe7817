"""Checkpoints: plain directories of safetensors and JSON, written whole or not at all.

    step-00000020/
        config.json                       the model's settings
        model.safetensors                 weights, readable by transformers; adapter_model.safetensors under LoRA
        optimizer.safetensors             AdamW's moments, by parameter name
        ema.safetensors                   the retain gradient's moving average, where there is one
        shard-*.safetensors               in place of the three above under FSDP2: one file from each rank
        rng.safetensors                   torch (CPU, CUDA), NumPy and Python generator states
        reference.safetensors             the starting model's losses, where the objective needs them
        state.json                        step (which is also the data position), drift, and of all other files
                                          size and checksum

A directory is written under another name and renamed. ``state.json`` tells a truncated file or a flipped byte, and
the checkpoint before it is used. What is in the files: :mod:`gru_core.checkpoint_tensors`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from gru_core import checkpoint_tensors as tensors
from gru_core.errors import StorageError
from gru_core.parallel import Group, is_sharded

_KEEP = 2
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, besides weights and optimizer state, which load straight into their objects."""

    folder: Path
    step: int
    state: dict[str, Any]


# ------------------------------------------------------------------------------------------------ finding


def latest(folder: Path, damaged: list[str] | None = None, *, verify: bool = True) -> Checkpoint | None:
    """The newest whole checkpoint under ``folder``; a damaged one is passed over.

    Args:
        damaged: gets one line for each that is passed over, with what is wrong with it.
        verify: also compare checksums, which reads every file; without it, names and sizes alone.
    """
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        found, fault = _examine(candidate, verify)
        if found is not None:
            return found
        if damaged is not None:
            damaged.append(f"checkpoint {candidate} is damaged ({fault}) and is passed over")
    return None


def read(folder: Path, *, verify: bool = True) -> Checkpoint | None:
    """The checkpoint in ``folder``, or None where it is damaged."""
    return _examine(folder, verify)[0]


def _examine(folder: Path, verify: bool) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or what is wrong with it."""
    try:
        state = json.loads((folder / _STATE).read_text())
        if state.pop("checksum") != _state_checksum(state):
            return None, f"{_STATE} has another checksum"
        files = dict(state["files"])
        found = Checkpoint(folder, int(state["step"]), state)
    except (OSError, ValueError, KeyError, TypeError):
        return None, f"{_STATE} cannot be read"
    there = {file.name for file in folder.glob("*.safetensors")}
    if there - files.keys():  # it would be loaded, and nobody vouches for it
        return None, f"{min(there - files.keys())} does not belong to it"
    for name, known in files.items():
        fault = _fault(folder / name, name, known, verify)
        if fault:
            return None, f"{name} {fault}"
    return found, ""


def _fault(file: Path, name: str, known: dict[str, int], verify: bool) -> str:
    if Path(name).name != name or file.is_symlink():
        return "is not a file of this folder"
    try:
        if file.stat().st_size != known["size"]:
            return f"has {file.stat().st_size} bytes, not {known['size']}"
        if verify and _checksum(file) != known["crc32"]:
            return "has another checksum"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value


def _state_checksum(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


# ----------------------------------------------------------------------------------------------- writing


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    momentum: list[torch.Tensor] | None,
    state: dict[str, Any],
    reference: torch.Tensor | None = None,
    group: Group | None = None,
) -> Path:
    """Write ``folder/step-NNNNNNNN`` and drop all but the last two. Call on every rank.

    Rank 0 writes all of it; of a sharded model every rank writes its own part.

    Raises:
        StorageError: the disk is full or gone, on every rank; names the last whole checkpoint, which is left alone.
    """
    group = group or Group()
    held = tensors.Held(model, optimizer, momentum)
    numbers = {"optimizer": held.optimizer_summary(), "sharded": is_sharded(model), "ranks": group.size}
    writing = _Writing(folder, step, group)
    try:
        _together(writing.clear, group)
        parts = _together(lambda: writing.write(held, reference), group)
        files = {name: facts for part in parts for name, facts in part.items()}
        _together(lambda: writing.finish(state | numbers | {"step": step, "files": files}), group)
        _together(writing.follow, group)
    except StorageError as error:
        shutil.rmtree(writing.part, ignore_errors=True)
        last = latest(folder, verify=False)
        kept = f"the last whole checkpoint is {last.folder}" if last else "there is no earlier checkpoint"
        raise StorageError(f"cannot write checkpoint {writing.target}: {error}; {kept}") from error
    if group.rank == 0 or not (writing.target / _STATE).exists():
        for old in sorted(folder.glob("step-*"))[:-_KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    return writing.target


class _Writing:
    """The stages of one checkpoint on one rank; no rank begins a stage before all have ended the one before.

    Machines may share the folder, or each have one of its own, which then holds its ranks' files alone.
    """

    def __init__(self, folder: Path, step: int, group: Group) -> None:
        self.folder, self.group = folder, group
        self.target, self.part = folder / f"step-{step:08d}", folder / f".part-{step:08d}"

    def clear(self) -> None:
        if self.group.rank == 0:
            shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True, exist_ok=True)

    def write(self, held: tensors.Held, reference: torch.Tensor | None) -> dict[str, dict[str, int]]:
        """This rank's files; gives size and checksum of each."""
        self.part.mkdir(parents=True, exist_ok=True)  # rank 0 may have cleared it last
        for stale in self.part.iterdir():
            if _written_by(stale.name, self.group):
                stale.unlink()
        tensors.write(self.part, held, reference, self.group)
        mine = [f for f in sorted(self.part.iterdir()) if _written_by(f.name, self.group)]
        for file in mine:
            open_up(file)
            _sync(file)
        return {f.name: {"size": f.stat().st_size, "crc32": _checksum(f)} for f in mine}

    def finish(self, state: dict[str, Any]) -> None:
        """Rank 0 makes the checkpoint whole."""
        if self.group.rank == 0:
            (self.part / _STATE).write_text(json.dumps(state | {"checksum": _state_checksum(state)}))
            _sync(self.part / _STATE)
            shutil.rmtree(self.target, ignore_errors=True)
            self.part.rename(self.target)
            _sync(self.folder)

    def follow(self) -> None:
        """The same for a folder that rank 0 does not see."""
        if self.part.exists():
            shutil.rmtree(self.target, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # another rank of this machine was faster
                self.part.rename(self.target)


def _written_by(name: str, group: Group) -> bool:
    """Whether a file in the folder is this rank's: its shard, and on rank 0 all that is no shard."""
    if name.startswith("."):  # see open_up
        return False
    if name.startswith("shard-"):
        return int(name.split("-")[1]) == group.rank + 1
    return group.rank == 0


def _together(work: Callable[[], Any], group: Group) -> list[Any]:
    """``work`` on every rank, and its results; an error on one is an error on all, so that none is left waiting."""
    result, fault = None, ""
    try:
        result = work()
    except (OSError, SafetensorError) as error:
        fault = str(error) or type(error).__name__
    parts = group.gather((result, fault))
    for _, fault in parts:
        if fault:
            raise StorageError(fault)
    return [result for result, _ in parts]


def named(error: StorageError, folder: Path) -> StorageError:
    """The error, naming the last whole checkpoint; one from writing a checkpoint does that already."""
    if "last whole checkpoint" in str(error) or "no earlier checkpoint" in str(error):
        return error
    last = latest(folder)
    return StorageError(f"{error}; the last whole checkpoint is {last.folder if last else 'none'}")


def open_up(file: Path) -> None:
    """Give ``file`` the mode that other new files in its folder get: safetensors makes its own for the owner alone."""
    made = file.with_name(f".mode-{os.getpid()}")
    made.touch()
    file.chmod(made.stat().st_mode)
    made.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------- loading


def load(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: Group | None = None,
) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
    """Put weights, optimizer state and RNG states back; the model may be spread over another number of ranks, or not
    at all. Call on every rank.

    Returns:
        EMA buffer and reference losses, each None where the run has none.

    Raises:
        StorageError: the checkpoint does not belong to this model.
    """
    group = group or Group()
    try:
        return tensors.read(checkpoint.folder, checkpoint.state, model, optimizer, group)
    except (KeyError, OSError, SafetensorError) as error:
        raise StorageError(f"checkpoint {checkpoint.folder} cannot be loaded: {error}") from error
