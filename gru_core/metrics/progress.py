"""What an evaluation has measured so far, in files: one that was interrupted goes on with the rows that are left.

A folder with one JSON Lines file a rank. Each line has the key of the evaluation and what was measured since the line
before; a line that was cut off, or has another key, counts for nothing. Row ids and numbers only, and generated texts
where the evaluation keeps them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gru_core.parallel import Group


class Progress:
    """One evaluation of one model on all ranks of ``group``.

    Args:
        folder: of this evaluation alone. Ranks may share it, or each machine may have its own.
        key: names the model as it stands, such as a run's step: what was measured under another key is not this
            evaluation's.
    """

    def __init__(self, folder: Path, key: str, group: Group) -> None:
        self.folder, self.key, self.group = folder, key, group
        self._file = folder / f"rank-{group.rank}.jsonl"

    def within(self, part: str) -> Progress:
        """The progress of a part of this evaluation, kept apart."""
        return Progress(self.folder / part, self.key, self.group)

    def read(self, what: str) -> dict[str, Any]:
        """All that any rank has left under this key and ``what`` (a digest of what is measured), the same on every
        rank; makes the folder ready for :meth:`add`. All ranks call it together."""
        self._mark = f"{self.key} {what}"
        mine: dict[str, Any] = {}
        for file in sorted(self.folder.glob("rank-*.jsonl")):
            mine |= self._lines(file)
        found: dict[str, Any] = {}
        for part in self.group.gather(mine):
            found |= part
        if self.group.rank == 0 and not found:  # of another evaluation, or of none
            shutil.rmtree(self.folder, ignore_errors=True)
        self.group.barrier()
        return found

    def _lines(self, file: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with contextlib.suppress(OSError):
            for line in file.read_text(encoding="utf-8").split("\n"):
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    entry = json.loads(line)
                    found |= entry["found"] if entry["key"] == self._mark else {}
        return found

    def add(self, found: Mapping[str, Any]) -> None:
        """Keeps what this rank has measured since it last called."""
        # a full disk costs the resumption and not the evaluation; it is told where the result is written
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as out:  # a line that was cut off ends here
                out.write("\n" + json.dumps({"key": self._mark, "found": found}))

    def drop(self) -> None:
        """The evaluation is complete and stored. All ranks call it together."""
        self.group.barrier()
        shutil.rmtree(self.folder, ignore_errors=True)
