"""What requests came to, as files and as lines: a table and a picture of every score over the requests."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import report
from pipelines.plots import INK, STYLES

GIVEN = ("request", "split", "forget_rows", "status", "steps")
"""Columns of a point that are no scores."""
FIRST = ("unlearning", "retention")
COLUMNS = 3
"""Panels in a row of the picture."""

Document = Mapping[str, Any]


def scores(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the scores, the two of the trade-off first."""
    names = dict.fromkeys(name for point in points for name in point if name not in GIVEN)
    return [*FIRST, *sorted(set(names) - set(FIRST))]


def write(document: Document, folder: Path) -> dict[str, str]:
    """Writes ``requests.csv``, ``.json`` and ``.png`` into ``folder``; their paths by kind."""
    files = {kind: folder / f"requests.{kind}" for kind in ("csv", "json", "png")}
    points = document["points"]
    with files["csv"].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*GIVEN, *scores(points)])
        writer.writeheader()
        writer.writerows(points)
    files["json"].write_text(json.dumps(document, indent=1) + "\n")
    png(document, files["png"])
    return {kind: str(path) for kind, path in files.items()}


def axis(document: Document) -> tuple[str, str]:
    """What the scores are drawn over: the requests in their order, or the rows to forget. Key and title."""
    if document["sequential"]:
        return "request", "requests, one after the other"
    return "forget_rows", "rows to forget"


def png(document: Document, path: Path) -> None:
    """A panel for each score."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    key, title = axis(document)
    points = sorted(document["points"], key=lambda point: point[key])
    names = scores(points)
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 2.6 * rows + 0.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    colour, marker = STYLES["rectified"][:2]
    for panel, name in zip(panels, names, strict=False):
        there = [point for point in points if name in point]
        panel.plot([p[key] for p in there], [p[name] for p in there], color=colour, marker=marker, linewidth=1.6)
        panel.set_title(heading(document, name), loc="left", color=INK, fontsize=9)
        panel.set_xticks(sorted({point[key] for point in points}))
        if name in FIRST:
            panel.set_ylim(-0.03, 1.05)
        panel.grid(color="#E4E4E4", linewidth=0.7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.supxlabel(title, fontsize=10, color=INK)
    figure.savefig(path, metadata={"Software": None})


def heading(document: Document, name: str) -> str:
    """A score's title; of the two of the trade-off with the metric behind it."""
    source = document["axes"].get(name)
    return f"{name}, from {source.replace('_', ' ')}" if source else name.replace("_", " ")


def lines(document: Document) -> list[str]:
    """The table for people, as wide as fits, and where the rest is."""
    how = "one after the other" if document["sequential"] else "each from the same start"
    points = document["points"]
    columns = ["request", "split", "forget_rows", "status", *scores(points)]
    rows = report.table(points, columns)
    shown = len(columns)
    while shown > len(GIVEN) and max(map(len, rows)) > report.WIDTH:
        shown -= 1
        rows = report.table(points, columns[:shown])
    out = [f"{len(points)} requests in {document['requests']}, {how}:", *rows]
    if shown < len(columns):
        out.append(f"  ({len(columns) - shown} more scores: see the csv)")
    out += [f"{kind}: {path}" for kind, path in document["artifacts"].items()]
    return [*out, f"browse it: {report.open_mlflow(document['tracking_uri'])}"]
