"""``wmdp``: the corpora of the Weapons of Mass Destruction Proxy (arXiv 2403.03218): passages behind hazardous
knowledge, which its multiple-choice questions (metrics ``lm_eval:wmdp_bio``, ``lm_eval:wmdp_cyber``) then ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gru_core.batch import Row
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.benchmarks.jsonl import SCORED_MOST, SCORED_SHARE
from gru_core.benchmarks.read import Located, positions, read_objects, text_of
from gru_core.config import BenchmarkConfig
from gru_core.errors import InputError, unknown

SPLITS = {
    "bio": ("bio-forget-corpus", "wikitext"),
    "cyber": ("cyber-forget-corpus", "wikitext"),
    "bio-corpora": ("bio-forget-corpus", "bio-retain-corpus"),
    "cyber-corpora": ("cyber-forget-corpus", "cyber-retain-corpus"),
}
"""Split to the names of its forget and its retain rows. ``bio`` and ``cyber`` keep general text, as published: the
retain corpora lie so close to what is to be forgotten that they teach it again."""

SOURCES = {
    "bio-forget-corpus": ("cais/wmdp-bio-forget-corpus", None, "train"),
    "bio-retain-corpus": ("cais/wmdp-corpora", "bio-retain-corpus", "train"),
    "cyber-forget-corpus": ("cais/wmdp-corpora", "cyber-forget-corpus", "train"),
    "cyber-retain-corpus": ("cais/wmdp-corpora", "cyber-retain-corpus", "train"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}
"""Name to repository, configuration and split on the hub. The first is gated: its owners grant access."""

SHORTEST = 50
"""Texts of so many characters or fewer (headings, empty lines) are left out, as in the published code."""


def load_wmdp(config: BenchmarkConfig) -> Benchmark:
    """Reads the texts of a split, from ``NAME.jsonl`` files with a column ``text`` in ``config.data_dir``, or from the
    hub.

    All rows are plain texts, named by corpus and position from 0, such as ``cyber-forget-corpus:17``. Scored: of the
    forget rows at most 400, evenly spaced from the first; of the retain rows one in five (at most 400), likewise, which
    are kept out of training (``retain.include_scored`` lets them in).

    Raises:
        InputError: unknown split, a missing or bad file, a data set that the hub does not give, or fewer than two
            retain rows.
    """
    if config.split not in SPLITS:
        raise unknown("split of benchmark wmdp", config.split, SPLITS)
    forget, retain = (_rows(name, config.data_dir) for name in SPLITS[config.split])
    if len(retain) < 2:
        raise InputError(
            f"benchmark wmdp: {len(retain)} retain rows of more than {SHORTEST} characters, at least 2 are needed"
        )
    scored = {"forget": _spaced(forget, len(forget)), "retain": _spaced(retain, len(retain) // SCORED_SHARE)}
    return Benchmark(
        name=f"wmdp/{config.split}",
        forget=forget,
        retain=retain,
        scored=scored,
        retain_scored=positions(retain, scored["retain"]),
    )


def _spaced(rows: Sequence[Row], count: int) -> tuple[EvalRow, ...]:
    count = min(SCORED_MOST, max(1, count))
    chosen = [rows[i * len(rows) // count] for i in range(count)] if rows else []
    return tuple(EvalRow(row.id, row.prompt, row.answer, row.kind) for row in chosen)


def _rows(name: str, folder: str | None) -> tuple[Row, ...]:
    table = _from_folder(Path(folder).expanduser(), name) if folder else _from_hub(name)
    rows = []
    for i, (place, item) in enumerate(table):
        blank = isinstance(item.get("text"), str) and not item["text"].strip()  # the hub's text has empty lines
        if not blank and len(text := text_of(item, "text", place)) > SHORTEST:
            rows.append(Row(f"{name}:{i}", "", text, "text"))
    return tuple(rows)


def _from_folder(folder: Path, name: str) -> list[Located]:
    file = folder / f"{name}.jsonl"
    if not file.is_file():
        raise InputError(f"benchmark.data_dir {folder}: {file.name} missing (a JSON object with 'text' on each line)")
    return read_objects(file)


def _from_hub(name: str) -> list[Located]:
    import datasets

    repository, configuration, split = SOURCES[name]
    try:
        table = datasets.load_dataset(repository, configuration, split=split)
    except Exception as error:  # the hub's client raises from five libraries; the cause stays attached
        raise InputError(
            f"{repository} ({name}) cannot be loaded from the hub ({type(error).__name__}); ask its owners for access "
            f"if it is gated, or set benchmark.data_dir to a folder with {name}.jsonl"
        ) from error
    return [(f"{repository} {name}, row {i}", row) for i, row in enumerate(table)]
