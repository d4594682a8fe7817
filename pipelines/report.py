"""Results as lines for people; ``--json`` prints the same documents whole."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gru_core.config import TrackConfig
from pipelines import settings
from pipelines.stores import hide, resolve_uri

WIDTH = 140
"""Longest line of a table, characters."""


def prepared(document: Mapping[str, Any]) -> list[str]:
    """Where target and retain model lie."""
    made = "reused from the cache" if document["cached"] else "trained"
    return [f"target model: {document['target']} ({made})", f"retain model: {document['retain']} ({made})"]


def run(document: Mapping[str, Any]) -> list[str]:
    """Scores of one run, step by step, and where its model is."""
    lines = [f"run {document['run']}: {document['status']} after {document['steps']} steps"]
    lines += table(document["points"], ("step", "unlearning", "retention"))
    lines += [f"{name}: {number(value)}" for name, value in sorted(document["scores"].items())]
    if document.get("model"):
        lines.append(f"model: {document['model']}")
    merged = Path(document["run"]) / "merged"
    if merged.is_dir():
        lines[-1] = f"adapter: {document['model']}"
        lines.append(f"merged model: {merged}")
    return [*lines, f"browse it: {open_mlflow(document['tracking_uri'])}"]


def exported(document: Mapping[str, Any]) -> list[str]:
    """Of ``gru export``."""
    at = f", after step {document['step']}" if document["step"] is not None else ""
    out = [f"{document['kind']}: {document['model']} ({document['bytes'] / 1e6:.1f} MB{at})"]
    if base := document["base"]:
        out.append(f"it needs its starting model, {base}; --merged writes one model that stands alone")
    return out


def evaluated(document: Mapping[str, Any]) -> list[str]:
    """Of ``gru evaluate``: a line for each score, the retain model's beside it."""
    what = document.get("model") or f"{document['log']} (a log of {document['source']})"
    lines = [f"{what}: {', '.join(f'{n} {name}' for name, n in document['rows'].items())} rows"]
    others = document.get("retain_scores") or {}
    width = max(map(len, document["scores"]))
    for name, value in document["scores"].items():
        beside = f"   retain model {number(others[name])}" if name in others else ""
        lines.append(f"  {name:<{width}}  {number(value)}{beside}")
    lines += [f"note: {note}" for note in document["notes"]]
    return [*lines, f"rows and scores: {document['folder']}"]


def search(document: Mapping[str, Any]) -> list[str]:
    """Frontier points, hypervolumes, pictures, and the command that opens MLflow."""
    points = document["frontier"]
    first = [name for name in ("family", "unlearning", "retention", "trial", "step") if any(name in p for p in points)]
    shown = varied(points)
    rows = table(points, first, shown)
    while shown and max(map(len, rows)) > WIDTH:
        shown = shown[:-1]
        rows = table(points, first, shown)
    lines = [f"frontier of {document['search']}: {len(points)} points", *rows]
    if hidden := len(varied(points)) - len(shown):
        lines.append(f"  ({hidden} more searched settings: see the csv)")
    lines.append("hypervolume (reference point 0, 0; larger is better):")
    for family, value in sorted(document["hypervolume"].items(), key=lambda item: -item[1]):
        lines.append(f"  {family:<12} {number(value)}")
    if knee := document.get("knee"):
        lines.append(f"knee (farthest from the line between the frontier's ends): {knee['trial']}, step {knee['step']}")
        lines += [f"take it: {command}" for command in take(document, knee)]
    lines += [f"note: {note}" for note in document.get("notes", ())]
    lines += [f"{name}: {path}" for name, path in document["artifacts"].items()]
    return [*lines, f"browse it: {open_mlflow(document['tracking_uri'])}"]


def take(document: Mapping[str, Any], point: Mapping[str, Any]) -> list[str]:
    """The command that makes the model of a point again: its trial's config, ended at its step."""
    if not document.get("folder"):
        return []
    config = Path(document["folder"]) / "trials" / str(point["trial"]) / "config.yaml"
    if not config.is_file() or settings.load(str(config)).unlearn.schedule != "constant":
        return []  # under another schedule a shorter run takes other steps
    chosen = Path(document["folder"]).with_name(f"{Path(document['folder']).name}-chosen")
    words = ["gru", "unlearn", "-c", str(config), "--set", f"unlearn.steps={point['step']}", "--output", str(chosen)]
    return [shlex.join(words)]


def job(document: Mapping[str, Any]) -> list[str]:
    """A job as the cluster describes it."""
    return [f"{name}: {value}" for name, value in document.items() if value and not isinstance(value, Mapping)]


def varied(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names under ``params`` whose value differs between points.

    Of a rule's settings only those that differ within a family: what the families differ in is in their names.
    """
    names = dict.fromkeys(name for point in points for name in point.get("params", {}))
    return [name for name in names if _differs(name, points)]


def _differs(name: str, points: Sequence[Mapping[str, Any]]) -> bool:
    values: dict[Any, set[str]] = {}
    for point in points:
        group = point.get("family") if name.startswith("rectify.") else None
        values.setdefault(group, set()).add(str(point.get("params", {}).get(name)))
    return any(len(each) > 1 for each in values.values())


def table(points: Sequence[Mapping[str, Any]], columns: Sequence[str], params: Sequence[str] = ()) -> list[str]:
    """Aligned rows under their column names; nothing where there are no points."""
    if not points:
        return []
    tails = [name.rpartition(".")[2] for name in params]
    heads = [tail if tails.count(tail) == 1 else name for name, tail in zip(params, tails, strict=True)]
    rows = [[*columns, *heads]]
    for point in points:
        given = point.get("params", {})
        rows.append([number(point.get(name)) for name in columns] + [number(given.get(name)) for name in params])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def number(value: object) -> str:
    """Four significant digits; nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def open_mlflow(uri: str) -> str:
    """What opens MLflow over this store from the working folder."""
    if uri.startswith(("http://", "https://")):
        return hide(uri)
    if uri == resolve_uri(TrackConfig()):
        return "gru ui"
    return f"gru ui --tracking-uri {shlex.quote(uri)}"


def best(hypervolume: Mapping[str, float], trials: int, comparable: bool = True) -> str:
    """One sentence: does rectification help here? Computed from the hypervolumes, whatever they are.

    Args:
        trials: runs of each family.
        comparable: whether every family ran to the end of the same budget.
    """
    rivals = {name: value for name, value in hypervolume.items() if name != "rectified"}
    if "rectified" not in hypervolume or not rivals:
        return f"Nothing to compare: the families are {', '.join(hypervolume)}."
    ours, shown = hypervolume["rectified"], " and ".join(f"{n} {number(v)}" for n, v in rivals.items())
    if not comparable:
        return f"The families ran on different budgets, so their hypervolumes cannot be compared ({shown})."
    budget = f"equal budgets of {trials} trials each, one seed"
    ahead = [name for name, value in rivals.items() if not ours > value]
    if not ahead:
        return f"Rectification helps here: hypervolume {number(ours)} against {shown} ({budget})."
    return (
        f"Rectification does not win here: its hypervolume {number(ours)} is not above that of "
        f"{' and '.join(ahead)} ({shown}; {budget})."
    )
