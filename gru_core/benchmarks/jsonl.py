"""``jsonl``: the user's own forget and retain files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gru_core.batch import Row
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.benchmarks.read import positions, read_objects, text_of, texts_of
from gru_core.config import BenchmarkConfig
from gru_core.errors import ConfigError, InputError

FORMS = {"qa": ("question", "answer"), "completion": ("prompt", "completion"), "text": ("text",)}
"""Row kind to its columns. A row has the columns of exactly one; rows of several kinds may share a file."""

EXTRA = ("paraphrased_answer", "perturbed_answer")
"""Optional columns of question-answer rows: a text, and a list of wrong answers."""

SCORED_SHARE, SCORED_MOST = 5, 400


def load_jsonl(config: BenchmarkConfig) -> Benchmark:
    """Reads ``config.forget``, ``config.retain``, and ``config.holdout`` where it is set: JSON Lines, or one JSON
    array, of rows.

    A row is ``question`` and ``answer`` (with ``paraphrased_answer`` and ``perturbed_answer``, a list, if you
    have them), ``prompt`` and ``completion``, or ``text``. Other columns are left alone. A row's id is its
    set and its line (in an array: its number from 1), such as ``forget:17``.

    Scored: every forget row; and of the retain rows one in five (at most 400, at least one), evenly spaced from
    the first, which are kept out of training (``retain.include_scored`` lets them in).

    Raises:
        ConfigError: no file named.
        InputError: a bad file (with line), or fewer than two retain rows.
    """
    forget_path, retain_path = _path(config.forget, "forget"), _path(config.retain, "retain")
    forget, retain = _read(forget_path, "forget"), _read(retain_path, "retain")
    if len(retain) < 2:
        raise InputError(f"{retain_path} has 1 row, at least 2 are needed: one to train on, one to score")
    count = min(SCORED_MOST, max(1, len(retain) // SCORED_SHARE))
    chosen = tuple(retain[i * len(retain) // count] for i in range(count))
    rows = tuple(_row(row) for row in retain)
    scored = {"forget": tuple(forget), "retain": chosen}
    if config.holdout:
        scored["holdout"] = tuple(_read(_path(config.holdout, "holdout"), "holdout"))
    return Benchmark(
        name=f"jsonl/{forget_path.stem}",
        forget=tuple(_row(row) for row in forget),
        retain=rows,
        scored=scored,
        retain_scored=positions(rows, chosen),
    )


def _path(given: str | None, name: str) -> Path:
    if not given:
        raise ConfigError(f"benchmark.{name}", given, f"the JSON Lines file of the rows to {name}")
    return Path(given).expanduser()


def _row(row: EvalRow) -> Row:
    return Row(row.id, row.prompt, row.answer, row.kind)


def _read(path: Path, name: str) -> Sequence[EvalRow]:
    """All rows of one file with what scores them."""
    return [_eval_row(item, place, f"{name}:{place.rsplit(' ', 1)[1]}") for place, item in read_objects(path)]


def _eval_row(item: Mapping[str, Any], place: str, row_id: str) -> EvalRow:
    item = {column: value for column, value in item.items() if value is not None}  # exports write null for none
    kind = _kind(item, place)
    columns = [text_of(item, column, place) for column in FORMS[kind]]
    prompt, answer = columns if len(columns) == 2 else ("", columns[0])
    extra = [column for column in EXTRA if column in item]
    if extra and kind != "qa":
        raise InputError(f"{place}: column {extra[0]!r} goes with 'question' and 'answer' only")
    return EvalRow(
        id=row_id,
        prompt=prompt,
        answer=answer,
        kind=kind,
        paraphrase=text_of(item, EXTRA[0], place) if EXTRA[0] in extra else None,
        perturbed=texts_of(item, EXTRA[1], place) if EXTRA[1] in extra else (),
    )


def _kind(item: Mapping[str, Any], place: str) -> str:
    """The one form whose columns are all there."""
    whole = [kind for kind, columns in FORMS.items() if all(column in item for column in columns)]
    if len(whole) == 1:
        return whole[0]
    accepted = "; ".join(" and ".join(map(repr, columns)) for columns in FORMS.values())
    if whole:
        raise InputError(f"{place}: has the columns of {len(whole)} forms, one is allowed ({accepted})")
    missing = [c for columns in FORMS.values() for c in columns if c not in item and any(d in item for d in columns)]
    what = f"column {missing[0]!r} is missing" if missing else "no known column"
    raise InputError(f"{place}: {what} (accepted: {accepted})")
