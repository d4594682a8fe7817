"""What a checkpoint's files hold, and how they come back into a model that may be laid out differently.

Tensors are known by the parameter they belong to: ``NAME`` its weight, ``optimizer.NAME.exp_avg`` a moment,
``ema.NAME`` the moving average. A replicated model is three safetensors files from rank 0; a sharded one goes through
``torch.distributed.checkpoint`` in its safetensors format, each rank writing its own file (its default format would
have to be unpickled).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from gru_core import adapters
from gru_core.errors import StorageError
from gru_core.parallel import Group, is_sharded, local, unwrap

_WEIGHTS, _ADAPTER = "model.safetensors", "adapter_model.safetensors"


class Held:
    """The tensors of a run by name: the objects themselves, not copies."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, momentum: list[torch.Tensor] | None
    ) -> None:
        self.model: Any = unwrap(model)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        self.momentum = dict(zip(self.trained, momentum, strict=True)) if momentum is not None else {}

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters (tied ones once) and persistent buffers; of a model with adapters, these alone."""
        if adapters.has(self.model):
            return {n: p.detach() for n, p in self.trained.items()}
        from gru_core.sharding import kept_buffers

        named = dict(self.model.named_parameters()) | dict(kept_buffers(self.model))
        return {n: t.detach() for n, t in named.items()}

    def moments(self) -> dict[str, torch.Tensor]:
        """Optimizer state of the size of a parameter, as ``NAME.KIND``."""
        if self.optimizer is None:
            return {}
        state = self.optimizer.state
        return {
            f"{name}.{kind}": value
            for name, p in self.trained.items()
            for kind, value in state.get(p, {}).items()
            if isinstance(value, torch.Tensor) and value.shape == p.shape and kind != "step"
        }

    def optimizer_summary(self) -> dict[str, Any]:
        """What the optimizer keeps besides: kinds of moments, and steps taken."""
        states = list(self.optimizer.state.values()) if self.optimizer is not None else []
        steps = {int(state["step"]) for state in states if "step" in state}
        kinds = sorted({name.rpartition(".")[2] for name in self.moments()})
        return {"kinds": kinds, "steps": max(steps, default=None)}

    def all(self) -> dict[str, torch.Tensor]:
        """Everything under one set of names."""
        return {
            **self.weights(),
            **{f"optimizer.{n}": t for n, t in self.moments().items()},
            **{f"ema.{n}": t for n, t in self.momentum.items()},
        }


def write(folder: Path, held: Held, reference: torch.Tensor | None, group: Group) -> None:
    """This rank's files into ``folder``; call on every rank."""
    if is_sharded(held.model):
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            dcp.save(held.all(), storage_writer=writer, process_group=group.process_group)
        except dcp.api.CheckpointException as error:
            raise OSError(_first(error)) from error
    elif group.rank == 0:
        _write_replicated(folder, held)
    if group.rank == 0:
        held.model.config.save_pretrained(folder)
        if getattr(held.model, "generation_config", None) is not None:
            held.model.generation_config.save_pretrained(folder)
        save_file(_rng_tensors(), folder / "rng.safetensors")
        if reference is not None:
            save_file({"nll": reference}, folder / "reference.safetensors")


def _first(error: Any) -> str:
    """The first rank's reason for a failure of ``torch.distributed.checkpoint``, without the traceback."""
    inner = next(iter(error.failures.values()), None) if getattr(error, "failures", None) else None
    cause = inner[0] if isinstance(inner, tuple) else inner
    return (str(cause or error) or type(error).__name__).splitlines()[0]


def _write_replicated(folder: Path, held: Held) -> None:
    weights = {n: t.cpu().contiguous() for n, t in held.weights().items()}
    if adapters.has(held.model):
        adapters.save(held.model, weights, str(held.model.name_or_path), folder)
    else:
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    save_file({n: t.contiguous() for n, t in held.moments().items()}, folder / "optimizer.safetensors")
    if held.momentum:
        save_file({n: m.contiguous() for n, m in held.momentum.items()}, folder / "ema.safetensors")


def read(
    folder: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, group: Group
) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
    """Fill model, optimizer and generators; give back moving average and reference losses."""
    held = Held(model, optimizer, None)
    stored = set(_keys(folder))
    _same_model(folder, held, stored)
    _make_moments(held, state["optimizer"])
    averaged = any(key.startswith("ema.") for key in stored)
    momentum = [torch.zeros_like(p.detach()) for p in held.trained.values()] if averaged else None
    held = Held(model, optimizer, momentum)
    fill(folder, held.all(), group)
    reference = folder / "reference.safetensors"
    known = load_file(reference)["nll"] if reference.exists() else None
    _restore_rng(load_file(folder / "rng.safetensors"))
    return momentum, known


def _same_model(folder: Path, held: Held, stored: set[str]) -> None:
    weights = {key for key in stored if not key.startswith(("optimizer.", "ema."))}
    if weights != held.weights().keys():
        raise StorageError(f"checkpoint {folder} belongs to another model")


def _make_moments(held: Held, summary: dict[str, Any]) -> None:
    """Room for the optimizer's state, as the optimizer itself would make it at its first step."""
    assert held.optimizer is not None
    for p in held.trained.values():
        state: dict[str, Any] = {kind: torch.zeros_like(p.detach()) for kind in summary["kinds"]}
        if summary["steps"] is not None:
            state["step"] = torch.tensor(float(summary["steps"]), device=p.device)
        if state:
            held.optimizer.state[p] = state


@torch.no_grad()
def fill(folder: Path, targets: dict[str, torch.Tensor], group: Group | None) -> None:
    """Copy a checkpoint's tensors into ``targets``, whole or sharded, wherever they were written from.

    Args:
        group: the ranks that call this together; None: this process alone.

    Raises:
        StorageError: a tensor is not there, or has another shape.
    """
    if list(folder.glob("shard-*.safetensors")):
        reader = HuggingFaceStorageReader(str(folder))
        alone = group is None or group.size == 1
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant, where alone
                dcp.load(
                dict(targets), storage_reader=reader, no_dist=alone,
                process_group=group.process_group if group and not alone else None,
            )  # fmt: skip
        except (dcp.api.CheckpointException, ValueError) as error:
            raise StorageError(f"checkpoint {folder} belongs to another model: {_first(error)}") from error
        return
    from gru_core.sharding import own_rows

    left = dict(targets)
    for key, piece, shape in _pieces(folder):
        if key not in left:
            continue
        target = left.pop(key)
        if list(target.shape) != shape:
            raise StorageError(f"checkpoint {folder} belongs to another model")
        mine = local(target)
        if mine.numel():
            rows = own_rows(target, group or Group()) if mine.dim() else None
            mine.copy_(piece[rows] if rows is not None else piece[...])
    if left:
        raise StorageError(f"checkpoint {folder} lacks the tensor {min(left)!r}")


def _pieces(folder: Path) -> Iterator[tuple[str, Any, list[int]]]:
    """Name, sliceable content and shape of every tensor of a replicated checkpoint."""
    prefixes = {_WEIGHTS: "", _ADAPTER: "", "optimizer.safetensors": "optimizer.", "ema.safetensors": "ema."}
    for name, prefix in prefixes.items():
        if not (folder / name).exists():
            continue
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a file is no mapping)
                piece = file.get_slice(key)
                shown = adapters.own_name(key) if name == _ADAPTER else key
                yield prefix + shown, piece, piece.get_shape()


def _keys(folder: Path) -> Iterator[str]:
    shards = sorted(folder.glob("shard-*.safetensors"))
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            yield from file.keys()
    if not shards:
        yield from (key for key, _, _ in _pieces(folder))


# ---------------------------------------------------------------------------------------------- generators


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
