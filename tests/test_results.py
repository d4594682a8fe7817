"""Numbers that README and docs/scaling.md claim are those of the newest result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def newest(name: str) -> dict[str, Any]:
    """The latest of ``benchmarks/results/DATE-NAME-cpu.json``."""
    file = sorted((ROOT / "benchmarks" / "results").glob(f"????-??-??-{name}-cpu.json"))[-1]
    assert f"results/{file.name}" in (ROOT / "docs" / "scaling.md").read_text() or name in (
        "step",
        "search",
        "evaluate",
    )
    return json.loads(file.read_text())


def row(start: str) -> str:
    """The line of README's table of costs that begins so."""
    (line,) = (each for each in (ROOT / "README.md").read_text().splitlines() if each.startswith(f"| {start}"))
    return line


def test_the_cost_of_a_step() -> None:
    found = newest("step")
    assert f"| {found['ratio_step']:.2f} x the time |" in row("a GRU step with moving average")
    assert f"| {found['ratio_memory']:.1f} |" in row("its extra peak memory")
    assert f"| {found['ratio_naive']:.2f} x the time |" in row("a rectification that flattens")


def test_the_cost_of_a_search() -> None:
    found = newest("search")
    assert f"| {found['ratio_search']:.2f} x the time |" in row("a search of 12 small trials")
    assert found["trials"] == 12
    assert f"| {found['startup_seconds']:.2f} s |" in row("from the end of one trial")


def test_the_cost_of_workers() -> None:
    """And the limit: 1.05 over the sum of both gradients, at every size."""
    found = newest("scaling")
    points = {(p["strategy"], p["workers"]): p for p in found["points"]}
    assert points.keys() == {(strategy, workers) for strategy in ("ddp", "fsdp") for workers in (1, 2, 4)}
    over_sum = [p["gru_over_sum"] for p in points.values()]
    assert f"| {min(over_sum):.2f} to {max(over_sum):.2f} x |" in row("a GRU step on 1, 2, 4 workers")
    assert max(over_sum) <= found["limit"] == 1.05
    joint = [f"{points['ddp', workers]['gru_over_joint']:.2f}" for workers in (1, 2, 4)]
    assert f"| {', '.join(joint)} x |" in row("the same over one backward pass")
    above = {(each["strategy"], each["workers"], each["ratio"]) for each in found["above_limit"]}
    ratios = ("gru_over_sum", "gru_over_joint")
    assert above == {(*key, name) for key, p in points.items() for name in ratios if p[name] > 1.05}
    assert all(each["reason"] for each in found["above_limit"])
    assert all(p["bytes"]["gru"] == p["bytes"]["sum"] for p in points.values()), (
        "rectification sends nothing of its own"
    )


def test_the_cost_of_an_evaluation() -> None:
    found = newest("evaluate")
    assert f"| {found['speedup']:.1f} x as fast |" in row("TOFU's whole evaluation")
    peak = found["peak_mib"]
    assert f"| {peak['ours'] / peak['usual']:.2f} x |" in row("its peak memory, over the same")
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for side, name in (("usual", "usual"), ("shared", "usual, passes shared between metrics"), ("ours", "ours")):
        assert f"| {name} | {found['seconds'][side]:.1f} | {peak[side]:.0f} |" in page
    page = " ".join(page.split())
    assert f"That is {found['speedup']:.2f} times as fast (median of {found['repeats']} rounds" in page
    assert f"and {found['speedup_passes_shared']:.2f} times where the usual way" in page
    assert f"So {found['tokens']['teacher_forced']:,} tokens are fed" in page
    floor = found["floor"]
    assert f"fewer than {floor['tokens']:,};" in page
    assert f"{floor['cpu_seconds']:.1f} of our {found['cpu_seconds']['ours']:.1f} CPU seconds" in page
    assert found["largest_difference"] < 1e-5
    assert peak["ours"] <= peak["usual"]


def test_the_accuracy_of_plans() -> None:
    found = newest("memory")
    assert found["largest_error"] == max(abs(each["error"]) for each in found["cases"]) < 0.1
    claim = row("`gru plan` against measured memory")
    assert f"{len(found['cases'])} cases | within {100 * found['largest_error']:.1f} %" in claim
    page = (ROOT / "docs" / "scaling.md").read_text()
    for each in found["cases"]:
        predicted, measured = (f"{each[name] / 2**20:.0f}" for name in ("predicted_bytes", "measured_bytes"))
        assert f"| {each['case']} | {predicted} | {measured} | {100 * each['error']:+.1f} % |" in page
