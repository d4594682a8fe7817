"""Pareto set, hypervolume, knee, bootstrap against brute force, Monte Carlo and hand-derived answers."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gru_core.errors import InputError
from gru_core.frontier import bootstrap, hypervolume, knee, pareto

# coarse grid: many equal points and equal coordinates, where errors live
coordinate = st.one_of(st.integers(0, 5).map(lambda n: n / 5), st.floats(0, 1))
clouds = st.lists(st.tuples(coordinate, coordinate), min_size=1, max_size=25)


def brute_pareto(points: list[tuple[float, float]]) -> list[int]:
    def beaten(i: int) -> bool:
        p = points[i]
        return any(q[0] >= p[0] and q[1] >= p[1] and (q != p or j < i) for j, q in enumerate(points) if j != i)

    return [i for i in range(len(points)) if not beaten(i)]


def brute_area(points: list[tuple[float, float]]) -> float:
    """Cells of the grid that the coordinates span, each counted when some point covers it."""
    xs = sorted({0.0, *(p[0] for p in points)})
    ys = sorted({0.0, *(p[1] for p in points)})
    return math.fsum(
        (x1 - x0) * (y1 - y0)
        for x0, x1 in itertools.pairwise(xs)
        for y0, y1 in itertools.pairwise(ys)
        if any(p[0] >= x1 and p[1] >= y1 for p in points)
    )


@given(clouds)
@settings(max_examples=300, deadline=None)
def test_pareto_equals_brute_force(points):
    assert pareto(points) == brute_pareto(points)


@given(clouds)
@settings(max_examples=200, deadline=None)
def test_hypervolume_equals_brute_force_and_only_the_frontier_counts(points):
    area = hypervolume(points)
    assert area == pytest.approx(brute_area(points), abs=1e-12)
    assert hypervolume([points[i] for i in pareto(points)]) == pytest.approx(area, abs=1e-12)


@given(clouds, st.tuples(coordinate, coordinate))
@settings(max_examples=100, deadline=None)
def test_a_further_point_never_shrinks_the_hypervolume(points, more):
    assert hypervolume([*points, more]) >= hypervolume(points) - 1e-12


@given(clouds, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_order_of_points_changes_nothing(points, shuffler):
    mixed = list(points)
    shuffler.shuffle(mixed)
    assert hypervolume(mixed) == pytest.approx(hypervolume(points), abs=1e-12)
    assert {mixed[i] for i in pareto(mixed)} == {points[i] for i in pareto(points)}


def test_hypervolume_by_hand_and_by_monte_carlo():
    stairs = [(0.25, 1.0), (0.5, 0.75), (1.0, 0.5)]
    assert hypervolume(stairs) == pytest.approx(0.25 * 1.0 + 0.25 * 0.75 + 0.5 * 0.5)
    assert hypervolume(stairs, reference=(0.25, 0.5)) == pytest.approx(0.25 * 0.25)
    draws = np.random.default_rng(0).random((200_000, 2))
    covered = np.zeros(len(draws), bool)
    for x, y in stairs:
        covered |= (draws[:, 0] <= x) & (draws[:, 1] <= y)
    assert hypervolume(stairs) == pytest.approx(covered.mean(), abs=5e-3)


def test_points_outside_the_reference_add_nothing():
    assert hypervolume([(-1.0, 2.0)]) == 0
    assert hypervolume([(0.0, 1.0), (1.0, 0.0)]) == 0
    assert hypervolume([(0.5, 0.5), (-1.0, 2.0)]) == 0.25
    assert hypervolume([]) == 0
    assert pareto([]) == []


def test_of_equal_points_the_first_stays():
    assert pareto([(0.5, 0.5), (1, 0), (0.5, 0.5), (1, 0), (0.4, 0.9)]) == [0, 1, 4]


def test_knee_by_hand():
    # chord x + y = 1; heights over it: .1, .4, .3 (over sqrt 2); the dominated points do not count
    points = [(0.0, 1.0), (0.2, 0.9), (0.1, 0.1), (0.6, 0.8), (0.9, 0.4), (1.0, 0.0), (0.55, 0.75)]
    assert points[knee(points)] == (0.6, 0.8)
    # steep chord from (0, 1) to (0.5, 0): distances by the formula |ax + by + c| / hypot(a, b)
    steep = [(0.5, 0.0), (0.0, 1.0), (0.1, 0.95), (0.45, 0.5), (0.3, 0.55)]
    distance = [abs(2 * x + y - 1) / math.hypot(2, 1) for x, y in steep]
    assert knee(steep) == distance.index(max(distance)) == 3


def test_knee_takes_the_bulge_and_not_a_deeper_dent():
    points = [(0.0, 1.0), (0.1, 0.95), (0.5, 0.2), (1.0, 0.1)]
    assert knee(points) == 1
    # with nothing above the chord the farthest point it is
    assert knee([(0.0, 1.0), (0.3, 0.6), (0.4, 0.3), (1.0, 0.0)]) == 2


def test_knee_of_few_points_is_defined():
    assert knee([(0.3, 0.4)]) == 0
    assert knee([(0.3, 0.4), (0.1, 0.2)]) == 0  # one frontier point
    assert knee([(0.0, 1.0), (0.9, 0.8)]) == 1  # two: the larger hypervolume
    assert knee([(0.5, 0.6), (0.6, 0.5)]) == 0  # equal: the first
    assert knee([(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]) == 1  # on one line
    with pytest.raises(InputError, match="no points"):
        knee([])


@given(clouds)
@settings(max_examples=200, deadline=None)
def test_knee_is_on_the_frontier(points):
    assert knee(points) in pareto(points)


@pytest.mark.parametrize("function", [pareto, hypervolume, knee])
@pytest.mark.parametrize("bad", [[(0.1, math.nan)], [(0.1, 0.2), (math.inf, 0.1)], [(0.1, 0.2, 0.3)], [(0.1,)]])
def test_bad_points_are_refused(function, bad):
    with pytest.raises(InputError):
        function(bad)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    draw = random.Random(3)
    values = [draw.gauss(2.0, 1.0) for _ in range(400)]
    mean = math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    found = bootstrap(values, lambda v: math.fsum(v) / len(v), seed=1)
    assert found.value == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.02)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.02)


def test_bootstrap_is_seeded_leaves_global_state_alone_and_brackets_the_median():
    np.random.seed(7)
    state = np.random.get_state()[1].copy()
    first = bootstrap([0.4, 0.1, 0.9, 0.5, 0.3], seed=5)
    assert first == bootstrap([0.4, 0.1, 0.9, 0.5, 0.3], seed=5)
    assert (np.random.get_state()[1] == state).all()
    assert first.value == 0.4
    assert 0.1 <= first.low <= 0.4 <= first.high <= 0.9
    one = bootstrap([0.25])
    assert (one.value, one.low, one.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("values", [[], [0.1, math.nan]])
def test_bootstrap_refuses_nothing_and_nan(values):
    with pytest.raises(InputError, match="finite values"):
        bootstrap(values)
