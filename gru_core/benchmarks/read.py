"""Reads rows from JSON files; every error names file and line, none repeats what stands there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gru_core.batch import Row
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.errors import InputError

Located = tuple[str, Mapping[str, Any]]
"""Where an object stands (``forget.jsonl, line 3``) and the object."""


def read_objects(path: Path) -> list[Located]:
    """The JSON objects of a file: one per line (empty lines are skipped), or one JSON array of them.

    Both are recognised by content, whatever the file is called. Places are ``line N`` in the first case and
    ``item N`` in the second, both counted from 1.

    Raises:
        InputError: no such file, not UTF-8, malformed JSON, something else than objects, nothing in it.
    """
    text = _text(path)
    if text.lstrip().startswith("["):
        items = _parse(text, path, first_line=1)
        found = [(f"{path}, item {i}", item) for i, item in enumerate(items, start=1)]
    else:  # not str.splitlines: it also splits at U+2028, which may stand in a JSON string
        lines = enumerate(text.split("\n"), start=1)
        found = [(f"{path}, line {n}", _parse(line, path, n)) for n, line in lines if line.strip()]
    if not found:
        raise InputError(f"{path} is empty: at least one row is needed")
    for place, item in found:
        if not isinstance(item, dict):
            raise InputError(f"{place}: expected a JSON object, got {type(item).__name__}")
    return found


def read_table(path: Path) -> list[Located]:
    """The rows of a file that is JSON (:func:`read_objects`) or, by its ending, Parquet. A Parquet file's places are
    ``row N`` from 0.

    Raises:
        InputError: as :func:`read_objects`, or not a Parquet file.
    """
    if path.suffix != ".parquet":
        return read_objects(path)
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except (OSError, pyarrow.ArrowException) as error:  # their messages could quote what stands in the file
        raise InputError(f"{path} cannot be read as Parquet ({type(error).__name__})") from None
    if not rows:
        raise InputError(f"{path} is empty: at least one row is needed")
    return [(f"{path}, row {n}", row) for n, row in enumerate(rows)]


def _text(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"{path} is a folder, a file was expected")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text") from None


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{path}, line {line}: malformed JSON (column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, endless nesting
        raise InputError(f"{path}, line {first_line}: malformed JSON") from None


def text_of(item: Mapping[str, Any], column: str, place: str) -> str:
    """A column that must hold text.

    Raises:
        InputError: missing, not a string, blank, or with half a surrogate pair in it.
    """
    if column not in item:
        raise InputError(f"{place}: column {column!r} is missing")
    return _checked(item[column], column, place)


def texts_of(item: Mapping[str, Any], column: str, place: str) -> tuple[str, ...]:
    """A column that must hold a list of texts, at least one.

    Raises:
        InputError: as :func:`text_of`, or not a list, or an empty one.
    """
    if column not in item:
        raise InputError(f"{place}: column {column!r} is missing")
    values = item[column]
    if not isinstance(values, list | tuple):
        raise InputError(f"{place}: column {column!r} must be a list of texts, got {type(values).__name__}")
    if not values:
        raise InputError(f"{place}: column {column!r} is an empty list")
    return tuple(_checked(value, column, place) for value in values)


def _checked(value: object, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place}: column {column!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{place}: column {column!r} is an empty string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: column {column!r} holds half a surrogate pair, which is no text") from None
    return value


def key(row: Row | EvalRow) -> tuple[str, str]:
    """What makes two rows the same: prompt and answer, up to white space. A question alone is no key."""
    return " ".join(row.prompt.split()), " ".join(row.answer.split())


def positions(retain: Sequence[Row], scored: Sequence[EvalRow]) -> frozenset[int]:
    """Positions in ``retain`` of all rows that stand in ``scored`` too, repeated rows included."""
    keys = {key(row) for row in scored}
    return frozenset(i for i, row in enumerate(retain) if key(row) in keys)


def check_apart(benchmark: Benchmark) -> None:
    """Refuses a benchmark with a row that is both to be forgotten and to be kept, or is held out and learned.

    Raises:
        InputError: counts such rows and names the first five by id.
    """
    _apart(benchmark.forget, "forget", benchmark.retain, "retain")
    held_out = benchmark.scored.get("holdout", ())
    for rows, name in ((benchmark.forget, "forget"), (benchmark.retain, "retain")):
        _apart(held_out, "holdout", rows, name)


def _apart(rows: Sequence[Row | EvalRow], name: str, others: Sequence[Row], other: str) -> None:
    known: dict[tuple[str, str], str] = {}
    for row in others:
        known.setdefault(key(row), row.id)
    both = [(row.id, known[key(row)]) for row in rows if key(row) in known]
    if both:
        named = ", ".join(f"{mine} = {theirs}" for mine, theirs in both[:5])
        more = ", ..." if len(both) > 5 else ""
        raise InputError(
            f"{len(both)} of {len(rows)} {name} rows stand in the {other} set too"
            f" ({name} row = {other} row): {named}{more}"
        )
