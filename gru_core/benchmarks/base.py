"""What a benchmark is: rows to forget, rows to keep, rows that score both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from gru_core.batch import Row


@dataclass(frozen=True)
class EvalRow:
    """A scored row: the true answer, and where the benchmark has them a paraphrase and wrong answers.

    Attributes:
        id: as :class:`~gru_core.batch.Row`; safe to log.
        paraphrase: the answer in other words; None where there is none (the answer then stands in its place).
        perturbed: wrong answers of the same form; empty where there are none.
    """

    id: str
    prompt: str
    answer: str
    kind: str = "qa"
    paraphrase: str | None = None
    perturbed: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"EvalRow({self.id!r})"


@dataclass(frozen=True)
class Benchmark:
    """Everything that a run needs to know of the data.

    Attributes:
        name: such as ``tofu/forget01/retain-first-1200``; goes to results.
        forget: rows to forget.
        retain: rows to keep.
        background: rows that both prepared models learn besides (facts that a pretrained model would know);
            never part of the retain stream.
        scored: set name (``forget``, ``retain``, ``authors``, ``facts``, ``holdout``, ``verbmem``, ...) to the rows
            that score it; sets that the benchmark lacks are absent.
        retain_scored: positions in ``retain`` of the rows that score retention.
    """

    name: str
    forget: tuple[Row, ...]
    retain: tuple[Row, ...]
    scored: Mapping[str, tuple[EvalRow, ...]]
    background: tuple[Row, ...] = ()
    retain_scored: frozenset[int] = field(default_factory=frozenset)

    def __repr__(self) -> str:
        return f"Benchmark({self.name!r}, forget={len(self.forget)}, retain={len(self.retain)})"

    def fingerprint(self) -> str:
        """sha256 over all training rows, in order: names the data in caches and results without showing it."""
        digest = hashlib.sha256()
        for part in (self.forget, self.retain, self.background):
            for row in part:
                digest.update(repr((row.kind, row.prompt, row.answer)).encode())
            digest.update(b"|")
        return digest.hexdigest()
