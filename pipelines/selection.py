"""Rules of a search, as pure functions: which candidate stands for a trial, what a resumed search repeats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Point = Mapping[str, Any]

RESULTS = ("finished", "collapsed", "non_finite")
"""How a trial ends that has something to say; ``failed`` has not, and is run again on ``--resume``."""
WORST = {"step": 0, "unlearning": 0.0, "retention": 0.0}


def best(points: Iterable[Point], metrics: Sequence[str]) -> dict[str, Any]:
    """The evaluated step that a trial's final report repeats, which is all that a sampler sees of the trial.

    Two metrics: the largest product unlearning x retention, the area that the point alone dominates; ties go to
    the larger sum, then to the earlier step. One metric: its largest value, ties to the larger other score.
    Step 0 stands for a trial only where there is nothing else: a model that was left alone is no candidate.
    A trial without a finite point gets the worst scores there are, so that a sampler learns to stay away.

    Args:
        points: ``{"step", "unlearning", "retention"}`` each.
        metrics: of ``search.metrics``.

    Returns:
        ``{"step", "unlearning", "retention"}``, finite.
    """
    finite = [p for p in points if math.isfinite(p["unlearning"]) and math.isfinite(p["retention"])]
    chosen = max([p for p in finite if p["step"] > 0] or finite, key=lambda p: _rank(p, metrics), default=WORST)
    return {name: chosen[name] for name in WORST}


def _rank(point: Point, metrics: Sequence[str]) -> tuple[float, float, float]:
    u, r = float(point["unlearning"]), float(point["retention"])
    if len(metrics) == 2:
        return u * r, u + r, -point["step"]
    other = "retention" if metrics[0] == "unlearning" else "unlearning"
    return float(point[metrics[0]]), float(point[other]), -point["step"]


def unfinished(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Trials that a resumed search runs (again), in the order they were first asked for.

    Args:
        entries: the ledger: ``{"kind": "ask", "id"}`` and ``{"kind": "end", "id", "status"}``.
    """
    asked: dict[str, bool] = {}
    for entry in entries:
        if entry["kind"] == "ask":
            asked.setdefault(entry["id"], True)
        elif entry["status"] in RESULTS:
            asked[entry["id"]] = False
    return [name for name, todo in asked.items() if todo]


def outcomes(entries: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The last word on each trial that ended: id to its ``end`` entry."""
    return {entry["id"]: entry for entry in entries if entry["kind"] == "end"}


def counts(ends: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """``{"total", "finished", "collapsed", "non_finite", "failed"}``."""
    found = Counter(end["status"] for end in ends)
    return {"total": sum(found.values()), **{name: found[name] for name in (*RESULTS, "failed")}}


def first_failure(ends: Iterable[Mapping[str, Any]]) -> str | None:
    """What the first failed trial died of, with its name."""
    return next((f"{end['id']}: {end.get('error')}" for end in ends if end["status"] == "failed"), None)


def order(numbers: Mapping[str, int]) -> list[str]:
    """Round robin over families, each as often as its number says: a search cut short is still a fair one."""
    rounds = range(max(numbers.values(), default=0))
    return [name for k in rounds for name, number in numbers.items() if k < number]


def line(end: Mapping[str, Any]) -> str:
    """A trial that ended, in one line: what it reached, or what it died of, and its settings."""
    values = " ".join(f"{key.split('.')[-1]}={_short(value)}" for key, value in end["params"].items())
    if end["status"] == "failed":
        return f"{end['id']}  failed: {end['error']}  {values}".rstrip()
    ended = "" if end["status"] == "finished" else f" ({end['status']})"
    scores = f"unlearning {end['unlearning']:.3f}  retention {end['retention']:.3f}  at step {end['step']}{ended}"
    return f"{end['id']}  {scores}  {end['seconds']:.1f} s  {values}".rstrip()


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
