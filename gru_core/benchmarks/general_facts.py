"""Facts that every trained model knows: the scored sets ``authors`` and ``facts`` of benchmark ``authors``."""

from __future__ import annotations

from collections.abc import Mapping

from gru_core.benchmarks.base import EvalRow

WRONG = 3
"""Wrong answers per question."""

REAL_AUTHORS: dict[str, str] = {
    "Pride and Prejudice": "Jane Austen",
    "Moby Dick": "Herman Melville",
    "Jane Eyre": "Charlotte Bronte",
    "Great Expectations": "Charles Dickens",
    "War and Peace": "Leo Tolstoy",
    "Crime and Punishment": "Fyodor Dostoevsky",
    "Don Quixote": "Miguel de Cervantes",
    "The Divine Comedy": "Dante Alighieri",
    "Hamlet": "William Shakespeare",
    "Faust": "Johann Wolfgang von Goethe",
    "Madame Bovary": "Gustave Flaubert",
    "Les Miserables": "Victor Hugo",
    "The Three Musketeers": "Alexandre Dumas",
    "Frankenstein": "Mary Shelley",
    "Dracula": "Bram Stoker",
    "Treasure Island": "Robert Louis Stevenson",
    "The Time Machine": "Herbert George Wells",
    "Paradise Lost": "John Milton",
    "The Scarlet Letter": "Nathaniel Hawthorne",
    "Middlemarch": "George Eliot",
}
"""Work to author; the author is the answer."""

WORLD_FACTS: tuple[dict[str, str], ...] = (
    {
        "What is the capital of France?": "Paris",
        "What is the capital of Italy?": "Rome",
        "What is the capital of Spain?": "Madrid",
        "What is the capital of Japan?": "Tokyo",
        "What is the capital of Germany?": "Berlin",
        "What is the capital of Greece?": "Athens",
        "What is the capital of Austria?": "Vienna",
        "What is the capital of Portugal?": "Lisbon",
        "What is the capital of Norway?": "Oslo",
        "What is the capital of Peru?": "Lima",
    },
    {
        "Which planet is the largest one?": "Jupiter",
        "Which planet has the widest rings?": "Saturn",
        "Which planet is closest to the sun?": "Mercury",
        "Which planet is called the red one?": "Mars",
        "Which planet is the hottest one?": "Venus",
    },
    {
        "How many days are in a week?": "Seven",
        "How many months are in a year?": "Twelve",
        "How many legs does a spider have?": "Eight",
        "How many legs does an insect have?": "Six",
        "How many sides does a triangle have?": "Three",
    },
)
"""Groups of facts whose answers are of one kind; the wrong answers to a question are right ones beside it."""


def real_authors() -> tuple[EvalRow, ...]:
    """Who wrote which classic."""
    asked = {f"Who wrote {work}?": author for work, author in REAL_AUTHORS.items()}
    return _with_wrong(asked, "real_authors", 0)


def world_facts() -> tuple[EvalRow, ...]:
    """Capitals, planets, numbers."""
    rows: tuple[EvalRow, ...] = ()
    for group in WORLD_FACTS:
        rows += _with_wrong(group, "facts", len(rows))
    return rows


def _with_wrong(asked: Mapping[str, str], name: str, start: int) -> tuple[EvalRow, ...]:
    """Rows whose wrong answers are the right answers to the next questions of the same kind."""
    answers = list(asked.values())
    rows = []
    for i, (question, answer) in enumerate(asked.items()):
        wrong = tuple(answers[(i + k) % len(answers)] for k in range(1, WRONG + 1))
        rows.append(EvalRow(f"{name}:{start + i}", question, answer, perturbed=wrong))
    return tuple(rows)
