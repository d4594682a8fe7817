"""A stop in order: SIGTERM asks a run for a checkpoint, and ends it after a grace period at the latest.

The process that was asked writes a small file into the output folder, and into shared storage where there is one;
workers and trials elsewhere look for it between two steps. Nobody waits for a storage that is away: the file goes
there, and is looked for there, in threads of their own. Ctrl-C is no such request: whoever presses it waits, and the
last checkpoint is there already.
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
from pipelines.storage import WORK, Storage

Say = Callable[[str], None]

NAME = ".stop"
"""The file in an output folder that asks its run, or the trials of its search, to stop."""
POLL_S, STORAGE_S = 0.2, 5.0
"""Seconds between two looks for that file in folders, and in shared storage."""
FIRST_S = 1.0
"""Seconds at most that a run waits at its start for the answer of shared storage; later it does not wait."""
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
    with suppress(OSError):  # a full disk: then the interrupt below ends it
        (folder / NAME).write_text("stop\n")
    if storage is not None:
        threading.Thread(target=_store, args=(folder, storage, over), name="stop-store", daemon=True).start()
    if over.wait(max(0.0, until - time.monotonic())):
        return
    say(f"no checkpoint within {grace:g} s: the one before stays the last")
    os.kill(os.getpid(), signal.SIGTERM)
    if not over.wait(LAST_S):
        os._exit(INTERRUPTED)


def _store(folder: Path, storage: Storage, over: threading.Event) -> None:
    """Uploads the request, however long the storage is away."""
    while not over.is_set():
        try:
            storage.push(folder, [NAME])
        except StorageError:
            over.wait(1.0)
        except (OSError, RuntimeError):  # no such file here; this process is at its end
            return
        else:
            if over.is_set():  # too late
                _remove(folder, storage)
            return


def _remove(folder: Path, storage: Storage | None) -> None:
    with suppress(OSError, StorageError):
        (folder / NAME).unlink(missing_ok=True)
        if storage is not None:
            storage.delete([NAME])


def polled(*folders: Path | None, storage: Storage | None = None) -> Callable[[], bool]:
    """What a run calls between two steps: whether this process, or the driver of one of ``folders``, was asked.

    The folders are listed rather than the file looked up: a network file system answers for a file that it did
    not find from its memory, for a minute. A copy of what is stored stands in an output folder, whose driver may be on
    this machine: that folder counts, too. Folders are then each machine's own, and what stands there from the start was
    left by a driver that died.
    """
    places = [folder for folder in folders if folder is not None]
    copies = [folder.parent for folder in places if folder.name == WORK]
    places += copies
    before = {folder: _stamp(folder) for folder in places} if copies else {}
    there = _There(storage) if storage is not None else None
    found, look = False, 0.0

    def poll() -> bool:
        nonlocal found, look
        now = time.monotonic()
        if not found and now >= look:
            look = now + POLL_S
            found = any(_stands_in(folder, before.get(folder)) for folder in places)
        found = found or (there is not None and there.poll())
        return found or _State.asked

    return poll


def _stands_in(folder: Path, before: int | None) -> bool:
    try:
        return NAME in os.listdir(folder) and (before is None or _stamp(folder) != before)  # noqa: PTH208 (names do)
    except OSError:
        return False


def _stamp(folder: Path) -> int | None:
    try:
        return (folder / NAME).stat().st_mtime_ns
    except OSError:
        return None


class _There:
    """Looks into shared storage, in a thread for each look: the run reads what the last one found."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._thread: threading.Thread | None = None
        self._next, self._found = 0.0, False

    def poll(self) -> bool:
        """Whether a request was found so far. Waits for the first look alone, and not for long."""
        busy = self._thread is not None and self._thread.is_alive()
        if not self._found and not busy and time.monotonic() >= self._next:
            first, self._next = self._thread is None, time.monotonic() + STORAGE_S
            self._thread = threading.Thread(target=self._look, name="stop-look", daemon=True)
            self._thread.start()
            if first:
                self._thread.join(FIRST_S)
        return self._found

    def _look(self) -> None:
        with suppress(OSError, ValueError):  # away for a moment
            self._found = self._storage.has(NAME)
