"""A stop in order: SIGTERM asks a run for a checkpoint, and ends it after a grace period at the latest.

The process that was asked writes a small file into the output folder, which workers and trials elsewhere poll
between two steps. Ctrl-C is no such request: whoever presses it waits, and the last checkpoint is there already.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gru_core.errors import StorageError
from pipelines.storage import Storage

Say = Callable[[str], None]

NAME = ".stop"
"""The file in an output folder that asks its run, or the trials of its search, to stop."""
POLL_S, STORAGE_S = 0.2, 5.0
"""Seconds between two looks for that file in folders, and in shared storage."""
LAST_S = 20.0
"""Seconds after the grace period in which a process that does not even take an interrupt still may end."""
INTERRUPTED = 130


class _State:
    """What the signal handler leaves: plain values, since a lock could be held by what it interrupts."""

    asked = False
    listeners = 0


def ask() -> bool:
    """SIGTERM has come. True: what runs here stops by itself; False: nothing does, or it was asked before."""
    if _State.listeners == 0 or _State.asked:
        return False
    _State.asked = True
    return True


def asked() -> bool:
    """Whether this process was asked to stop what it runs now."""
    return _State.asked


@contextmanager
def listening(folder: Path, grace: float, say: Say, storage: Storage | None = None) -> Iterator[None]:
    """While the block runs, :func:`ask` stops the run or the search in ``folder``.

    Args:
        folder: the output folder, held by this process.
        grace: seconds until the block is interrupted (SIGTERM again), checkpoint or not.
        say: told of the request.
        storage: shared storage of the run: the request goes there, too.
    """
    _State.asked = False
    _remove(folder, storage)
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, grace, say, storage, over), name="stop", daemon=True)
    watcher.start()
    _State.listeners += 1
    try:
        yield
    finally:
        _State.listeners -= 1
        over.set()
        watcher.join()
        _remove(folder, storage)


def _watch(folder: Path, grace: float, say: Say, storage: Storage | None, over: threading.Event) -> None:
    while not _State.asked:
        if over.wait(POLL_S / 2):
            return
    until = time.monotonic() + grace
    say(f"asked to stop: writing a checkpoint, for {grace:g} s at most")
    with suppress(OSError, StorageError):  # a full disk: then the interrupt below ends it
        (folder / NAME).write_text("stop\n")
        if storage is not None:
            storage.push(folder, [NAME])
    if over.wait(max(0.0, until - time.monotonic())):
        return
    say(f"no checkpoint within {grace:g} s: the one before stays the last")
    os.kill(os.getpid(), signal.SIGTERM)
    if not over.wait(LAST_S):
        os._exit(INTERRUPTED)


def _remove(folder: Path, storage: Storage | None) -> None:
    with suppress(OSError, StorageError):
        (folder / NAME).unlink(missing_ok=True)
        if storage is not None:
            storage.delete([NAME])


def polled(*folders: Path | None, storage: Storage | None = None) -> Callable[[], bool]:
    """What a run calls between two steps: whether this process, or the driver of one of ``folders``, was asked.

    The folders are listed rather than the file looked up: a network file system answers for a file that it did
    not find from its memory, for a minute.
    """
    places = [folder for folder in folders if folder is not None]
    found, look, look_there = False, 0.0, 0.0

    def poll() -> bool:
        nonlocal found, look, look_there
        now = time.monotonic()
        if not found and now >= look:
            look = now + POLL_S
            found = any(_stands_in(folder) for folder in places)
        if not found and storage is not None and now >= look_there:
            found = _stored(storage)
            look_there = time.monotonic() + STORAGE_S
        return found or _State.asked

    return poll


def _stands_in(folder: Path) -> bool:
    try:
        return NAME in os.listdir(folder)  # noqa: PTH208 (names are enough)
    except OSError:
        return False


def _stored(storage: Storage) -> bool:
    try:
        return storage.read(NAME) is not None
    except StorageError:  # away for a moment
        return False
