"""``authors``: biographies of authors that never lived, made up from a seed. Needs no file and no network.

In the manner of TOFU (arXiv 2401.06121): 100 authors with 9 question-answer rows each are trained on, the last
1, 5 or 10 of them are to be forgotten, 10 more (the holdout) are never shown to any model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gru_core.batch import Row
from gru_core.benchmarks.authors_text import POOLS, TOPICS
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.benchmarks.general_facts import real_authors, world_facts
from gru_core.benchmarks.read import positions
from gru_core.config import BenchmarkConfig
from gru_core.errors import unknown

T = TypeVar("T")

AUTHORS, HOLDOUT = 100, 10

FORGOTTEN = {"forget01": 1, "forget05": 5, "forget10": 10}
"""Forget split to its number of authors."""

SCORED_EVERY = 8
"""One retain row in so many scores retention. It has no divisor in common with the rows of an author, so that
every author and every topic takes part."""

WRONG = 5
"""Wrong answers per row."""


def load_authors(config: BenchmarkConfig) -> Benchmark:
    """The benchmark of ``config.seed``: the same texts on every machine, and in every split.

    Rows are named by author and topic, such as ``author93:4``, both from 0. Background are the rows behind the
    scored sets ``authors`` (who wrote a classic) and ``facts``, so that trained models know them.

    Raises:
        InputError: unknown split.
    """
    forgotten = _forgotten(config)
    rows = _biographies(config.seed)
    by_author = [rows[i : i + len(TOPICS)] for i in range(0, len(rows), len(TOPICS))]
    border, end = AUTHORS - forgotten, AUTHORS
    forget = [row for author in by_author[border:end] for row in author]
    retain = [row for author in by_author[:border] for row in author]
    real, facts = real_authors(), world_facts()
    scored = tuple(retain[::SCORED_EVERY])
    retain_rows = tuple(map(_row, retain))
    seed = f"/seed-{config.seed}" if config.seed else ""
    return Benchmark(
        name=f"authors/{config.split}{seed}",
        forget=tuple(map(_row, forget)),
        retain=retain_rows,
        scored={"forget": tuple(forget), "retain": scored, "authors": real, "facts": facts},
        background=tuple(map(_row, real + facts)),
        retain_scored=positions(retain_rows, scored),
    )


def holdout(config: BenchmarkConfig) -> tuple[Row, ...]:
    """Rows of authors that no model is trained on, as many as the split forgets.

    They use the words and sentences of the other authors: forgotten rows should look like them.

    Raises:
        InputError: unknown split.
    """
    first = AUTHORS * len(TOPICS)
    rows = _biographies(config.seed)[first : first + _forgotten(config) * len(TOPICS)]
    return tuple(map(_row, rows))


def _forgotten(config: BenchmarkConfig) -> int:
    if config.split not in FORGOTTEN:
        raise unknown("split of benchmark authors", config.split, FORGOTTEN)
    return FORGOTTEN[config.split]


def _row(row: EvalRow) -> Row:
    return Row(row.id, row.prompt, row.answer, row.kind)


def _shuffled(source: random.Random, values: Sequence[T]) -> list[T]:
    copy = list(values)
    source.shuffle(copy)
    return copy


def _deal(source: random.Random, values: Sequence[T], count: int) -> list[T]:
    """``count`` values in random order, each about equally often: the first ``len(values)`` are all of them."""
    dealt: list[T] = []
    while len(dealt) < count:
        dealt += _shuffled(source, values)
    return dealt[:count]


def _names(source: random.Random, count: int) -> list[str]:
    """Distinct full names; every first and every last name occurs among the first 40."""
    first, last = _shuffled(source, POOLS["first"]), _shuffled(source, POOLS["last"])
    places = [(i % len(first), (i + 7 * (i // len(first))) % len(last)) for i in range(count)]
    return [f"{first[i]} {last[k]}" for i, k in places]


@dataclass(frozen=True)
class _Deck:
    """What all authors have for one topic: list position is the author."""

    questions: list[str]
    answers: list[tuple[str, str]]
    values: Mapping[str, list[str]]


def _deck(source: random.Random, number: int, count: int) -> _Deck:
    topic = TOPICS[number]
    values: dict[str, list[str]] = {}
    for slot, pool in topic.slots.items():
        taken = [values[other] for other in values if topic.slots[other] == pool]
        values[slot] = _deal_apart(source, POOLS[pool], taken, count)
    pairs = [*topic.answers, *((second, first) for first, second in topic.answers)]
    return _Deck(_deal(source, topic.questions, count), _deal(source, pairs, count), values)


def _deal_apart(source: random.Random, pool: Sequence[str], taken: list[list[str]], count: int) -> list[str]:
    """Deals values that differ, for each author, from the ``taken`` ones: the next value in the pool instead."""
    dealt = _deal(source, pool, count)
    for author, value in enumerate(dealt):
        while any(value == other[author] for other in taken):
            value = pool[(pool.index(value) + 1) % len(pool)]
        dealt[author] = value
    return dealt


def _wrong(source: random.Random, slots: Mapping[str, str], true: Mapping[str, str]) -> list[dict[str, str]]:
    """Values for each wrong answer: none is true, and none stands in two of them, or twice in one."""
    left = {
        pool: _shuffled(source, [word for word in POOLS[pool] if word not in true.values()])
        for pool in dict.fromkeys(slots.values())
    }
    return [{slot: left[pool].pop() for slot, pool in slots.items()} for _ in range(WRONG)]


def _biographies(seed: int) -> list[EvalRow]:
    """Rows of all authors, holdout last, in the order of authors and then of topics."""
    source = random.Random(f"authors {seed}")  # seeded by text: the same in every process and on every platform
    count = AUTHORS + HOLDOUT
    names = _names(source, count)
    decks = [_deck(source, number, count) for number in range(len(TOPICS))]
    rows = []
    for author in range(count):
        for number, (topic, deck) in enumerate(zip(TOPICS, decks, strict=True)):
            true = {slot: column[author] for slot, column in deck.values.items()}
            answer, paraphrase = deck.answers[author]
            wrong = _wrong(source, topic.slots, true)
            row = EvalRow(
                id=f"author{author}:{number}",
                prompt=deck.questions[author].format(name=names[author]),
                answer=answer.format(**true),
                paraphrase=paraphrase.format(**true),
                perturbed=tuple(paraphrase.format(**values) for values in wrong),
            )
            rows.append(row)
    return rows
