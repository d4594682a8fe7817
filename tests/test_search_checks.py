"""What a search refuses before Ray and before its models, and what it may continue."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from gru_core.config import RunConfig
from gru_core.errors import InputError
from pipelines import journal, mirror, search, search_checks, settings, trial
from pipelines.ledger import Ledger
from tests.study import WORDS, write_rows


def study(folder: Path, **values: Any) -> RunConfig:
    given: dict[str, Any] = {
        "output.dir": str(folder / "out"),
        "track.uri": f"sqlite:///{folder}/mlflow.db",
        "evaluate.metrics": ["extraction_strength", "model_utility"],
        "search.trials": 3,
    }
    return settings.with_values(settings.load(None), given | values)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pipelines.ray_start.connect", lambda *_: pytest.fail("Ray was started"))


def refused(config: RunConfig, folder: Path) -> str:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(InputError) as caught:
        search.run(config, say=lambda line: None)
    assert sorted(path.name for path in folder.iterdir()) == before
    return str(caught.value)


NONE = {"plain": {"fixed": {"rectify.rule": "none"}}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"search.space": {"retain.size": {"low": 10, "high": 5000}}}, "retain.size: got 5000"),
        ({"search.space": {"retain.size": [10, 5000, 20]}}, "search.families.sum with retain.include_scored false"),
        ({"search.space": {"unlearn.objective": ["npo", "ga"]}, "unlearn.beta": 0.1}, "unlearn.beta: got 0.1"),
        (
            {
                "search.families": NONE,
                "search.space": {"unlearn.objective": ["ga", "simnpo"], "unlearn.delta": [0.0, 0.5]},
            },
            "search.families.plain: unlearn.delta: got 0.5",
        ),
        (
            {
                "search.families": {"one": {"fixed": {"rectify.retain_weight": 0.0}}},
                "search.space": {"rectify.rule": ["gru", "sum"]},
            },
            "search.families.one: rectify.retain_weight: got 0.0",
        ),
        (
            {
                "search.families": NONE,
                "search.space": {"unlearn.steps": [60, 5], "unlearn.warmup": {"low": 0, "high": 10}},
            },
            "unlearn.warmup: got 10, allowed: 0 to steps (5)",
        ),
        ({"prepare.batch_size": 2, "train.workers": 4}, "prepare.batch_size: got 2"),
        ({"model.dtype": "pure_bfloat16"}, "a model from scratch"),
    ],
)  # fmt: skip
def test_settings_that_some_trial_could_not_run_with(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    assert message in refused(study(tmp_path, **values), tmp_path)


def test_scored_rows_count_where_a_family_lets_them_in(tmp_path: Path) -> None:
    """The same size is too large for the family that leaves them out, and for that one alone."""
    from gru_core.benchmarks import load_benchmark

    benchmark = load_benchmark(study(tmp_path).benchmark)
    families = {
        "all": {"fixed": {"rectify.rule": "gru", "retain.include_scored": True}},
        "fair": {"fixed": {"rectify.rule": "gru"}},
    }
    size = {"search.space": {"retain.size": [10, len(benchmark.retain)]}, "search.trials": 4}
    assert refused(study(tmp_path, **size, **{"search.families": families}), tmp_path).startswith(
        "search.families.fair"
    )
    one = {"search.families": {"all": families["all"]}}
    search_checks.check(study(tmp_path, **size, **one), False, False, lambda line: None)


# ------------------------------------------------------------------------------------------------ continued


def begun(config: RunConfig, kind: str = "search") -> Path:
    """A folder as a command leaves it when it is killed at its first trial."""
    folder = Path(config.output.dir)
    _, _, _, inputs = search_checks.check(config, False, False, lambda line: None)
    with journal.Journal(folder) as record:
        record.run("out", {"gru.kind": kind, search_checks.FINGERPRINT: inputs})
    (folder / "request.yaml").write_text(settings.to_yaml(config))
    return folder


def resume(config: RunConfig) -> None:
    search_checks.check(config, False, True, lambda line: None)


@pytest.mark.parametrize("kind", ["run", "trial"])
def test_a_run_is_not_continued_as_a_search(tmp_path: Path, kind: str) -> None:
    begun(study(tmp_path), kind)
    with pytest.raises(InputError, match="holds no search"):
        resume(study(tmp_path))


def test_a_folder_in_the_home_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    begun(study(tmp_path))
    _, folder, _, _ = search_checks.check(study(tmp_path, **{"output.dir": "~/out"}), False, True, lambda line: None)
    assert folder == tmp_path / "out"


def test_inputs_may_lie_elsewhere_when_they_are_the_same(tmp_path: Path) -> None:
    """As those of a submitted search do, in every Ray session."""

    def at(place: str) -> RunConfig:
        (tmp_path / place).mkdir(exist_ok=True)
        files = {f"benchmark.{part}": str(tmp_path / place / f"{part}.jsonl") for part in ("forget", "retain")}
        metrics = {"evaluate.metrics": ["extraction_strength", "retain_extraction_strength"]}
        names = {"benchmark.name": "jsonl", "evaluate.retention": "retain_extraction_strength"}
        return study(tmp_path, **files, **metrics, **names)

    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        write_rows(tmp_path / place)
    begun(at("one"))
    resume(at("two"))
    changed = tmp_path / "two" / "retain.jsonl"
    rows = [json.loads(line) for line in changed.read_text().splitlines()]
    rows[3]["answer"] += f" {WORDS[0]}"
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"other settings: benchmark\.forget"):
        resume(at("two"))


# ------------------------------------------------------------------------------------------- small promises


def test_a_full_disk_does_not_hide_what_a_trial_died_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert trial._note(tmp_path, RuntimeError("the cause"), None) == "RuntimeError: the cause"


def test_only_trials_that_seem_to_run_are_marked_as_stopped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    lines = {"a-000": ("finished", False), "a-001": ("failed", False), "a-002": ("failed", True), "a-003": (None, True)}
    for name, (status, goes_on) in lines.items():
        ledger.ask(name, "a", {})
        with journal.Journal(tmp_path / "trials" / name) as record:
            record.run(name)
            if status:
                record.metrics(1, {"train/loss": 1.0})
                record.status(status)
            if goes_on:
                record.metrics(2, {"train/loss": 1.0})
    ledger.ask("a-004", "a", {})  # asked for, and not begun
    search._mark_stopped(mirror.Mirror(None, tmp_path, say=print), ledger)
    ended = {name: journal.load(tmp_path / "trials" / name).status for name in lines}
    assert ended == {"a-000": "finished", "a-001": "failed", "a-002": "stopped", "a-003": "stopped"}
    assert not (tmp_path / "trials" / "a-004").exists()
