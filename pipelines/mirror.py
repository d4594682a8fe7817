"""The driver's copy of a run or a search that is kept in shared storage: its output folder shows what workers stored.

Where no storage is set, nothing here does anything: the output folder is then the run itself.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from gru_core import checkpoint
from gru_core.errors import InputError, StorageError
from pipelines import journal
from pipelines.storage import Stamp, Storage

CHECKPOINTS, STATE = "checkpoints", "state.json"
MODELS = ("model", "merged", "best")
POLL_S = 2.0
"""Seconds between two looks at the storage."""
_REQUESTS = ("request.yaml", "config.yaml")
_BULKY = {CHECKPOINTS, *MODELS, "ray", "tune"}


def of(uri: str | None) -> Storage | None:
    """The storage that a config names."""
    return Storage(uri) if uri else None


def records(names: dict[str, Stamp]) -> dict[str, Stamp]:
    """Those of the files that people and other processes read: not weights, not checkpoints."""
    return {
        name: stamp for name, stamp in names.items() if not _BULKY & set(name.split("/")[:-1]) and not _hidden(name)
    }


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def steps(names: dict[str, Stamp]) -> list[str]:
    """Names of the checkpoints whose last file is there, newest first."""
    parts = [PurePosixPath(name).parts for name in names]
    whole = {p[1] for p in parts if len(p) == 3 and p[0] == CHECKPOINTS and p[2] == STATE}
    return sorted((name for name in whole if name.startswith("step-")), reverse=True)


class Mirror:
    """The driver's side: its output folder shows what workers stored; threads may call it.

    Args:
        uri: ``output.storage``; None: the folder is the run itself, and nothing here does anything.
        owned: whether the driver alone writes the files at the top of the folder, as that of a search does.
        say: told once when the storage goes away.
    """

    def __init__(
        self, uri: str | None, folder: Path, *, owned: bool = False, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.storage, self.folder = of(uri), folder
        self._owned, self._say = owned, say
        self._seen: dict[str, Stamp] = {}
        self._lock = threading.RLock()
        self._polled = 0.0
        self._warned = False

    def resume(self) -> None:
        """Brings all records here, before a run goes on.

        Raises:
            InputError: the local folder holds the records of another run.
            StorageError: the storage does not answer.
        """
        if self.storage is None:
            return
        stored = self.storage.read(journal.NAME) or b""
        here = journal.locate(self.folder)
        mine = here.read_bytes().partition(b"\n")[0] if here.exists() else b""
        if mine and not (stored.partition(b"\n")[0] == mine if stored else self._same_request()):
            raise InputError(f"output.dir: {self.folder} holds another run than {self.storage}; give another folder")
        with self._lock:
            self.storage.pull(self.folder, ["request.yaml"])  # the first of all: it marks the folder as ours
            self._pull(lambda name: True)

    def _same_request(self) -> bool:
        """Whether what was asked for here is what the storage holds, as of a search that died in its first upload."""
        assert self.storage is not None
        for name in _REQUESTS:
            file, stored = self.folder / name, self.storage.read(name)
            if stored is not None and (not file.is_file() or file.read_bytes() != stored):
                return False
        return True

    def pull(self) -> None:
        """Brings new records of the workers here."""
        if self.storage is not None:
            with self._lock:
                self._pull(lambda name: not self._owned or "/" in name)

    def poll(self, every: float = POLL_S) -> None:
        """:meth:`pull`, where the last one is so many seconds ago, and never an error."""
        if self.storage is None or time.monotonic() - self._polled < every:
            return
        with self._lock:
            try:
                self.pull()
            except (StorageError, OSError) as error:
                if not self._warned:
                    self._warned = True
                    self._say(f"{error}; the run goes on, what it records is shown as soon as the storage answers")
            self._polled = time.monotonic()

    def model(self) -> None:
        """Brings the final model here, and what it is merged into, where there is one."""
        if self.storage is not None:
            for name in MODELS:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                self.storage.pull(self.folder, self.storage.names(name))

    def step(self) -> int | None:
        """The newest whole checkpoint, in steps; None where there is none."""
        if self.storage is None:
            found = checkpoint.latest(self.folder / CHECKPOINTS)
            return found.step if found else None
        names = steps(self.storage.names(CHECKPOINTS))
        return int(names[0].removeprefix("step-")) if names else None

    def push(self, *names: str) -> None:
        """Uploads files that the driver writes."""
        if self.storage is not None:
            self.storage.push(self.folder, [name for name in names if (self.folder / name).exists()])

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """The newest records for the block, which adds to the file ``name`` of workers that are gone."""
        with self._lock:
            self.pull()
            yield
            self.push(name)

    def _pull(self, wanted: Callable[[str], bool]) -> None:
        """Journals first and in place last: a line that stands here names files that are here."""
        assert self.storage is not None
        fresh = self._fresh(wanted)
        journals = [name for name in fresh if PurePosixPath(name).name == journal.NAME]
        if journals:
            held = self.folder / ".journals"
            shutil.rmtree(held, ignore_errors=True)
            self.storage.pull(held, journals)
            stamps = {name: fresh[name] for name in journals}
            fresh = self._fresh(wanted)
            self._take(fresh, [name for name in fresh if PurePosixPath(name).name != journal.NAME])
            for name in journals:
                with suppress(FileNotFoundError):  # deleted meanwhile
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (held / name).replace(self.folder / name)
            self._seen |= stamps
            shutil.rmtree(held, ignore_errors=True)
        else:
            self._take(fresh, [*fresh])

    def _take(self, fresh: dict[str, Stamp], names: Sequence[str]) -> None:
        assert self.storage is not None
        self.storage.pull(self.folder, names)
        self._seen |= {name: fresh[name] for name in names}

    def _fresh(self, wanted: Callable[[str], bool]) -> dict[str, Stamp]:
        assert self.storage is not None
        found = records(self.storage.names())
        return {name: stamp for name, stamp in found.items() if wanted(name) and self._seen.get(name) != stamp}
