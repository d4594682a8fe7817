"""Signs of life: a worker that makes no progress ends itself, and is started again from the last checkpoint.

Progress is a batch that enters the model, in training as in evaluation, or a file of a checkpoint that grows.
Workers go in step, so that the progress of any of them counts for all: while one writes, the others wait for it.
A process that is frozen as a whole cannot watch itself: the others end, having waited for it, and Ray Train's
health check ends one that is alone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.storage import WORK

if TYPE_CHECKING:
    from torch import nn

NAME = ".alive"
"""Folder in a run's folder: a file for each rank, touched while the rank makes progress."""
HUNG = "hung-"
START_S = 300.0
"""Seconds at least for the first sign of life: a model is loaded before its first batch."""

_beats = 0


def beat(*ignored: Any) -> None:
    """Progress was made; takes what a hook of torch is given."""
    global _beats
    _beats += 1


def follow(model: nn.Module) -> None:
    """Takes every batch that enters ``model`` as a sign of life."""
    model.register_forward_pre_hook(beat)


@contextmanager
def watched(folder: Path, rank: int, timeout: float) -> Iterator[None]:
    """Kills this process (SIGKILL) where for ``timeout`` seconds of the block no rank makes progress.

    Before the first batch of this rank it waits for ``START_S`` seconds at least.
    """
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(folder, rank, timeout, over), name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(OSError):
            (folder / NAME / str(rank)).unlink(missing_ok=True)
            (folder / NAME).rmdir()  # the last rank


def _watch(folder: Path, rank: int, timeout: float, over: threading.Event) -> None:
    seen: tuple[int, object] | None = None
    since = time.monotonic()
    told = first = _beats
    while not over.wait(min(timeout / 5, 10.0)):
        beats = _beats
        if beats != told:
            told = beats
            _touch(folder / NAME / str(rank))
        now = (beats, _signs(folder))
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > (timeout if beats > first else max(timeout, START_S)):
            print(f"rank {rank}: no progress for {timeout:g} s, ends itself", file=sys.stderr, flush=True)
            _touch(folder / NAME / f"{HUNG}{rank}")
            os.kill(os.getpid(), signal.SIGKILL)


def _touch(file: Path) -> None:
    with suppress(OSError):  # a full disk, or a folder that is gone: the own beats still count
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def _signs(folder: Path) -> object:
    """Changes whenever a rank touches its file, or a checkpoint grows, be it in the copy of what is stored."""
    found = []
    for top in (NAME, "checkpoints", f"{WORK}/checkpoints"):
        for parent, _, names in os.walk(folder / top):
            for name in names:
                with suppress(OSError):
                    status = (Path(parent) / name).stat()
                    found.append((parent, name, status.st_mtime_ns, status.st_size))
    return found


def hung(folder: Path) -> list[int]:
    """Ranks that ended themselves since the last call, ascending; called by one rank, at a start."""
    files = sorted((folder / NAME).glob(f"{HUNG}*"))
    for file in files:
        file.unlink(missing_ok=True)
    return sorted(int(file.name.removeprefix(HUNG)) for file in files)
