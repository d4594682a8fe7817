"""A run's local record: one JSON object a line, appended by the run, delivered to MLflow by the driver.

A run never talks to a server: it writes here, and ``pipelines.tracking`` carries the lines over. Key, step,
value and time of a metric are fixed at the moment they are written, so delivering twice changes nothing.

Lines, by ``kind``::

    run       name, tags, key, time_ms   the first line; key: a random name of its own for this run
    params    params                     dotted config key -> scalar
    metrics   step, time_ms, metrics     and non_finite: names whose value was not a finite number
    tags      tags
    artifact  path                       relative to the run folder
    status    status, time_ms            finished, collapsed, failed, non_finite, stopped
    note      number, text, time_ms      what happened to the run (a damaged checkpoint, a restart); from 1

Times are milliseconds since 1970, UTC.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gru_core.errors import StorageError

NAME = "journal.jsonl"
Entry = dict[str, Any]
Scalar = str | int | float | bool | None


class Journal:
    """Appends to a run's journal; opening one that exists continues it and repeats nothing.

    A line is on its way to the disk when a method returns. A last line torn by a kill is cut off on opening.
    NaN and infinity have no place in JSON or in a tracking database: such a metric is left out of
    ``metrics``, named in the line's ``non_finite`` and counted in :attr:`non_finite`.

    Args:
        path: the file, or a folder in which ``journal.jsonl`` is meant. Missing folders are made.

    Raises:
        StorageError: the file cannot be opened or written (disk full), or a line before its last is broken.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = locate(path)
        self.non_finite = 0
        self._notes = 0
        self._seen: set[tuple[str, int]] = set()
        self._kinds: set[str] = set()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._size = self._continue() if self.path.exists() else 0
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise StorageError(f"the journal {self.path} cannot be opened: {error.strerror or error}") from error

    def _continue(self) -> int:
        """Reads what stands in the file, cuts a torn last line off, and returns the size that remains."""
        entries, size = read(self.path)
        for entry in entries:
            self._kinds.add(entry["kind"])
            self._notes += entry["kind"] == "note"
            if entry["kind"] == "metrics":
                bad = entry.get("non_finite", ())
                self.non_finite += len(bad)
                self._seen.update((key, entry["step"]) for key in (*entry["metrics"], *bad))
        if self.path.stat().st_size > size:
            os.truncate(self.path, size)
        return size

    def run(self, name: str, tags: Mapping[str, str] | None = None) -> None:
        """Names the run. Written once: a resumed run keeps its first line."""
        if "run" not in self._kinds:
            entry: Entry = {"kind": "run", "name": name, "tags": _texts(tags or {})}
            self._append({**entry, "key": uuid.uuid4().hex, "time_ms": _now()})

    def params(self, params: Mapping[str, Scalar]) -> None:
        """Parameters under dotted config names. Written once."""
        if "params" not in self._kinds:
            self._append({"kind": "params", "params": dict(params)})

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Values at a step. A (key, step) that already stands in the journal is dropped."""
        new = {key: float(value) for key, value in metrics.items() if (key, step) not in self._seen}
        finite = {key: value for key, value in new.items() if math.isfinite(value)}
        bad = sorted(new.keys() - finite.keys())
        if not new:
            return
        entry: Entry = {"kind": "metrics", "step": int(step), "time_ms": _now()}
        self._append({**entry, "metrics": finite, **({"non_finite": bad} if bad else {})})
        self._seen.update((key, step) for key in new)
        self.non_finite += len(bad)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Tags; a later value of the same tag replaces the earlier one."""
        self._append({"kind": "tags", "tags": _texts(tags)})

    @property
    def continued(self) -> bool:
        """Whether steps of the run stood in the file already."""
        return "metrics" in self._kinds

    def artifact(self, path: str | os.PathLike[str]) -> None:
        """A file or folder of the run folder, by its path relative to it; again when it has changed."""
        self._append({"kind": "artifact", "path": Path(path).as_posix()})

    def status(self, status: str) -> None:
        """How the run ended (the last one counts)."""
        self._append({"kind": "status", "status": status, "time_ms": _now()})

    def note(self, text: str) -> None:
        """One line on what happened to the run; the driver says it, MLflow gets it as a tag."""
        self._append({"kind": "note", "number": self._notes + 1, "text": text, "time_ms": _now()})
        self._notes += 1

    def _append(self, entry: Entry) -> None:
        line = (json.dumps(entry, allow_nan=False, separators=(",", ":")) + "\n").encode()
        try:
            done = 0
            while done < len(line):
                done += self._file.write(line[done:]) or 0
        except OSError as error:
            with suppress(OSError):  # a half-written line would swallow the next one
                os.truncate(self.path, self._size)
            reason = error.strerror or str(error)
            raise StorageError(f"the journal {self.path} cannot be written: {reason}") from error
        self._size += len(line)
        self._kinds.add(entry["kind"])

    def close(self) -> None:
        """Closes the file. Nothing is buffered: a run that is killed loses nothing by not closing."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class Record:
    """What a journal says, line by line added up."""

    name: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, Scalar] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step -> key -> value, steps ascending."""
    status: str | None = None
    notes: tuple[str, ...] = ()


def locate(path: str | os.PathLike[str]) -> Path:
    """The journal file of a run folder (or the file itself)."""
    path = Path(path)
    return path / NAME if path.is_dir() or path.suffix != ".jsonl" else path


def head(path: str | os.PathLike[str]) -> Entry | None:
    """The first line, which names the run; None where it is not written yet."""
    try:
        with locate(path).open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    return json.loads(line) if line.endswith(b"\n") else None


def read(path: str | os.PathLike[str], offset: int = 0) -> tuple[list[Entry], int]:
    """The whole lines from a byte offset on, and the offset behind them.

    A last line that is not finished yet (no newline, or no valid JSON at the very end of the file) is left
    for a later call. A missing file is an empty one.

    Raises:
        StorageError: a broken line that is not the last one.
    """
    path = locate(path)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    entries: list[Entry] = []
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            entry["kind"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines) - 1 and data.endswith(line):
                break
            raise StorageError(f"the journal {path} is broken at byte {offset}") from None
        entries.append(entry)
        offset += len(line)
    return entries, offset


def load(path: str | os.PathLike[str]) -> Record:
    """The whole journal as one record."""
    name, status = "", None
    tags: dict[str, str] = {}
    params: dict[str, Scalar] = {}
    metrics: dict[int, dict[str, float]] = {}
    notes: list[str] = []
    for entry in read(path)[0]:
        match entry["kind"]:
            case "run":
                name, tags = entry["name"], {**tags, **entry["tags"]}
            case "params":
                params.update(entry["params"])
            case "metrics":
                metrics.setdefault(entry["step"], {}).update(entry["metrics"])
            case "tags":
                tags.update(entry["tags"])
            case "status":
                status = entry["status"]
            case "note":
                notes.append(entry["text"])
    return Record(name, tags, params, dict(sorted(metrics.items())), status, tuple(notes))


def evaluated(metrics: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The steps that have both scores of the trade-off, ascending: ``step``, ``unlearning``, ``retention``
    and every other ``eval/`` metric under its bare name."""
    points = []
    for step, values in sorted(metrics.items()):
        scores = {key.removeprefix("eval/"): value for key, value in values.items() if key.startswith("eval/")}
        if "unlearning" in scores and "retention" in scores:
            points.append({"step": step, **scores})
    return points


def points(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The evaluated steps of a run, from its journal."""
    return evaluated(load(path).metrics)


def _texts(tags: Mapping[str, str]) -> dict[str, str]:
    return {str(key): str(value) for key, value in tags.items()}


def _now() -> int:
    return time.time_ns() // 1_000_000
