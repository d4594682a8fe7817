"""The trade-off of a search: tracked runs -> frontier of each family, hypervolumes, knee, table, pictures.

Every evaluated step of every trial past step 0 is a candidate, collapsed trials included; step 0 is the start
model, the same for all. Definitions: ``gru_core.frontier``.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gru_core.errors import InputError, StorageError
from pipelines import journal, tracked

Say = Callable[[str], None]
Document = dict[str, Any]
ORDER = ("plain", "sum", "rectified")
_FEW = 5
"""Trials of a family below which a difference between families says nothing."""
ENDED = ("finished", "collapsed", "non_finite")
"""Statuses of a trial that used its budget; any other trial is incomplete."""


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    ``points`` are its evaluated steps, as ``journal.evaluated`` gives them.
    """

    name: str
    family: str
    status: str | None
    params: Mapping[str, journal.Scalar] = field(default_factory=dict)
    points: Sequence[Mapping[str, Any]] = ()
    run_id: str | None = None
    scored: bool = False
    """Rows that score retention were trained on."""


def trial_of(record: journal.Record, run_id: str | None = None) -> Trial:
    """A trial from its journal, or from the record that MLflow keeps of it."""
    tags = record.tags
    return Trial(
        tags.get("gru.trial") or record.name,
        tags.get("gru.family") or "run",
        record.status,
        record.params,
        journal.evaluated(record.metrics),
        run_id,
        tags.get("gru.include_scored") == "true",
    )


def searched(trials: Sequence[Trial]) -> list[str]:
    """The dotted keys whose values differ between trials: what was searched, and what tells families apart."""
    keys = sorted({key for trial in trials for key in trial.params})
    skip = ("output.", "track.", "search.")
    return [
        key for key in keys if not key.startswith(skip) and len({repr(trial.params.get(key)) for trial in trials}) > 1
    ]


def flatten(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """All candidate points, marked: ``on_frontier`` (of all families), ``on_family_frontier``, ``knee``.

    A point is ``{trial, family, step, unlearning, retention, status, params, metrics}`` and the three marks.
    Of points with the same two scores only the first (by trial, then step) is marked.
    """
    from gru_core.frontier import knee

    keys = searched(trials)
    points: list[dict[str, Any]] = []
    for trial in sorted(trials, key=lambda each: (_rank(each.family), each.name)):
        params = {key: trial.params.get(key) for key in keys}
        for point in trial.points:
            if point["step"] > 0:
                scores = {key: point[key] for key in ("step", "unlearning", "retention")}
                metrics = {key: value for key, value in sorted(point.items()) if key not in scores}
                names = {"trial": trial.name, "family": trial.family, "status": trial.status}
                points.append({**names, **scores, "params": params, "metrics": metrics})
    best = _front(points)
    chosen = best[knee([_pair(point) for point in best])] if best else None
    families = {point["family"] for point in points}
    fronts = [each for family in families for each in _front([p for p in points if p["family"] == family])]
    for point in points:
        point["on_frontier"] = any(point is each for each in best)
        point["on_family_frontier"] = any(point is each for each in fronts)
        point["knee"] = point is chosen
    return points


def _front(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that none beats in both scores, by rising unlearning, one for each pair of scores."""
    from gru_core.frontier import pareto

    first: dict[tuple[float, float], dict[str, Any]] = {}
    for place in sorted(pareto([_pair(point) for point in points])):
        first.setdefault(_pair(points[place]), points[place])
    return [first[pair] for pair in sorted(first, key=lambda pair: (pair[0], -pair[1]))]


def _pair(point: Mapping[str, Any]) -> tuple[float, float]:
    return (point["unlearning"], point["retention"])


def _rank(family: str) -> tuple[int, str]:
    return (ORDER.index(family) if family in ORDER else len(ORDER), family)


def family_table(trials: Sequence[Trial], points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each family: trials, how they ended, evaluations planned and made, hypervolume."""
    from gru_core.frontier import hypervolume

    table: dict[str, dict[str, Any]] = {}
    for family in sorted({trial.family for trial in trials}, key=_rank):
        mine = [trial for trial in trials if trial.family == family]
        ended = [trial for trial in mine if trial.status in ENDED]
        own = [point for point in points if point["family"] == family]
        table[family] = {
            "trials": len(mine),
            "collapsed": sum(trial.status in {"collapsed", "non_finite"} for trial in mine),
            "incomplete": len(mine) - len(ended),
            "planned_evaluations": sum(_planned(trial) for trial in ended),
            "points": len(own),
            "on_frontier": sum(point["on_frontier"] for point in own),
            "hypervolume": hypervolume([_pair(point) for point in own]) if own else 0.0,
        }
    return table


def _planned(trial: Trial) -> int:
    """Evaluations after step 0 that the trial's settings provide for; what was made, where they do not say."""
    steps, every = trial.params.get("unlearn.steps"), trial.params.get("unlearn.evaluate_every")
    if isinstance(steps, int) and isinstance(every, int):
        return math.ceil(steps / every)
    return sum(point["step"] > 0 for point in trial.points)


def comparable(families: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every family had the same budget: as many trials run to their end, as many evaluations planned."""
    budgets = {(each["trials"] - each["incomplete"], each["planned_evaluations"]) for each in families.values()}
    return len(budgets) <= 1


def summarise(name: str, trials: Sequence[Trial]) -> tuple[Document, list[dict[str, Any]]]:
    """The frontier document of a search, and all its points. Pure: reads and writes nothing."""
    points = flatten(trials)
    families = family_table(trials, points)
    volumes = {family: each["hypervolume"] for family, each in families.items()}
    ours = volumes.get("rectified")
    gain = {f"over_{other}": ours - v for other, v in volumes.items() if ours is not None and other != "rectified"}
    first = trials[0].params if trials else {}
    document: Document = {
        "search": name,
        "frontier": sorted((p for p in points if p["on_frontier"]), key=_pair),
        "families": families,
        "hypervolume": volumes,
        "gain": gain,
        "comparable": comparable(families),
        "knee": next((point for point in points if point["knee"]), None),
        "axes": {key: first.get(f"evaluate.{key}") or key for key in ("unlearning", "retention")},
        "searched": searched(trials),
        "notes": _notes(trials, families, gain),
    }
    return document, points


def _notes(trials: Sequence[Trial], families: Mapping[str, Mapping[str, Any]], gain: Mapping[str, float]) -> list[str]:
    notes = []
    if not comparable(families):
        notes.append("budgets differ: hypervolumes not comparable")
    else:
        for key, value in gain.items():
            other = key.removeprefix("over_")
            base = families[other]["hypervolume"]
            share = f" ({abs(value) / base:.1%})" if base > 0 else ""
            word = "more" if value > 0 else "less"
            notes.append(
                f"rectified covers {abs(value):.3f}{share} {word} of the trade-off than {other}"
                if value
                else f"rectified covers as much of the trade-off as {other}"
            )
        if gain and len({trial.params.get("train.seed") for trial in trials}) == 1:
            few = min((len([t for t in trials if t.family == f]) for f in {t.family for t in trials}), default=0)
            many = "one seed: a small difference may be chance"
            notes.append(many if few >= _FEW else f"one seed and {few} trial(s) a family: no conclusion can be drawn")
    incomplete = sum(each["incomplete"] for each in families.values())
    if incomplete:
        notes.append(f"{incomplete} trial(s) did not run to their end (failed, stopped or still running)")
    if any("retain_model" in trial.params and trial.params["retain_model"] is None for trial in trials):
        notes.append("no retain model: unlearning 1 means that the forget metric is 0")
    if any(trial.scored for trial in trials):
        notes.append("rows that score retention were trained on (retain.include_scored)")
    if not any(point["step"] > 0 for trial in trials for point in trial.points):
        notes.append("no trial was evaluated: there is no frontier")
    return notes


def build(
    source: str,
    *,
    tracking_uri: str | None = None,
    out: Path | None = None,
    sync: bool = False,
    say: Say = lambda line: None,
) -> Document:
    """Recomputes the frontier of a search from its tracked runs, and stores it beside them.

    Args:
        source: a search folder, or id or name of its MLflow run.
        tracking_uri: the store; null: the one that the folder was tracked in, else the usual default.
        out: folder for the files; null: the search folder (``frontier-NAME`` here, where there is none).
        sync: first deliver what the folder's journals have and MLflow lacks.
        say: prints a line to the user.

    Returns:
        ``{search, folder, frontier, families, hypervolume, gain, comparable, knee, axes, searched, notes,
        artifacts: {png, html, csv, json}, tracking_uri, run_id}``.

    Raises:
        InputError: no such search; a store that cannot be reached, where nothing else has the runs.
        StorageError: the files cannot be written.
    """
    from pipelines.stores import hide

    found = tracked.gather(source, tracking_uri, sync=sync, say=say)
    trials = [trial_of(record, run_id) for record, run_id in found.records]
    if not trials:
        raise InputError(f"{source}: the search has no trials yet")
    document, points = summarise(found.name, trials)
    document["notes"] += found.notes
    document["folder"] = str(found.folder) if found.folder else None
    document["tracking_uri"], document["run_id"] = hide(found.uri), found.run_id
    plain = re.sub(r"[^\w.-]+", "-", found.name)  # whoever can write to the store chose the name
    target = out or found.folder or Path(f"frontier-{plain}")
    document["artifacts"] = write(document, points, target)
    for note in found.notes:
        say(note)
    if found.store is not None and found.run_id is not None:
        tracked.publish(found, document, points, {trial.name: trial.run_id for trial in trials}, say)
    return document


def write(document: Document, points: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, str]:
    """Writes ``frontier.{csv,png,html,json}`` and returns their paths by kind."""
    from pipelines import plots

    folder = folder.resolve()
    files = {kind: folder / f"frontier.{kind}" for kind in ("png", "html", "csv", "json")}
    artifacts = {kind: str(path) for kind, path in files.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(points, files["csv"])
        plots.png(document, points, files["png"])
        plots.html(document, points, files["html"])
        text = json.dumps({**document, "artifacts": artifacts}, indent=1)
        files["json"].write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"the frontier cannot be written to {folder}: {error.strerror or error}") from error
    return artifacts


def _write_csv(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    marks = [
        "trial",
        "family",
        "step",
        "unlearning",
        "retention",
        "on_frontier",
        "on_family_frontier",
        "knee",
        "status",
    ]
    params = list(dict.fromkeys(key for point in points for key in point["params"]))
    metrics = list(dict.fromkeys(key for point in points for key in point["metrics"]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(marks + params + metrics)
        for point in points:
            row = [point[key] for key in marks] + [point["params"].get(key) for key in params]
            writer.writerow(row + [point["metrics"].get(key) for key in metrics])
