"""``gru export``: the model of a run, or of one of its checkpoints, as one Hugging Face folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gru_core import checkpoint, models, saving
from gru_core.checkpoint import Checkpoint
from gru_core.config import RunConfig
from gru_core.errors import InputError
from gru_core.parallel import Group
from pipelines import settings

Say = Callable[[str], None]


def run(run: str, *, to: str | None, step: int | None, merged: bool, say: Say) -> dict[str, Any]:
    """Write the model of a run folder, whichever number of workers wrote it; one process, on the CPU.

    Args:
        to: the new folder; None: ``export`` in the run's.
        step: the checkpoint after that step; None: the finished model, or where there is none the newest checkpoint.
        merged: of a run with adapters, the whole model with its adapter merged in, not the adapter.

    Returns:
        ``{"model", "source", "step", "kind", "bytes"}``; ``step`` is None for a finished model.

    Raises:
        InputError: no run there, no such checkpoint, nothing to merge, or the new folder is not empty.
    """
    folder = Path(run).expanduser()
    config = _config(folder)
    if merged and config.model.lora is None:
        raise InputError(f"--merged: the run in {folder} trained no adapter (model.lora is null)")
    target = Path(to).expanduser() if to else folder / "export"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--output: {target} exists and is not empty (allowed: a new folder)")
    source = _source(folder, step, say)
    target.parent.mkdir(parents=True, exist_ok=True)
    where = source if isinstance(source, Path) else source.folder
    say(f"exporting {where} to {target}")
    _write(source, config, target, merged)
    kind = "model" if config.model.lora is None else "merged model" if merged else "adapter"
    at = None if isinstance(source, Path) else source.step
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return {"model": str(target), "source": str(where), "step": at, "kind": kind, "bytes": size}


def _config(folder: Path) -> RunConfig:
    file = folder / "config.yaml"
    if not file.is_file():
        raise InputError(f"{folder}: no run there (it has no config.yaml); allowed: the output folder of a run")
    return settings.load(str(file))


def _source(folder: Path, step: int | None, say: Say) -> Checkpoint | Path:
    """The finished model's folder, or a whole checkpoint."""
    checkpoints = folder / "checkpoints"
    if step is not None:
        found = checkpoint.read(checkpoints / f"step-{step:08d}")
        if found is None:
            there = ", ".join(str(int(p.name.removeprefix("step-"))) for p in sorted(checkpoints.glob("step-*")))
            raise InputError(f"--step: got {step}, whole checkpoints there: {there or 'none'}")
        return found
    if (folder / "model").is_dir():
        return folder / "model"
    damaged: list[str] = []
    newest = checkpoint.latest(checkpoints, damaged)
    for line in damaged:
        say(f"note: {line}")
    if newest is None:
        raise InputError(f"{folder}: neither a finished model nor a whole checkpoint")
    return newest


def _write(source: Checkpoint | Path, config: RunConfig, target: Path, merged: bool) -> None:
    if isinstance(source, Path) and not merged:
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    tokenizer = models.load_tokenizer(config.model.path)
    if isinstance(source, Path):
        saving.save_merged(source, tokenizer, config.model, target)
        return
    model = saving.restore(source, config.model)
    if not merged:
        saving.save(model, tokenizer, config.model.path, target, Group())
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        adapter = Path(scratch) / "adapter"
        saving.save(model, tokenizer, config.model.path, adapter, Group())
        saving.save_merged(adapter, tokenizer, config.model, target)
