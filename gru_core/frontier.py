"""Pareto set, hypervolume, knee and bootstrap of (unlearning, retention) points: pure functions.

A point is a pair of finite numbers, both maximised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from gru_core.errors import InputError

Point = Sequence[float]


def pareto(points: Sequence[Point]) -> list[int]:
    """Positions, ascending, of the points that no other point dominates; of equal points the first.

    A point dominates another when it is at least as good in both numbers and better in one.

    Raises:
        InputError: a point is not a pair of finite numbers.
    """
    table = _table(points)
    if not len(table):
        return []
    import moocore

    return np.flatnonzero(moocore.is_nondominated(table, maximise=True, keep_weakly=False)).tolist()


def hypervolume(points: Sequence[Point], reference: Point = (0.0, 0.0)) -> float:
    """Area that the points dominate above ``reference``; 0 without points. Grows with points, never shrinks.

    Raises:
        InputError: a point is not a pair of finite numbers.
    """
    table = _table(points)
    if not len(table):
        return 0.0
    import moocore

    return float(moocore.hypervolume(table, ref=list(reference), maximise=True))


def knee(points: Sequence[Point]) -> int:
    """Position of the frontier point farthest from the chord between the frontier's ends.

    Only points on the better side of the chord count, unless none lies there: a dent, where a mixture of the
    ends would be better, is no knee of a frontier that also bulges. Among equals (always so with two frontier
    points) the one that alone has the largest hypervolume, then the first.

    Raises:
        InputError: no points, or one is not a pair of finite numbers.
    """
    front = sorted(pareto(points), key=lambda i: points[i][0])
    if not front:
        raise InputError("the knee of no points is not defined")
    (x0, y0), (x1, y1) = points[front[0]], points[front[-1]]
    length = math.hypot(x1 - x0, y1 - y0)

    def height(i: int) -> float:  # above the chord, towards better
        x, y = points[i]
        return ((x - x0) * (y0 - y1) + (y - y0) * (x1 - x0)) / length if length else 0.0

    heights = {i: height(i) for i in front}
    top, tiny = max(heights.values()), 1e-12
    if top <= tiny:
        heights = {i: abs(h) for i, h in heights.items()}
        top = max(heights.values())
    candidates = sorted(i for i in front if heights[i] >= top - tiny)
    return max(candidates, key=lambda i: points[i][0] * points[i][1])


@dataclass(frozen=True)
class Interval:
    """A statistic and its bootstrap percentile interval."""

    value: float
    low: float
    high: float


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = median,
    seed: int = 0,
    *,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """``statistic`` of ``values`` (one a seed; median by default) with its percentile interval at ``level``.

    Draws from a generator of its own: the same values and seed give the same interval.

    Raises:
        InputError: no values, one is not finite, or ``level`` is not inside (0, 1).
    """
    if not values or not all(map(math.isfinite, values)):
        raise InputError(f"bootstrap needs finite values, at least one (got {len(values)})")
    if not 0 < level < 1 or resamples < 1:
        raise InputError(f"bootstrap: level {level} must be inside (0, 1), resamples {resamples} at least 1")
    table = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(table), size=(resamples, len(table)))
    drawn = [float(statistic(table[pick].tolist())) for pick in picks]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(list(values))), float(low), float(high))


def _table(points: Sequence[Point]) -> np.ndarray:
    """(n, 2) float64."""
    if any(len(p) != 2 for p in points):
        raise InputError("a point has two numbers, (unlearning, retention)")
    table = np.asarray([list(p) for p in points], dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(table).all():
        raise InputError(f"point {int(np.argmin(np.isfinite(table).all(axis=1)))} is not finite")
    return table
