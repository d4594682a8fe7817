"""``gru search`` around a fake trial: budgets, failures, resources, resume."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from gru_core.config import TrainConfig
from gru_core.errors import InputError
from pipelines import capacity, journal, output, provenance, ray_start, search, search_checks, settings, trial
from pipelines.families import family_of
from tests import search_fakes as fakes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    import ray

    for name, value in ray_start.SWITCHES.items():
        os.environ.setdefault(name, value)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.cloudpickle.register_pickle_by_value(fakes)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.prepare, "resolve", fakes.prepared)


def run(config: Any, said: list[str] | None = None, resume: bool = False, **work: Any) -> dict[str, Any]:
    say = said.append if said is not None else lambda line: None
    return search.run(config, resume=resume, say=say, work=functools.partial(fakes.work, **work), load=fakes.load)


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_every_family_gets_the_same_number_of_trials(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "out"
    document = run(fakes.study(folder), said)

    assert document["trials"] == {"total": 6, "finished": 6, "collapsed": 0, "non_finite": 0, "failed": 0}
    asked = [entry["id"] for entry in ledger(folder) if entry["kind"] == "ask"]
    assert asked == ["plain-000", "sum-000", "rectified-000", "plain-001", "sum-001", "rectified-001"]
    assert {name: row["trials"] for name, row in document["families"].items()} == {
        "plain": 2, "sum": 2, "rectified": 2,
    }  # fmt: skip
    assert document["comparable"]
    assert document["hypervolume"].keys() == {"plain", "sum", "rectified"}
    assert sum("unlearning" in line and line.startswith("[") for line in said) == 6
    for name in asked:
        mine = folder / "trials" / name
        assert not (mine / "checkpoints").exists()
        record = journal.load(mine)
        assert record.tags == {"gru.kind": "trial", "gru.family": family_of(name), "gru.trial": name}
        rule = {"plain": "none", "sum": "sum", "rectified": "gru"}[family_of(name)]
        assert record.params["rectify.rule"] == rule
    assert settings.load(str(folder / "config.yaml")).search.trials == 6
    assert journal.load(folder).status == "finished"


def test_the_final_report_is_the_best_candidate(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(fakes.study(folder))
    for entry in ledger(folder):
        if entry["kind"] == "end":
            points = [p for p in journal.points(folder / "trials" / entry["id"]) if p["step"] > 0]
            best = max(points, key=lambda p: p["unlearning"] * p["retention"])
            assert (entry["step"], entry["unlearning"]) == (best["step"], best["unlearning"])


def test_a_failed_trial_costs_only_itself_and_resume_runs_it_again(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "out"
    config = fakes.study(folder, **{"train.max_failures": 1})
    document = run(config, said, broken=("sum-000",), refused=("plain-001",))
    assert document["trials"]["failed"] == 2
    assert document["trials"]["finished"] == 4
    assert any("sum-000  failed: OSError: a fake that breaks" in line for line in said)
    assert (folder / "trials" / "sum-000" / "starts").read_text().count("started") == 2  # once more: max_failures
    assert (folder / "trials" / "plain-001" / "starts").read_text().count("started") == 1  # bad input stays bad
    assert journal.load(folder / "trials" / "sum-000").status == "failed"
    before = [entry for entry in ledger(folder) if entry["kind"] == "ask"]

    document = run(config, resume=True)
    assert document["trials"]["finished"] == 6
    assert [entry for entry in ledger(folder) if entry["kind"] == "ask"] == before
    assert journal.load(folder / "trials" / "sum-000").status == "finished"
    assert (folder / "trials" / "rectified-000" / "starts").read_text().count("started") == 1


def test_all_failed_is_an_error_with_the_first_cause(tmp_path: Path) -> None:
    names = tuple(f"{family}-000" for family in ("plain", "sum", "rectified"))
    config = fakes.study(tmp_path / "out", **{"search.trials": 3, "train.max_failures": 0})
    with pytest.raises(RuntimeError, match=r"all 3 trials failed; the first: .*a fake that breaks"):
        run(config, broken=names)
    assert journal.load(tmp_path / "out").status == "failed"


def test_a_grid_runs_every_combination_once(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "search.sampler": "grid",
        "search.space": {"unlearn.lr": [1e-3, 2e-3], "unlearn.objective": ["ga", "npo"]},
        "search.families": {"plain": {"fixed": {"rectify.rule": "none"}}},
    }
    run(fakes.study(tmp_path / "out", **given))
    asked = [entry["params"] for entry in ledger(tmp_path / "out") if entry["kind"] == "ask"]
    assert asked == [{"unlearn.lr": lr, "unlearn.objective": name} for lr in (1e-3, 2e-3) for name in ("ga", "npo")]


def test_more_than_the_cluster_has_is_said_before_anything_is_written(tmp_path: Path) -> None:
    config = fakes.study(tmp_path / "out", **{"train.workers": 64, "unlearn.batch_size": 64, "prepare.batch_size": 64})
    with pytest.raises(InputError, match=r"64 worker.*2"):
        run(config)
    assert not (tmp_path / "out").exists()


def test_resume_refuses_another_search_and_repeats_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(fakes.study(folder, **{"search.trials": 3}))
    with pytest.raises(InputError, match=r"unlearn\.steps \(was 60, now 61\)"):
        run(fakes.study(folder, **{"search.trials": 3, "unlearn.steps": 61}), resume=True)
    lines = (folder / "trials.jsonl").read_bytes()
    document = run(fakes.study(folder, **{"search.trials": 3, "search.concurrent": 1}), resume=True)
    assert document["trials"]["finished"] == 3
    assert (folder / "trials.jsonl").read_bytes() == lines


def test_a_running_search_is_not_overwritten_by_a_second_one(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(fakes.study(folder, **{"search.trials": 3}))
    before = sorted(str(path) for path in folder.rglob("*"))
    with output.hold(folder), pytest.raises(InputError, match="another process"):
        search.run(fakes.study(folder), overwrite=True, say=lambda line: None, work=fakes.work, load=fakes.load)
    assert sorted(str(path) for path in folder.rglob("*")) == before


def test_mlflow_follows_a_search_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAILED, then RUNNING while it goes on, then FINISHED."""
    from mlflow import MlflowClient

    config = fakes.study(tmp_path / "out", **{"search.trials": 3, "train.max_failures": 0})
    names = tuple(f"{family}-000" for family in ("plain", "sum", "rectified"))
    with pytest.raises(RuntimeError, match="all 3 trials failed"):
        run(config, broken=names)
    client = MlflowClient(config.track.uri)
    run_id = json.loads((tmp_path / "out" / "mlflow.json").read_text())["run_id"]
    assert client.get_run(run_id).info.status == "FAILED"
    seen: list[str] = []
    real = search._trials

    def watched(*given: Any) -> None:
        time.sleep(5)  # two deliveries
        seen.append(client.get_run(run_id).info.status)
        real(*given)

    monkeypatch.setattr(search, "_trials", watched)
    run(config, resume=True)
    assert seen == ["RUNNING"]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_an_error_in_the_driver_leaves_no_trial_that_seems_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(study: trial.Study, searcher: Any, at_a_time: int) -> None:
        spec = searcher.suggest("first")
        with journal.Journal(study.folder / "trials" / spec["id"]) as record:
            record.run(spec["id"], {})
        raise SystemExit(143)  # as SIGTERM ends a driver

    monkeypatch.setattr(search, "_tune", broken)
    with pytest.raises(SystemExit):
        run(fakes.study(tmp_path / "out"))
    assert journal.load(tmp_path / "out" / "trials" / "plain-000").status == "stopped"
    assert journal.load(tmp_path / "out").status == "stopped"


@pytest.mark.parametrize(("workers", "tries"), [(0, 2), (2, 0)])
def test_trials_with_workers_are_restarted_once_and_not_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, tries: int
) -> None:
    from ray import tune

    seen: list[int] = []

    def tuner(*_: Any, run_config: Any, **__: Any) -> Any:
        seen.append(run_config.failure_config.max_failures)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "Tuner", tuner)
    config = fakes.study(tmp_path / "out", **{"train.workers": workers, "train.max_failures": 2})
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert seen == [tries]
    assert journal.load(tmp_path / "out").status == "stopped"


def test_no_file_of_a_search_holds_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store takes the password from the config alone; config, request, trials and journals have none of it."""
    plain = fakes.study(tmp_path / "out", **{"search.trials": 3})
    secret = settings.with_values(plain, {"track.uri": "postgresql://user:hunter2@db/mlflow"})
    given: list[str] = []
    monkeypatch.setattr(search_checks.tracking, "check", lambda uri, say: given.append(uri))
    monkeypatch.setattr(search, "Courier", lambda uri, *_, **__: given.append(uri) or nullcontext())
    monkeypatch.setattr(search, "_frontier", lambda folder, uri, say: given.append(uri) or {"artifacts": ()})
    run(secret)
    assert given == ["postgresql://user:hunter2@db/mlflow"] * 3
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
    assert "postgresql://db/mlflow" in (tmp_path / "out" / "request.yaml").read_text()
    run(secret, resume=True)


def test_one_metric(tmp_path: Path) -> None:
    config = fakes.study(tmp_path / "out", **{"search.metrics": ["retention"], "search.trials": 3})
    run(config)
    ends = [entry for entry in ledger(tmp_path / "out") if entry["kind"] == "end"]
    assert [entry["step"] for entry in ends] == [1, 1, 1]  # retention only falls; step 0 is no candidate


def _drive(folder: Path, seconds: float, end: signal.Signals) -> tuple[int, list[str], dict[str, str]]:
    """A driver of its own, ended by a signal in the middle of its second trial."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "tests.search_fakes", str(folder), str(seconds)]
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = folder / "trials" / "sum-000" / "checkpoints" / "step"
    try:
        _wait(lambda: checkpoint.exists() and checkpoint.read_text() == "1", 180)
        driver.send_signal(end)
        return driver.wait(60), command, environment
    finally:
        driver.kill()
        driver.wait()


def test_ctrl_c_stops_the_search_and_leaves_it_to_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code, _, _ = _drive(folder, 3.0, signal.SIGINT)
    assert code != 0
    assert [entry["id"] for entry in ledger(folder) if entry["kind"] == "end"] == ["plain-000"]
    assert journal.load(folder).status == "stopped"
    assert journal.load(folder / "trials" / "sum-000").status == "stopped"


def test_a_driver_killed_mid_search_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    _, command, environment = _drive(folder, 6.0, signal.SIGKILL)
    entries = ledger(folder)
    assert [entry["id"] for entry in entries if entry["kind"] == "end"] == ["plain-000"]

    again = subprocess.run(
        [*command[:4], "0.1", "resume"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert "done {'total': 6, 'finished': 6" in again.stdout
    assert ledger(folder)[: len(entries)] == entries
    asked = [entry["id"] for entry in ledger(folder) if entry["kind"] == "ask"]
    assert len(asked) == len(set(asked)) == 6
    assert (folder / "trials" / "plain-000" / "starts").read_text().count("started") == 1
    assert (folder / "trials" / "sum-000" / "starts").read_text().count("started") == 2
    whole = tmp_path / "whole"
    run(fakes.study(whole, **{"search.concurrent": 1}))
    assert [e for e in ledger(whole) if e["kind"] == "ask"] == [e for e in ledger(folder) if e["kind"] == "ask"]


def _wait(ready: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, "nothing happened in time"
        time.sleep(0.05)


def test_the_folder_of_a_trial_belongs_to_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "LOCK_S", 0.3)
    with trial.alone(tmp_path):
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="another process"), trial.alone(tmp_path):
            pass
        assert time.monotonic() - began >= 0.3
    with trial.alone(tmp_path):
        pass


def test_provenance_names_commit_and_versions() -> None:
    import torch

    found = provenance.tags()
    assert found["gru.versions.torch"] == torch.__version__
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert found["gru.commit"].removesuffix("+changes") == head.stdout.strip()


def test_trials_with_workers_take_no_cpu_that_their_workers_need() -> None:
    assert trial.resources(TrainConfig(workers=2), 0.0) == {"memory": 1}
    assert trial.resources(TrainConfig(cpus_per_worker=2), 0.5) == {"CPU": 2, "GPU": 0.5}


def test_capacity() -> None:
    two, gpu = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}
    assert capacity.slots(TrainConfig(), 0.0, [two, gpu]) == 10
    assert capacity.slots(TrainConfig(cpus_per_worker=3), 0.0, [two, gpu]) == 2  # no worker spans nodes
    assert capacity.slots(TrainConfig(), 0.5, [two, gpu]) == 4
    assert capacity.slots(TrainConfig(), 0.4, [gpu]) == 4  # a worker does not span GPUs either
    assert capacity.concurrency(TrainConfig(workers=2), 0.0, None, [two]) == 1
    assert capacity.concurrency(TrainConfig(), 0.0, 3, [two, gpu]) == 3
    with pytest.raises(InputError, match=r"3 workers need 6 CPUs .* 4 CPUs .* 2 node\(s\): room for 2"):
        capacity.check_room(TrainConfig(workers=3, cpus_per_worker=2), 0.0, [two, two])
