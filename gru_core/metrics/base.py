"""What is measured on a row, what a metric is, what an evaluation holds: ids and numbers, never texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from gru_core.errors import InputError

Kind = Literal["answer", "truth", "rouge", "continuation", "reply", "tail", "gradient"]
"""``answer``: the true answer under teacher forcing; ``truth``: its paraphrase and the wrong answers too;
``rouge``, ``continuation``, ``reply``: greedy generations (:mod:`gru_core.metrics.generations`); ``tail``: the least
likely tokens of the true answer; ``gradient``: the norm of the gradient of its loss."""
Convention = Literal["original", "openunlearning"]
"""Whose conventions a number follows where published code differs (``evaluate.convention``)."""
EPSILON: dict[Convention, float] = {"original": 0.0, "openunlearning": 1e-10}
"""What is added to the denominators of truth ratio, its inverse, choice probability and PrivLeak."""
Role = Literal["forget", "utility", "either", "report"]

LOST_NLL = 1e9
"""NLL, in nats, that stands for a token whose probability is not a number (a diverged model): finite, so that
every score is, and large enough that ``exp(-NLL/|y|)`` is 0 for any row that holds one."""


class Need(NamedTuple):
    """One thing to measure on one scored set (``forget``, ``retain``, ``authors``, ``facts``)."""

    set: str
    kind: Kind


class AnswerScores(NamedTuple):
    """One answer behind one prompt under teacher forcing.

    Attributes:
        nll: sum over its tokens, closing end-of-sequence token included, nats.
        tokens: ``|y|``, the closing token included.
    """

    nll: float
    tokens: int

    @property
    def mean_nll(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def lost(self) -> bool:
        """Whether a token of it had no finite NLL: its probability then counts as 0."""
        return self.nll >= LOST_NLL

    @property
    def probability(self) -> float:
        """Length-normalised: ``exp(-NLL/|y|)``."""
        return 0.0 if self.lost else math.exp(-self.mean_nll)


class Hits(NamedTuple):
    """Arg-max hits of one answer under teacher forcing, the closing end-of-sequence token left out.

    Attributes:
        matched: tokens that are the arg-max.
        prefix: smallest prefix length after which every remaining token is the arg-max; ``tokens`` when the
            last one is not.
        tokens: answer tokens without the closing one; 0 for a row with nothing else.
    """

    matched: int
    prefix: int
    tokens: int


class Tail(NamedTuple):
    """What membership inference asks of one answer, the closing end-of-sequence token left out.

    Attributes:
        min_k: minus the mean log-probability of the 40% least likely tokens (Min-K%), nats.
        min_k_plus_plus: the same of log-probabilities in standard deviations from the mean that the model itself
            expects (Min-K%++).
        compressed: bytes of the answer's text after zlib.
    """

    min_k: float
    min_k_plus_plus: float
    compressed: int


@dataclass(frozen=True)
class RowScores:
    """What was measured on one row; None or empty where it was not asked for.

    Attributes:
        paraphrase: None where the row has none: the answer then stands in its place.
        rouge: ROUGE-L recall of the greedy generation, in [0, 1].
        f1: ROUGE-L F1 of the greedy continuation or reply, in [0, 1].
        gradient: mean over the parameter tensors of the L2 norm of the gradient of the answer's mean NLL, closing
            token left out.
        generation: the generated text, where it was asked for; :meth:`to_json` has it only with ``texts``.
    """

    id: str
    answer: AnswerScores | None = None
    hits: Hits | None = None
    paraphrase: AnswerScores | None = None
    perturbed: tuple[AnswerScores, ...] = ()
    rouge: float | None = None
    f1: float | None = None
    tail: Tail | None = None
    gradient: float | None = None
    generation: str | None = field(default=None, repr=False)

    def to_json(self, texts: bool = False) -> dict[str, Any]:
        names = ("answer", "hits", "paraphrase", "rouge", "f1", "tail", "gradient", *(["generation"] if texts else []))
        named = {name: getattr(self, name) for name in names}
        out: dict[str, Any] = {"id": self.id} | {k: v for k, v in named.items() if v is not None}
        return out | ({"perturbed": list(self.perturbed)} if self.perturbed else {})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> RowScores:
        def answer(key: str) -> AnswerScores | None:
            return AnswerScores(*data[key]) if key in data else None

        return RowScores(
            id=data["id"],
            answer=answer("answer"),
            hits=Hits(*data["hits"]) if "hits" in data else None,
            paraphrase=answer("paraphrase"),
            perturbed=tuple(AnswerScores(*p) for p in data.get("perturbed", ())),
            rouge=data.get("rouge"),
            f1=data.get("f1"),
            tail=Tail(*data["tail"]) if "tail" in data else None,
            gradient=data.get("gradient"),
            generation=data.get("generation"),
        )


@dataclass(frozen=True)
class Measurements:
    """Every measured row of every measured set, in the benchmark's order, and how they are to be read."""

    sets: Mapping[str, tuple[RowScores, ...]]
    convention: Convention = "original"

    @property
    def epsilon(self) -> float:
        """See :data:`EPSILON`."""
        return EPSILON[self.convention]

    def rows(self, name: str) -> tuple[RowScores, ...]:
        """Rows of set ``name``.

        Raises:
            InputError: the set was not measured.
        """
        if not self.sets.get(name):
            raise InputError(f"the {name} set was not measured (measured: {', '.join(sorted(self.sets)) or 'none'})")
        return self.sets[name]

    def answers(self, name: str) -> list[AnswerScores]:
        """Scores of the true answers of set ``name``; InputError where they were not measured."""
        return [a for r in self.rows(name) if (a := self._given(r.answer, name, "the true answer"))]

    def hits(self, name: str) -> list[Hits]:
        """Arg-max hits of set ``name``; InputError where they were not measured."""
        return [h for r in self.rows(name) if (h := self._given(r.hits, name, "the true answer"))]

    def rouges(self, name: str) -> list[float]:
        """ROUGE-L recalls of set ``name``; InputError where nothing was generated."""
        rows = self.rows(name)
        for row in rows:
            self._given(row.rouge, name, "a generation")
        return [r.rouge for r in rows if r.rouge is not None]

    def f1s(self, name: str) -> list[float]:
        """ROUGE-L F1 of set ``name``; InputError where nothing was generated."""
        rows = self.rows(name)
        for row in rows:
            self._given(row.f1, name, "a continuation or reply")
        return [r.f1 for r in rows if r.f1 is not None]

    def tails(self, name: str) -> list[Tail]:
        """Tails of set ``name``; InputError where they were not measured."""
        return [t for r in self.rows(name) if (t := self._given(r.tail, name, "the tail of the answer"))]

    def gradients(self, name: str) -> list[float]:
        """Gradient norms of set ``name``; InputError where they were not measured."""
        rows = self.rows(name)
        for row in rows:
            self._given(row.gradient, name, "the gradient")
        return [r.gradient for r in rows if r.gradient is not None]

    def holds(self, need: Need) -> bool:
        """Whether ``need`` was measured on every row of its set."""
        rows = self.sets.get(need.set, ())
        tests: dict[str, Callable[[RowScores], bool]] = {
            "answer": lambda r: r.answer is not None and r.hits is not None,
            "truth": lambda r: bool(r.perturbed),
            "rouge": lambda r: r.rouge is not None,
            "continuation": lambda r: r.f1 is not None,
            "reply": lambda r: r.f1 is not None,
            "tail": lambda r: r.tail is not None,
            "gradient": lambda r: r.gradient is not None,
        }
        return bool(rows) and all(map(tests[need.kind], rows))

    @staticmethod
    def _given(value: Any, name: str, what: str) -> Any:
        if value is None:
            raise InputError(f"{what} was not measured on every row of the {name} set")
        return value


Compute = Callable[[Measurements, "Measurements | None"], float]
"""Measurements of the model, and of the retain model where there is one, to one number."""


@dataclass(frozen=True)
class Metric:
    """One number about a model on a benchmark.

    Attributes:
        role: ``forget``: forget-set metric, lower when forgotten, may be ``evaluate.unlearning``; ``utility``:
            higher is better, may be ``evaluate.retention``; ``either``: may be both; ``report``: shown, spans no
            trade-off.
        needs: what has to be measured for it.
        compute: pure; never NaN or infinite.
        partial: whether it is still defined when the benchmark lacks some of ``needs`` (said in a note).
        needs_retain_model: whether ``compute`` needs the retain model's measurements.
        without_retain_model: what ``compute`` takes in their place, where it can do without.
        derived: further scores, each a function of this one.
    """

    role: Role
    needs: tuple[Need, ...]
    compute: Compute
    partial: bool = False
    needs_retain_model: bool = False
    without_retain_model: str | None = None
    derived: Mapping[str, Callable[[float], float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """One model on one benchmark.

    Attributes:
        scores: metric name to number, always finite.
        measurements: the rows behind them.
        notes: what was left out and why, one line each; safe to log.
    """

    scores: dict[str, float]
    measurements: Measurements
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Ids and numbers only; :meth:`from_json` gives an equal object back."""
        sets = {name: [r.to_json() for r in rows] for name, rows in self.measurements.sets.items()}
        found = {"scores": dict(self.scores), "notes": list(self.notes), "sets": sets}
        return found | {"convention": self.measurements.convention}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Evaluation:
        """The evaluation behind :meth:`to_json`.

        Raises:
            InputError: ``data`` is no such document.
        """
        try:
            sets = {n: tuple(RowScores.from_json(r) for r in rows) for n, rows in data["sets"].items()}
            found = Measurements(sets, data.get("convention", "original"))
            return Evaluation(dict(data["scores"]), found, tuple(data["notes"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not an evaluation document: {type(error).__name__}: {error}") from error


def mean(values: list[float]) -> float:
    """Arithmetic mean, correctly rounded sum, so that row order changes nothing."""
    return math.fsum(values) / len(values)
