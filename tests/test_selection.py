"""The rules of a search, by hand."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from pipelines import selection

BOTH = ("unlearning", "retention")


def point(step: int, u: float, r: float) -> dict[str, float]:
    return {"step": step, "unlearning": u, "retention": r, "extraction_strength": 0.5}


def test_best_is_the_largest_product() -> None:
    points = [point(0, 0.0, 1.0), point(20, 0.5, 0.9), point(40, 0.8, 0.7), point(60, 1.0, 0.1)]
    assert selection.best(points, BOTH) == {"step": 40, "unlearning": 0.8, "retention": 0.7}


def test_ties_go_to_the_larger_sum_then_to_the_earlier_step() -> None:
    assert selection.best([point(20, 0.4, 0.5), point(40, 0.2, 1.0)], BOTH)["step"] == 40
    assert selection.best([point(40, 0.5, 0.5), point(20, 0.5, 0.5)], BOTH)["step"] == 20


def test_one_metric_is_maximised_alone() -> None:
    points = [point(20, 0.5, 0.9), point(40, 1.0, 0.0), point(60, 1.0, 0.2)]
    assert selection.best(points, ("unlearning",))["step"] == 60
    assert selection.best(points, ("retention",))["step"] == 20


def test_the_model_left_alone_stands_for_a_trial_only_alone() -> None:
    assert selection.best([point(0, 0.0, 1.0), point(20, 1.0, 0.0)], BOTH)["step"] == 20
    assert selection.best([point(0, 0.0, 1.0)], BOTH)["step"] == 0


def test_without_a_finite_point_the_worst_scores_are_reported() -> None:
    assert selection.best([], BOTH) == {"step": 0, "unlearning": 0.0, "retention": 0.0}
    assert selection.best([point(20, math.nan, 1.0)], BOTH) == selection.best([], BOTH)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1), st.sampled_from([BOTH, BOTH[:1], BOTH[1:]]))
def test_no_candidate_beats_the_best_in_every_metric(
    pairs: list[tuple[float, float]], metrics: tuple[str, ...]
) -> None:
    points = [point(step + 1, u, r) for step, (u, r) in enumerate(pairs)]
    best = selection.best(points, metrics)
    worse = [p for p in points if all(p[name] > best[name] for name in metrics)]
    # a product may underflow to 0 for two scores below 1e-154
    assert all(p["unlearning"] * p["retention"] == 0 for p in worse)


def test_unfinished_are_those_without_a_result_in_the_order_asked() -> None:
    entries = [
        {"kind": "ask", "id": "a-000"},
        {"kind": "ask", "id": "b-000"},
        {"kind": "end", "id": "a-000", "status": "finished"},
        {"kind": "ask", "id": "a-001"},
        {"kind": "end", "id": "b-000", "status": "failed"},
        {"kind": "ask", "id": "b-001"},
        {"kind": "end", "id": "a-001", "status": "collapsed"},
    ]
    assert selection.unfinished(entries) == ["b-000", "b-001"]
    entries.append({"kind": "end", "id": "b-000", "status": "finished"})
    assert selection.unfinished(entries) == ["b-001"]


def test_the_last_word_on_a_trial_counts() -> None:
    entries = [
        {"kind": "end", "id": "a-000", "status": "failed", "error": "first"},
        {"kind": "end", "id": "b-000", "status": "failed", "error": "second"},
        {"kind": "end", "id": "a-000", "status": "finished"},
    ]
    ends = selection.outcomes(entries).values()
    assert selection.counts(ends) == {"total": 2, "finished": 1, "collapsed": 0, "non_finite": 0, "failed": 1}
    assert selection.first_failure(ends) == "b-000: second"


def test_order_is_round_robin() -> None:
    assert selection.order({"a": 2, "b": 3, "c": 1}) == ["a", "b", "c", "a", "b", "b"]
    assert selection.order({}) == []


def test_a_line_tells_scores_and_settings_or_the_cause() -> None:
    end = {"id": "sum-003", "status": "finished", **point(40, 0.8, 0.75), "seconds": 3.04}
    settings = {"params": {"unlearn.lr": 0.00123456, "retain.size": 200}}
    text = "sum-003  unlearning 0.800  retention 0.750  at step 40  3.0 s  lr=0.00123 size=200"
    assert selection.line(end | settings) == text
    assert "at step 40 (collapsed)" in selection.line(end | settings | {"status": "collapsed"})
    failed = {"id": "sum-003", "status": "failed", "error": "out of memory", "params": {}}
    assert selection.line(failed) == "sum-003  failed: out of memory"
