"""A worker's copy of a run that is kept in shared storage: it works in a folder of its machine and uploads.

Where no storage is set, nothing here does anything: the output folder is then the run itself. With one, the storage
is the truth: workers start from what it holds, and what one wrote and did not upload is done again. The order of
uploads keeps the storage whole at every moment: what a journal line names before the journal, the journal before the
checkpoint of the same step, ``state.json`` last in a checkpoint, ``scores.json`` last of all.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from gru_core import checkpoint
from gru_core.errors import StorageError
from gru_core.parallel import Group
from pipelines import alive, journal
from pipelines.mirror import CHECKPOINTS, STATE, records, steps
from pipelines.storage import EVALUATING, WORK, Storage

JOURNAL_S = 30.0
"""Seconds that a journal line waits for its upload at most, where steps are short."""
_KEEP = 2
_LOCK = ".lock"


class Keeper:
    """One worker's side: brings the run here, and takes what it writes to the storage. Used on every rank.

    Attributes:
        folder: where the run works on this machine.
        home: the output folder of this machine; the same without storage.
        notes: checkpoints that were passed over as damaged, one line each.
    """

    def __init__(self, uri: str | None, folder: Path, group: Group) -> None:
        self.storage = Storage(uri, alive.beat) if uri else None
        self.group, self.lead = group, group.rank == 0
        self.home = folder
        self.folder = folder / WORK if self.storage else folder
        self.notes: list[str] = []
        self._journal_at = time.monotonic()

    def fetch(self) -> None:
        """Makes ``folder`` what the storage holds: records on rank 0, the newest whole checkpoint on every machine.

        Raises:
            StorageError: on every rank, where one of them cannot.
        """
        if self.storage is None:
            return
        name, problem = None, None
        if self.lead:
            try:
                name = self._fetch_records(self.storage)
            except (StorageError, OSError) as error:
                problem = str(error)
        name, problem = self.group.gather((name, problem))[0]
        _together([problem])
        self._agreed(lambda storage: self._fetch_checkpoint(storage, name))

    def _fetch_records(self, storage: Storage) -> str | None:
        """Leaves records of the storage and no others, and returns the checkpoint that all ranks start from."""
        with self._alone():
            for entry in self.folder.iterdir():
                if entry.name not in (CHECKPOINTS, EVALUATING, _LOCK):
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            names = storage.names()
            storage.pull(self.folder, [*records(names)])
            for name in steps(names):
                self._pull_step(storage, name)
                if checkpoint.read(self.folder / CHECKPOINTS / name) is not None:
                    return name
                shutil.rmtree(self.folder / CHECKPOINTS / name, ignore_errors=True)
                self.notes.append(f"checkpoint {storage}/{CHECKPOINTS}/{name} is damaged and is passed over")
        return None

    def _fetch_checkpoint(self, storage: Storage, name: str | None) -> None:
        with self._alone():
            for other in (self.folder / CHECKPOINTS).glob("*"):
                if other.name != name:
                    shutil.rmtree(other, ignore_errors=True)
            if name is not None:
                self._pull_step(storage, name)
                if checkpoint.read(self.folder / CHECKPOINTS / name, verify=False) is None:
                    raise StorageError(f"checkpoint {name} of {storage} arrived damaged in {self.folder}")

    def _pull_step(self, storage: Storage, name: str) -> None:
        """The checkpoint from the storage, unless it is here already: ``state.json`` tells its content."""
        names = storage.names(f"{CHECKPOINTS}/{name}")
        target, part = self.folder / CHECKPOINTS / name, self.folder / ".pull"
        with suppress(OSError):
            here = {each: (self.folder / each).stat().st_size for each in names}
            state = (target / STATE).read_bytes()
            if here == {each: size for each, (size, _) in names.items()} and state == storage.read(
                f"{CHECKPOINTS}/{name}/{STATE}"
            ):
                return
        for old in (part, target):
            shutil.rmtree(old, ignore_errors=True)
        storage.pull(part, names)
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # taken away meanwhile
            (part / CHECKPOINTS / name).rename(target)
        shutil.rmtree(part, ignore_errors=True)

    def store(self, *names: str) -> None:
        """Uploads records, then the journal, which may name them. Call on rank 0."""
        if self.storage is not None:
            self.storage.push(self.folder, names)
            self.storage.push(self.folder, [journal.NAME])
            self._journal_at = time.monotonic()

    def tick(self) -> None:
        """Uploads the journal where its last upload is long ago. Call on rank 0."""
        if self.storage is not None and time.monotonic() - self._journal_at > JOURNAL_S:
            self.store()

    def store_folder(self, name: str) -> None:
        """Uploads a folder and removes what it had there before. Call on rank 0."""
        if self.storage is not None:
            mine = _files(self.folder, self.folder / name)
            self.storage.push(self.folder, mine)
            self.storage.delete(self.storage.names(name).keys() - set(mine))

    def saved(self, target: Path) -> None:
        """Uploads a checkpoint that all ranks have written, each file from a rank that has it. Call on every rank.

        Raises:
            StorageError: on every rank, where one of them cannot.
        """
        if self.storage is None:
            return
        state = f"{CHECKPOINTS}/{target.name}/{STATE}"

        def prepare(storage: Storage) -> None:
            if self.lead:
                self.store()
                storage.delete([state])  # of one with the same name that was passed over as damaged

        self._agreed(prepare)
        parts = self.group.gather([name for name in _files(self.folder, target) if name != state])
        owners: dict[str, list[int]] = {}
        for rank, names in enumerate(parts):
            for name in names:
                owners.setdefault(name, []).append(rank)
        mine = [name for i, (name, who) in enumerate(sorted(owners.items())) if who[i % len(who)] == self.group.rank]
        self._agreed(lambda storage: storage.push(self.folder, mine))

        def finish(storage: Storage) -> None:
            if self.lead:
                storage.push(self.folder, [state])
                self._prune(storage, target.name, {*owners, state})

        self._agreed(finish)

    def _prune(self, storage: Storage, newest: str, mine: set[str]) -> None:
        """Drops all but the last two whole checkpoints, and what an earlier one left under the newest's name."""
        names = storage.names(CHECKPOINTS)
        keep = {newest, *[name for name in steps(names) if name < newest][: _KEEP - 1]}
        old = [n for n in names if PurePosixPath(n).parts[1] not in keep]
        rest = [n for n in names if PurePosixPath(n).parts[1] == newest and n not in mine]
        storage.delete([n for n in old if n.endswith(f"/{STATE}")])
        storage.delete([n for n in old if not n.endswith(f"/{STATE}")] + rest)

    def close(self) -> None:
        """Takes this machine's copy away: everything is in the storage."""
        if self.storage is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _agreed(self, action: Callable[[Storage], None]) -> None:
        """Does it on every rank; where it fails on one, it fails on all of them, and none waits for another."""
        assert self.storage is not None
        problem = None
        try:
            action(self.storage)
        except (StorageError, OSError) as error:
            problem = str(error)
        _together(self.group.gather(problem))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Ranks of one machine share its copy."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _together(problems: Sequence[str | None]) -> None:
    for problem in problems:
        if problem is not None:
            raise StorageError(problem)


def _files(folder: Path, under: Path) -> list[str]:
    return sorted(f.relative_to(folder).as_posix() for f in under.rglob("*") if f.is_file())
