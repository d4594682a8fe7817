"""The searcher: one sampler per family, and the ledger that it goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from gru_core.errors import StorageError
from pipelines.families import Families, Sampler
from pipelines.ledger import Ledger
from pipelines.space import Family

SPACE: dict[str, Any] = {"unlearn.lr": {"low": 1e-5, "high": 1e-2, "log": True}, "unlearn.objective": ["ga", "npo"]}
BOTH = ("unlearning", "retention")


def two(trials: int = 8) -> list[Family]:
    return [Family("plain", {"rectify.rule": "none"}, SPACE, trials), Family("sum", {}, SPACE, trials)]


def build(folder: Path, kind: str = "optuna", trials: int = 8) -> Families:
    families = two(trials)
    return Families(families, {f.name: Sampler(f, kind, 0, BOTH) for f in families}, Ledger(folder))


def score(spec: dict[str, Any]) -> dict[str, Any]:
    rate = min(1.0, spec["params"]["unlearn.lr"] * 300)
    return {"status": "finished", "step": 60, "unlearning": rate, "retention": 1 - rate**2, "seconds": 1.0}


def go(searcher: Families, number: int) -> list[dict[str, Any]]:
    """Runs that many trials, one at a time."""
    found = []
    for k in range(number):
        found.append(searcher.suggest(f"tune-{k}"))
        searcher.on_trial_complete(f"tune-{k}", score(found[-1]))
    return found


def test_families_take_turns_until_each_has_its_share(tmp_path: Path) -> None:
    searcher = build(tmp_path, trials=2)
    assert searcher.left == 4
    assert [spec["id"] for spec in go(searcher, 4)] == ["plain-000", "sum-000", "plain-001", "sum-001"]
    assert searcher.suggest("more") == Searcher.FINISHED


def test_families_have_streams_of_their_own(tmp_path: Path) -> None:
    found = go(build(tmp_path), 4)
    assert len({spec["params"]["unlearn.lr"] for spec in found}) == 4
    assert found[0]["settings"] == {"rectify.rule": "none", **found[0]["params"]}


@pytest.mark.parametrize("kind", ["optuna", "random"])
@pytest.mark.parametrize("cut", [0, 1, 7, 13])
def test_a_search_cut_off_anywhere_goes_on_as_if_nothing_had_happened(tmp_path: Path, kind: str, cut: int) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = go(build(tmp_path / "whole", kind), 16)
    first = build(tmp_path / "cut", kind)
    go(first, cut)
    running = first.suggest("killed")
    again = build(tmp_path / "cut", kind)
    assert again.left == 16 - cut
    rest = go(again, 16 - cut)
    assert rest[0] == running
    assert rest == whole[cut:]


def test_adaptive_draws_follow_the_results(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    up = go(build(tmp_path / "a"), 16)
    searcher = build(tmp_path / "b")
    down = []
    for k in range(16):
        down.append(searcher.suggest(str(k)))
        result = score(down[-1])
        searcher.on_trial_complete(str(k), result | {"unlearning": 1 - result["unlearning"], "retention": 0.5})
    assert up[:8] == down[:8]  # four random draws for each family
    assert up[8:] != down[8:]


def test_a_failed_trial_is_told_as_such_and_runs_again_later(tmp_path: Path) -> None:
    searcher = build(tmp_path)
    spec = searcher.suggest("t")
    searcher.on_trial_complete("t", {"status": "failed", "error": "too large"})
    other = searcher.suggest("u")
    searcher.on_trial_complete("u", error=True)
    assert [entry["error"] for entry in Ledger(tmp_path).entries if entry["kind"] == "end"] == ["too large", "unknown"]
    again = build(tmp_path)
    assert [again.suggest("v"), again.suggest("w")] == [spec, other]
    assert again.suggest("x")["id"] == "plain-001"


def test_a_stopped_trial_has_no_end(tmp_path: Path) -> None:
    searcher = build(tmp_path)
    searcher.suggest("t")
    searcher.on_trial_complete("t", {"step": 20, "unlearning": 0.1, "retention": 0.9})
    assert [entry["kind"] for entry in Ledger(tmp_path).entries] == ["ask"]


def test_small_spaces_do_not_repeat_themselves() -> None:
    family = Family("one", {}, {"unlearn.objective": ["ga", "wga", "npo", "simnpo"], "retain.size": [50, 100]}, 7)
    sampler = Sampler(family, "random", 0, BOTH)
    drawn = [json.dumps(sampler.ask()) for _ in range(7)]
    assert len(set(drawn)) == 7


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    go(build(tmp_path), 1)
    whole = (tmp_path / "trials.jsonl").read_bytes()
    with (tmp_path / "trials.jsonl").open("ab") as file:
        file.write(b'{"kind": "ask", "id": "su')
    assert [entry["kind"] for entry in Ledger(tmp_path).entries] == ["ask", "end"]
    assert (tmp_path / "trials.jsonl").read_bytes() == whole


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.path = Path("/dev/full")
    with pytest.raises(StorageError, match=r"/dev/full cannot be written: No space left"):
        ledger.ask("plain-000", "plain", {})
