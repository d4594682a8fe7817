"""Probability of the true answer (TOFU, Maini et al. 2024, arXiv 2401.06121, section 2.2)."""

from __future__ import annotations

import math

from gru_core.errors import InputError
from gru_core.metrics.base import Measurements, Metric, Need, RowScores, mean


def probability(measurements: Measurements, name: str) -> float:
    """Mean of the length-normalised ``p(answer)`` over set ``name``, in [0, 1]."""
    return mean([a.probability for a in measurements.answers(name)])


def choice_probability(row: RowScores, epsilon: float = 0.0) -> float:
    """``p / (p + sum of p over the wrong answers)`` of one row, from means of NLL, so nothing underflows.

    Args:
        epsilon: added to the denominator (OpenUnlearning: 1e-10).

    Raises:
        InputError: the row was measured without wrong answers.
    """
    if row.answer is None or not row.perturbed:
        raise InputError(f"row {row.id}: a choice needs the true answer and wrong answers")
    if row.answer.lost:
        return 0.0
    # exp overflows past 709; a wrong answer 700 nats a token likelier leaves p = 0 anyway
    odds = (math.exp(min(row.answer.mean_nll - wrong.mean_nll, 700.0)) for wrong in row.perturbed)
    added = epsilon * math.exp(min(row.answer.mean_nll, 700.0)) if epsilon else 0.0
    return 1.0 / (1.0 + math.fsum(odds) + added)


def mean_choice_probability(measurements: Measurements, name: str) -> float:
    """Mean of :func:`choice_probability` over set ``name`` (real authors and world facts)."""
    return mean([choice_probability(r, measurements.epsilon) for r in measurements.rows(name)])


forget_probability = Metric("forget", (Need("forget", "answer"),), lambda m, _: probability(m, "forget"))
retain_probability = Metric("utility", (Need("retain", "answer"),), lambda m, _: probability(m, "retain"))
