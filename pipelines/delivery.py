"""Carries journals into MLflow. Delivery can be repeated from the start at any time: a run is found again by
the random key of its journal, and a metric with the same key, step, value and time collapses into one."""

from __future__ import annotations

import getpass
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import journal
from pipelines.stores import hide
from pipelines.tracking import KEY, PARENT, Mlflow, Point, reason

STATUS = {
    "finished": "FINISHED",
    "collapsed": "FINISHED",
    "failed": "FAILED",
    "non_finite": "FAILED",
    "stopped": "KILLED",
}
"""Journal status -> MLflow status. A collapsed run is a result, marked by the tag ``gru.status``."""
NAME = "mlflow.json"


@dataclass
class _Stand:
    """How far one run folder is delivered."""

    run_id: str
    offset: int = 0
    status: str = ""
    unsent: dict[str, str] = field(default_factory=dict)
    """Artifacts that the artifact store did not take -> why."""


class Delivery:
    """Carries journals of run folders into an experiment, each from where it was left.

    Args:
        store: the tracking store.
        experiment: name of the experiment, created where missing.
    """

    def __init__(self, store: Mlflow, experiment: str) -> None:
        self.store, self.experiment = store, experiment
        self.experiment_id = store.ensure_experiment(experiment)
        self.notes: list[str] = []
        """What could not be delivered as it is (cut parameters, missing artifacts), one line each."""
        self._stands: dict[Path, _Stand] = {}

    def open_run(self, folder: Path, parent_id: str | None = None) -> str | None:
        """The MLflow run of a run folder, found again or created from the journal's first line.

        Returns:
            The run id; None while the journal has no first line.
        """
        if folder in self._stands:
            return self._stands[folder].run_id
        first = journal.head(folder)
        if first is None:
            return None
        key = first.get("key") or str(folder.resolve())
        run_id = self._known(folder, key) or self.store.by_key(self.experiment_id, key)
        created = run_id is None
        if run_id is None:
            tags = {**first["tags"], KEY: key, "mlflow.source.name": "gru", "mlflow.source.type": "LOCAL"}
            with suppress(Exception):  # no user name in some containers
                tags["mlflow.user"] = getpass.getuser()
            if "gru.commit" in tags:
                tags["mlflow.source.git.commit"] = tags["gru.commit"]
            if parent_id is not None:
                tags[PARENT] = parent_id
            run = self.store.client.create_run(
                self.experiment_id, start_time=first.get("time_ms"), tags=tags, run_name=first["name"]
            )
            run_id = run.info.run_id
        self._remember(folder, run_id)
        self._stands[folder] = _Stand(run_id, status="running" if created else "")
        return run_id

    def _known(self, folder: Path, key: str) -> str | None:
        """The run that the folder's ``mlflow.json`` names, where it is of this store, this journal, and alive."""
        known = remembered(folder)
        if known.get("uri") != hide(self.store.uri) or known.get("experiment") != self.experiment:
            return None
        tags = self.store.tags(known["run_id"])
        return known["run_id"] if tags is not None and tags.get(KEY) == key else None

    def _remember(self, folder: Path, run_id: str) -> None:
        text = json.dumps({"uri": hide(self.store.uri), "experiment": self.experiment, "run_id": run_id}, indent=1)
        part = folder / f"{NAME}.part"
        with suppress(OSError):  # the run is found again by its key
            part.write_text(text + "\n", encoding="utf-8")
            part.replace(folder / NAME)

    def run_id(self, folder: Path) -> str | None:
        """The MLflow run of a folder that was opened."""
        stand = self._stands.get(folder)
        return stand.run_id if stand else None

    def pending(self, folder: Path) -> bool:
        """Whether the folder's journal has more than was delivered, artifacts included."""
        return self._grown(folder) or (folder in self._stands and bool(self._stands[folder].unsent))

    def _grown(self, folder: Path) -> bool:
        try:
            size = (folder / journal.NAME).stat().st_size
        except OSError:
            return False
        return folder not in self._stands or size > self._stands[folder].offset

    def unsent(self, folder: Path) -> list[str]:
        """A line for each artifact of the folder that could not be stored."""
        stand = self._stands.get(folder)
        return [f"{folder.name}: artifact {path}: {why}" for path, why in stand.unsent.items()] if stand else []

    def retry(self, within_s: float = 10.0) -> None:
        """Tries artifacts that could not be stored again, for so many seconds (one that hangs is not cut off)."""
        until = time.monotonic() + within_s
        for folder, stand in self._stands.items():
            for path in list(stand.unsent):
                if time.monotonic() > until:
                    return
                self._upload(stand, folder, path)

    def deliver(self, folder: Path, parent_id: str | None = None) -> int:
        """Delivers the lines past the last delivery; on any error the same lines are delivered next time.

        An artifact that cannot be stored holds nothing up: artifacts often go to a place of their own (a bucket, a
        folder) that can be closed while the tracking store is open. :meth:`retry` tries it again.

        Returns:
            The number of lines delivered.
        """
        if not self._grown(folder):
            return 0
        run_id = self.open_run(folder, parent_id)
        if run_id is None:
            return 0
        stand = self._stands[folder]
        entries, offset = journal.read(folder, stand.offset)
        if not entries:
            return 0
        tags, params, metrics, status, ended = _sort(entries, stand.status)
        cut = self.store.log(run_id, metrics=metrics, params=params, tags=tags)
        if cut:
            self.notes.append(f"{folder.name}: cut to the length that MLflow stores: {', '.join(cut)}")
        for path in dict.fromkeys(entry["path"] for entry in entries if entry["kind"] == "artifact"):
            self._upload(stand, folder, path)
        if status != stand.status:
            if status in STATUS:
                self.store.client.set_terminated(run_id, STATUS[status], end_time=ended)
            else:
                self.store.client.update_run(run_id, status="RUNNING")
            stand.status = status
        stand.offset = offset
        return len(entries)

    def _upload(self, stand: _Stand, folder: Path, path: str) -> None:
        stand.unsent.pop(path, None)
        file, root = (folder / path).resolve(), folder.resolve()
        parts = [file, *(file.rglob("*") if file.is_dir() else ())]
        if not file.exists() or not all(part.resolve().is_relative_to(root) for part in parts):
            self.notes.append(f"{folder.name}: artifact {path} is not in the run folder")
            return
        under = file.relative_to(root).parent.as_posix()
        try:
            self.store.upload(stand.run_id, file, None if under == "." else under)
        except Exception as error:  # each kind of artifact store has errors of its own
            stand.unsent[path] = reason(error)


def _sort(
    entries: Iterable[journal.Entry], status: str
) -> tuple[dict[str, str], dict[str, Any], list[Point], str, int | None]:
    """Journal lines as tags, params, metrics, status after them ("running" where a run goes on), and its time."""
    tags: dict[str, str] = {}
    params: dict[str, Any] = {}
    metrics: list[Point] = []
    ended: int | None = None
    bad = 0
    for entry in entries:
        match entry["kind"]:
            case "metrics":
                bad += len(entry.get("non_finite", ()))
                metrics += [(key, entry["step"], v, entry["time_ms"]) for key, v in entry["metrics"].items()]
                status = "running"
            case "params":
                params.update(entry["params"])
            case "tags":
                tags.update(entry["tags"])
            case "note":
                tags[f"gru.note.{entry['number']}"] = entry["text"]
            case "run":
                tags.update(entry["tags"])
                status = status or "running"
            case "status":
                status, ended = entry["status"], entry.get("time_ms")
                tags["gru.status"] = status
    if bad:
        tags["gru.non_finite"] = "true"  # such values are left out of the curves
    return tags, params, metrics, status, ended


def remembered(folder: Path) -> dict[str, str]:
    """What ``mlflow.json`` of a run folder says: uri (without credentials), experiment, run_id; or nothing."""
    try:
        return json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
