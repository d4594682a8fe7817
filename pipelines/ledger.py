"""``trials.jsonl``: every trial that was asked for, and how it ended. All that a killed search needs to go on.

Lines, by ``kind``::

    ask   id, family, params                                       before the trial starts
    end   id, status, step, unlearning, retention, seconds, error   when it is over

Plain numbers instead of pickled searcher state: it is whole at every moment, also before the first snapshot,
and it is read without running anything that stands in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gru_core.errors import InputError, StorageError
from pipelines import journal

NAME = "trials.jsonl"
Entry = dict[str, Any]


class Ledger:
    """Appends to a search's ledger; every line is on the disk when a method returns.

    Args:
        folder: the search folder.
        stored: called after each line, before anything happens that relies on it.

    Raises:
        StorageError: the file cannot be read or written.
        InputError: it names a trial that would lie in another folder.
    """

    def __init__(self, folder: Path, stored: Callable[[], None] = lambda: None) -> None:
        self.path, self._stored = folder / NAME, stored
        self.entries, size = journal.read(self.path)
        for entry in self.entries:
            if not re.fullmatch(r"\w[\w.-]*", str(entry.get("id", "trial"))):  # it names a folder
                raise InputError(f"{self.path}: got the trial {str(entry['id'])[:80]!r}, allowed: a plain name")
        try:
            if self.path.exists() and self.path.stat().st_size > size:
                os.truncate(self.path, size)  # a last line torn by a kill
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def ask(self, name: str, family: str, params: dict[str, Any]) -> None:
        """A trial is about to start."""
        self._append({"kind": "ask", "id": name, "family": family, "params": params})

    def end(self, name: str, status: str, **result: Any) -> Entry:
        """A trial is over: ``finished``, ``collapsed``, ``non_finite`` or ``failed``."""
        entry = {"kind": "end", "id": name, "status": status, **result}
        self._append(entry)
        return entry

    def _append(self, entry: Entry) -> None:
        line = (json.dumps(entry, allow_nan=False) + "\n").encode()
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)
            raise StorageError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self.entries.append(entry)
        self._stored()
