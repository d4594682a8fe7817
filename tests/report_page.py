"""A run folder with everything that a report can show, written without training; and a reader of the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from gru_core.config import RunConfig
from pipelines import settings
from pipelines.journal import Journal

START = {"extraction_strength": 0.9, "model_utility": 0.6125, "forget_quality": 1.5e-17, "privleak": -61.25}
END = {"extraction_strength": 0.2857142857142857, "model_utility": 0.5875, "forget_quality": 0.03125, "privleak": -9.5}
RETAIN = {"extraction_strength": 0.0625, "model_utility": 0.625, "forget_quality": 1.0}
ENDS = {"unlearning": 0.7334525939177102, "retention": 0.9591836734693877}
ROBUST = {
    "relearn": 0.8, "relearn/step_5": 0.45, "relearn/step_20": 0.8, "relearn_retain/step_10": 0.3125,
    "quantise": 0.55, "quantise/8_bit": 0.29, "quantise/4_bit": 0.55,
}  # fmt: skip
ROWS = {"forget": 40, "retain": 3600, "retain.trained": 400, "scored.forget": 40, "scored.holdout": 41}


def write_run(
    folder: Path, *, name: str = "a run", robust: bool = False, status: str | None = "finished",
    notes: tuple[str, ...] = (), steps: int = 20, evaluated: bool = True, tags: dict[str, str] | None = None,
    values: dict[str, Any] | None = None, retain: bool = True,
) -> Path:  # fmt: skip
    """Scores at step 0 and at the end, losses at every step, gradients in conflict at every fourth."""
    given = {"unlearn.steps": 20, "unlearn.lr": 3e-4, "retain.size": 400, "retain_model": "owner/retain"}
    config = settings.with_values(RunConfig(), given | (values or {}) | ({} if retain else {"retain_model": None}))
    last = END | ENDS | (ROBUST if robust else {})
    with Journal(folder) as journal:
        rows = {f"gru.rows.{key}": str(count) for key, count in ROWS.items()}
        hashes = {f"gru.sha256.{key}": f"{place:064x}" for place, key in enumerate(ROWS) if "trained" not in key}
        known = {"gru.kind": "run", "gru.benchmark": "tofu/forget01", "gru.parameters": "1234567"}
        journal.run(name, known | {"gru.parameters.trained": "1234567"} | rows | hashes | (tags or {}))
        journal.params(settings.flat(config))
        for note in notes:
            journal.note(note)
        for step in range(steps + 1):
            if step:
                cosine = -0.25 if step % 4 == 0 else 0.5
                losses = {
                    "forget_loss": 2.0 + step,
                    "retain_loss": 0.5 / step,
                    "cosine": cosine,
                    "conflict": cosine < 0,
                }
                journal.metrics(step, {f"train/{key}": float(value) for key, value in losses.items()})
            if evaluated and step in (0, steps):
                scores = START | {"unlearning": 0.0, "retention": 1.0} if step == 0 else last
                journal.metrics(step, {f"eval/{key}": value for key, value in scores.items()})
            if evaluated and step == 0 and retain:
                journal.metrics(0, {f"retain_model/{key}": value for key, value in RETAIN.items()})
        if status is not None:
            journal.status(status)
    (folder / "config.yaml").write_text(settings.to_yaml(config))
    if status in ("finished", "collapsed"):
        (folder / "scores.json").write_text(json.dumps({"status": status, "steps": steps, "scores": last}))
    return folder


class Page(HTMLParser):
    """Tables by their caption, as rows of cells (a cell is its text, or the value of its number); text; elements."""

    VOID = frozenset({"meta", "br", "link", "path", "use", "rect"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._caption = ""
        self._rows: list[list[str]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag == "table":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "data" and self._rows:  # in a table
            self._put(f"={given['value']}")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        assert self._open.pop() == tag, f"</{tag}> closes nothing"
        if tag == "table":
            assert self._caption, "a table without a caption"
            self.tables[self._caption] = self._rows
            self._rows = []

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data
        elif {"td", "th"} & set(self._open) and "data" not in self._open and "span" not in self._open:
            self._put(data)

    def _put(self, text: str) -> None:
        self._rows[-1][-1] = (self._rows[-1][-1] + text).strip()

    def table(self, start: str) -> list[list[str]]:
        """The rows of the one table whose caption begins so, its head first."""
        (found,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return found

    def numbers(self, start: str) -> dict[str, list[float | None]]:
        """First cell to the numbers of its row, None where there is a dash."""
        out = {}
        for row in self.table(start)[1:]:
            cells = [cell for cell in row[1:] if cell.startswith("=") or cell == "–"]
            out[row[0]] = [None if cell == "–" else float(cell[1:]) for cell in cells]
        return out
