"""``gru export``: the model of a run, or of one of its checkpoints, as one Hugging Face folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gru_core import checkpoint, models, saving
from gru_core.checkpoint import Checkpoint
from gru_core.config import RunConfig
from gru_core.errors import InputError
from gru_core.parallel import Group
from pipelines import settings
from pipelines.mirror import CHECKPOINTS, steps
from pipelines.storage import Storage

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Source:
    """What is exported: the finished model's folder (``step`` None), or a whole checkpoint; and where it is kept."""

    held: Checkpoint | Path
    where: str

    @property
    def step(self) -> int | None:
        """The checkpoint's; None for a finished model."""
        return None if isinstance(self.held, Path) else self.held.step


def run(run: str, *, to: str | None, step: int | None, merged: bool, say: Say) -> dict[str, Any]:
    """Write the model of a run, whichever number of workers wrote it; one process, on the CPU.

    Args:
        run: its folder, or its place in shared storage (``s3://bucket/folder``). Of a run in shared storage the
            folder has no checkpoints: they are taken from there.
        to: the new folder, which is there whole or not at all; None: ``export`` in the run's, and of one that was
            named by its storage ``export-NAME`` in the working folder.
        step: the checkpoint after that step; None: the finished model, or where there is none the newest checkpoint.
        merged: of a run with adapters, the whole model with its adapter merged in, not the adapter.

    Returns:
        ``{"model", "source", "step", "kind", "base", "bytes"}``; ``step`` is None for a finished model, ``base``
        names the model that an adapter needs.

    Raises:
        InputError: no run there, no such checkpoint, nothing to merge, or the new folder is not empty.
        StorageError: shared storage does not answer.
    """
    storage = Storage(run) if "://" in run else None
    folder = Path(run).expanduser()
    if storage is not None:
        target = Path(to or f"export-{str(storage).rpartition('/')[2]}")
    else:
        target = Path(to) if to else folder / "export"
    target = target.expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--output: {target} exists and is not empty (allowed: a new folder)")
    with tempfile.TemporaryDirectory(prefix="gru-export-") as scratch:
        config = _stored_config(storage, Path(scratch)) if storage else _config(folder)
        if merged and config.model.lora is None:
            raise InputError(f"--merged: the run in {storage or folder} trained no adapter (model.lora is null)")
        if storage is None and config.output.storage and not _has(folder, step):
            storage = Storage(config.output.storage)
        source = _stored(storage, Path(scratch), step, say) if storage else _source(folder, step, say)
        say(f"exporting {source.where} to {target}")
        with _new(target) as part:
            _write(source.held, config, part, merged)
    kind = "model" if config.model.lora is None else "merged model" if merged else "adapter"
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    base = config.model.path if kind == "adapter" else None
    found = {"model": str(target), "source": source.where, "step": source.step, "kind": kind}
    return found | {"base": base, "bytes": size}


@contextmanager
def _new(target: Path) -> Iterator[Path]:
    """A path beside ``target`` that takes its name when the block is over: a killed export leaves no half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        yield Path(scratch) / "model"
        (Path(scratch) / "model").rename(target)


def _config(folder: Path) -> RunConfig:
    file = folder / "config.yaml"
    if not file.is_file():
        raise InputError(f"{folder}: no run there (it has no config.yaml); allowed: the output folder of a run")
    return settings.load(str(file))


def _stored_config(storage: Storage, scratch: Path) -> RunConfig:
    storage.pull(scratch, ["config.yaml"])
    if not (scratch / "config.yaml").is_file():
        raise InputError(f"{storage}: no run there (it has no config.yaml); allowed: what output.storage names")
    return _config(scratch)


def _has(folder: Path, step: int | None) -> bool:
    """Whether the folder itself has what is asked for."""
    if step is None and (folder / "model").is_dir():
        return True
    return any((folder / CHECKPOINTS).glob("step-*"))


def _source(folder: Path, step: int | None, say: Say) -> _Source:
    checkpoints = folder / CHECKPOINTS
    if step is not None:
        found = checkpoint.read(checkpoints / _name(step))
        if found is None:
            raise _no_such(step, [path.name for path in checkpoints.glob("step-*")])
        return _Source(found, str(found.folder))
    if (folder / "model").is_dir():
        return _Source(folder / "model", str(folder / "model"))
    damaged: list[str] = []
    newest = checkpoint.latest(checkpoints, damaged)
    for line in damaged:
        say(f"note: {line}")
    if newest is None:
        raise InputError(f"{folder}: neither a finished model nor a whole checkpoint")
    return _Source(newest, str(newest.folder))


def _stored(storage: Storage, scratch: Path, step: int | None, say: Say) -> _Source:
    """As :func:`_source`, of what the storage holds: brought to ``scratch``."""
    names = storage.names()
    whole = steps(names)

    def brought(part: str) -> Path:
        storage.pull(scratch, [name for name in names if name.startswith(f"{part}/")])
        return scratch / part

    if step is None and "scores.json" in names and any(name.startswith("model/") for name in names):
        return _Source(brought("model"), f"{storage}/model")  # scores.json is uploaded after it
    if step is not None and _name(step) not in whole:
        raise _no_such(step, whole)
    for name in whole if step is None else [_name(step)]:
        found = checkpoint.read(brought(f"{CHECKPOINTS}/{name}"))
        if found is not None:
            return _Source(found, f"{storage}/{CHECKPOINTS}/{name}")
        if step is not None:
            raise _no_such(step, whole)
        say(f"note: checkpoint {storage}/{CHECKPOINTS}/{name} is damaged and is passed over")
    raise InputError(f"{storage}: neither a finished model nor a whole checkpoint")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _no_such(step: int, names: list[str]) -> InputError:
    there = ", ".join(str(int(name.removeprefix("step-"))) for name in sorted(names))
    if _name(step) in names:
        return InputError(f"--step: checkpoint {step} is damaged; checkpoints there: {there}")
    return InputError(f"--step: got {step}, checkpoints there: {there or 'none'}")


def _write(source: Checkpoint | Path, config: RunConfig, target: Path, merged: bool) -> None:
    if isinstance(source, Path) and not merged:
        shutil.copytree(source, target)
        return
    tokenizer = models.tokenizer_of(config.model.path, config.model)
    if isinstance(source, Path):
        saving.save_merged(source, tokenizer, config.model, target)
        return
    model = saving.restore(source, config.model)
    if not merged:
        saving.save(model, tokenizer, config.model.path, target, Group())
        return
    adapter = target.with_name("adapter")
    saving.save(model, tokenizer, config.model.path, adapter, Group())
    saving.save_merged(adapter, tokenizer, config.model, target)
