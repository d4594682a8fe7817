"""What a report is made from: the records of a run or a search, in its folder or, where that is gone, in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gru_core.errors import InputError
from pipelines import inputs, journal, tracked, worker
from pipelines.courier import folders
from pipelines.stores import hide
from pipelines.tracked import Found
from pipelines.tracking import Mlflow

KINDS = ("run", "trial", "search", "request")
RETAIN_MODEL = "retain_model/"
NOTE = "gru.note."


@dataclass(frozen=True)
class Told:
    """One run, or the parent of a search, as its records tell it.

    Attributes:
        record: tags, parameters, metrics by step, status and notes.
        began, ended: milliseconds since 1970; ``ended`` is the last word so far, None where there is none.
        retain_scores: of the model that never saw the forget set; empty where there is none, or none was recorded.
        config: the resolved config as YAML; from MLflow, as the parameters that were tracked.
        folder: None where it is read from MLflow.
        error: what ended it, where that was no result.
    """

    record: journal.Record
    began: int | None
    ended: int | None
    retain_scores: Mapping[str, float] = field(default_factory=dict)
    config: str = ""
    folder: Path | None = None
    run_id: str | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        return self.record.tags.get("gru.trial") or self.record.name


@dataclass(frozen=True)
class Source:
    """A run (no trials), or a search and its trials."""

    found: Found
    told: Told
    trials: tuple[Told, ...] = ()

    @property
    def is_search(self) -> bool:
        return self.told.record.tags.get("gru.kind") == "search"

    def whole(self, trial: Told) -> Told:
        """A trial with every metric: from MLflow, :func:`read` brings the scores of a search's trials alone."""
        if trial.folder is not None or trial.run_id is None or self.found.store is None:
            return trial
        return _tracked(self.found.store, trial.run_id, "")


def read(source: str, tracking_uri: str | None) -> Source:
    """The records of a run or a search: of a folder its journals, which are complete; else MLflow's.

    Args:
        source: folder of a run, a trial or a search, or id or name of its MLflow run.
        tracking_uri: the store; None: the one that the folder was tracked in, else the usual default.

    Raises:
        InputError: there is none, it is something else (such as an evaluation), or the store cannot be reached and is
            needed.
    """
    found = tracked.locate(source, tracking_uri, sync=False, say=lambda line: None)
    if found.folder is not None:
        told = _local(found.folder)
        trials = tuple(_local(each) for each in folders(found.folder)[1:])
    else:
        assert found.store is not None
        assert found.run_id is not None
        told = _tracked(found.store, found.run_id, "")
        trials = tuple(_tracked(found.store, each, "eval/") for each in found.store.children(found.run_id))
    kind = told.record.tags.get("gru.kind")
    if kind not in KINDS:
        what = f"of kind {kind!r}" if kind else "no run of gru"
        raise InputError(f"{source}: {what}, allowed: a {', a '.join(KINDS)} (gru unlearn, gru search)")
    return Source(found, told, trials)


def _local(folder: Path) -> Told:
    entries, _ = journal.read(folder)
    times = [entry["time_ms"] for entry in entries if entry.get("time_ms")]
    record = journal.load(folder)
    baseline = inputs.read_baseline(folder / "baseline.json")
    scores = _retain_scores(record) or (baseline.retain.scores if baseline and baseline.retain else {})
    file = folder / "config.yaml"
    return Told(
        record,
        times[0] if times else None,
        times[-1] if times and record.status not in (None, "running") else None,
        scores,
        hide(file.read_text(encoding="utf-8")) if file.is_file() else "",
        folder,
        error=(worker.finished(folder) or {}).get("error"),
    )


def _tracked(store: Mlflow, run_id: str, prefix: str) -> Told:
    record, _ = store.record(run_id, prefix)
    notes = {int(key.removeprefix(NOTE)): text for key, text in record.tags.items() if key.startswith(NOTE)}
    record = journal.Record(
        record.name, record.tags, record.params, record.metrics, record.status, tuple(notes[n] for n in sorted(notes))
    )
    began, ended = store.times(run_id)
    config = hide("".join(f"{key}: {_yaml(value)}\n" for key, value in record.params.items()))
    return Told(record, began, ended, _retain_scores(record), config, None, run_id)


def _yaml(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def _retain_scores(record: journal.Record) -> dict[str, float]:
    first = record.metrics.get(0, {})
    return {key.removeprefix(RETAIN_MODEL): v for key, v in first.items() if key.startswith(RETAIN_MODEL)}
