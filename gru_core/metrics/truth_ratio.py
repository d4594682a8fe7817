"""Truth ratio: wrong answers over the right one (TOFU, arXiv 2401.06121, equation 1, as its logs have it)."""

from __future__ import annotations

import math

from gru_core.errors import InputError
from gru_core.metrics.base import Measurements, Metric, Need, RowScores, mean


def log_truth_ratio(row: RowScores, epsilon: float = 0.0) -> float:
    """``log TR`` of one row: mean NLL/|y| of the paraphrase minus the mean of the wrong answers' NLL/|y|.

    TR is thus a *geometric* mean over the wrong answers. Without a paraphrase the answer stands in its place.
    The logarithm neither overflows nor underflows, and orders rows as TR does.

    Args:
        epsilon: added to the probability of the right answer (OpenUnlearning: 1e-10).

    Raises:
        InputError: the row was measured without a right or without wrong answers.
    """
    right = row.paraphrase or row.answer
    if right is None or not row.perturbed:
        raise InputError(f"row {row.id}: a truth ratio needs the true answer and wrong answers")
    return -_log_add(-right.mean_nll, epsilon) - mean([wrong.mean_nll for wrong in row.perturbed])


def _log_add(x: float, epsilon: float) -> float:
    """``log(exp(x) + epsilon)``; ``x`` itself without one."""
    if not epsilon:
        return x
    low, high = sorted((x, math.log(epsilon)))
    return high + math.log1p(math.exp(low - high))


def log_truth_ratios(measurements: Measurements, name: str) -> list[float]:
    """``log TR`` of every row of set ``name``, in order."""
    return [log_truth_ratio(r, measurements.epsilon) for r in measurements.rows(name)]


def forget_aggregate(log_ratios: list[float], epsilon: float = 0.0) -> float:
    """Mean of ``min(TR, 1/(TR + epsilon))``, in [0, 1]; 1 when right and wrong are equally likely."""
    return mean([math.exp(min(x, -_log_add(x, epsilon))) for x in log_ratios])


def utility_aggregate(log_ratios: list[float]) -> float:
    """Mean of ``max(0, 1 - TR)``, in [0, 1]; 0 when wrong is at least as likely as right."""
    return mean([-math.expm1(x) if x < 0 else 0.0 for x in log_ratios])


def truth(measurements: Measurements, name: str) -> float:
    """What is reported on sets other than the forget set."""
    return utility_aggregate(log_truth_ratios(measurements, name))


def _needs(name: str) -> tuple[Need, ...]:
    return Need(name, "answer"), Need(name, "truth")


# Neither spans a trade-off: on the forget set *higher* is forgotten, and on the retain set the ratio stays far
# below 1 for a perfect model (0.48 for the fine-tuned one of TOFU), so that losing it shows little.
forget_truth_ratio = Metric(
    "report", _needs("forget"), lambda m, _: forget_aggregate(log_truth_ratios(m, "forget"), m.epsilon)
)
retain_truth_ratio = Metric("report", _needs("retain"), lambda m, _: truth(m, "retain"))
