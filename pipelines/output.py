"""The output folder of a run or a search: never mixed with something else, never deleted by mistake."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gru_core.errors import InputError
from pipelines.settings import HEADER
from pipelines.storage import Storage

_MARKS = {"config.yaml": HEADER.encode(), "request.yaml": HEADER.encode(), "journal.jsonl": b'{"kind":"run"'}
LOCK = ".gru.lock"
"""The file in an output folder that :func:`hold` locks; a folder with nothing else in it is empty."""


def examine(folder: Path, *, overwrite: bool, resume: bool, storage: Storage | None = None) -> Path:
    """Checks that :func:`claim` would succeed; changes nothing.

    Args:
        storage: where the output is kept, if not in the folder: what holds for the folder then holds for both, and
            what is resumed is there.

    Returns:
        The absolute path.

    Raises:
        InputError: the folder is not empty and neither option was given; holds something that is no result of
            ours where an option was given; nothing there to resume; not writable; the storage cannot be used.
    """
    if overwrite and resume:
        raise InputError("--overwrite and --resume were both given, allowed: one of them")
    path = Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100 (a link in the path stays one)
    try:
        empty = not path.exists() or (path.is_dir() and all(entry.name == LOCK for entry in path.iterdir()))
        if path.exists() and not path.is_dir():
            raise InputError(f"output folder {folder} is a file, allowed: a folder")
    except OSError as error:
        raise InputError(f"output folder {folder}: {error.strerror or error}") from None
    if storage is not None:
        _examine_storage(storage, overwrite=overwrite, resume=resume)
    elif empty and resume:
        raise InputError(f"output folder {folder} holds nothing to resume (leave --resume out to start there)")
    if not empty and not is_result(path):
        raise InputError(
            f"output folder {folder} is not empty, and holds no result of gru that --overwrite could replace or "
            "--resume continue"
        )
    if not empty and not (overwrite or resume):
        raise InputError(f"output folder {folder} is not empty; --overwrite replaces it, --resume continues it")
    if overwrite and not empty:
        _refuse_precious(path, folder)
    _check_writable(path, folder)
    return path


def _examine_storage(storage: Storage, *, overwrite: bool, resume: bool) -> None:
    storage.check()
    if not storage.names():
        if resume:
            raise InputError(f"output.storage: {storage} holds nothing to resume (leave --resume out to start there)")
        return
    if not any((storage.read(name) or b"").startswith(mark) for name, mark in _MARKS.items()):
        raise InputError(f"output.storage: {storage} is not empty, and holds no result of gru")
    if not (overwrite or resume):
        raise InputError(
            f"output.storage: {storage} is not empty; --overwrite replaces what is in it, --resume continues it"
        )


def claim(folder: Path, *, overwrite: bool, resume: bool, storage: Storage | None = None) -> Path:
    """Makes the output folder ready: call it last, when every other check has passed.

    Without an option the folder must be missing or empty. ``overwrite`` deletes what is in it, but only where
    it is a result of ours (:func:`is_result`); ``resume`` leaves it as it is. The same holds for ``storage``.

    Returns:
        The absolute path of a folder that exists.

    Raises:
        InputError: as :func:`examine`.
    """
    path = examine(folder, overwrite=overwrite, resume=resume, storage=storage)
    if overwrite and storage is not None:
        storage.delete(storage.names())
    if overwrite and path.exists():
        for entry in path.iterdir():  # the folder itself stays: it may be a link, or a mount
            if entry.name == LOCK:
                continue  # ours, while we hold the folder
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output folder {folder}: {error.strerror or error}") from None
    return path


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Path]:
    """Holds an output folder for this process, from before :func:`claim` until its last file is written.

    The folder is made where it is missing, and taken away again where it is still empty at the end. The lock is
    the operating system's: it ends with the process, however that ends.

    Yields:
        The absolute path.

    Raises:
        InputError: another process holds the folder, or it cannot be made or locked.
    """
    path = Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100 (as in examine)
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        descriptor = _lock(path)
    except BlockingIOError:
        raise InputError(f"another process is working in the output folder {folder}") from None
    except OSError as error:
        raise InputError(f"output folder {folder} cannot be locked: {error.strerror or error}") from None
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            (path / LOCK).unlink()
        os.close(descriptor)
        for parent in made:
            with contextlib.suppress(OSError):  # something is in it
                parent.rmdir()


def _lock(path: Path) -> int:
    """The descriptor of a locked file that still stands in ``path``: an earlier holder may just have removed it."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # the holder took the empty folder away
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), (path / LOCK).stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_result(path: Path) -> bool:
    """Whether a run or a search wrote this folder: by the first line of its config or its journal.

    A ``config.yaml`` that a user wrote by hand carries no such line, so that its folder is never deleted.
    """
    for name, start in _MARKS.items():
        with contextlib.suppress(OSError), (path / name).open("rb") as file:
            if file.read(len(start)) == start:
                return True
    return False


def _refuse_precious(path: Path, folder: Path) -> None:
    """A folder that contains the working folder or the home folder is never emptied."""
    real = path.resolve()
    for precious in (Path.cwd(), Path.home()):
        if precious.resolve().is_relative_to(real):
            raise InputError(f"output folder {folder} contains {precious}; --overwrite does not empty it")


def _check_writable(path: Path, folder: Path) -> None:
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output folder {folder}: {parent} cannot be written")
