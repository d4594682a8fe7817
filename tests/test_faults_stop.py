"""SIGTERM with a grace period, in one process; jobs whose client dies, that are stopped, and that are sent again."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gru_core import checkpoint
from pipelines import jobs, journal, stopping, unlearn
from tests import faults
from tests.faults import Fault
from tests.ray_head import Head, ray_head  # noqa: F401
from tests.study import Study, gru


def words(study: Study, folder: Path, *given: str) -> list[str]:
    arguments = ["unlearn", "-c", str(study.config), "--output", str(folder)]
    return arguments + [word for each in (*faults.STEPS, *given) for word in ("--set", each)]


@pytest.fixture(scope="module")
def calm(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm") / "run"
    unlearn.run(study.load(folder, *faults.STEPS), say=lambda line: None)
    return folder


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_resume_goes_on_from_it(study: Study, calm: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    process = faults.driver(words(study, folder), study, log, faults.slowly(6, 12))
    faults.wait(lambda: faults.reached(folder, 5), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 130
    last = checkpoint.latest(folder / "checkpoints")
    assert last is not None
    assert last.step == max(journal.load(folder).metrics)
    said = log.read_text().strip().splitlines()
    assert any(line.endswith(f"stopped at step {last.step} of 12; --resume goes on") for line in said)
    assert said[-1] == "gru: interrupted"
    assert journal.load(folder).status == "stopped"
    assert faults.tracked(folder, faults.store_of(study)).info.status == "KILLED"
    done = gru(["unlearn", "--output", str(folder), "--resume"], study.environment)
    assert done.returncode == 0, done.stderr
    assert faults.same_result(calm, folder)
    faults.each_once(folder, 12, [0, 6, 12])
    faults.tracked_once(folder, 12, faults.store_of(study))


@pytest.mark.slow
def test_what_takes_longer_than_the_grace_period_ends_anyway(study: Study, tmp_path: Path) -> None:
    """A step that hangs, in a process that nobody restarts: the checkpoint before it stands."""
    folder, log = tmp_path / "run", tmp_path / "log"
    plan = [Fault("step", 6, how="loop")]
    process = faults.driver(words(study, folder, "train.grace=2"), study, log, plan)
    faults.wait((tmp_path / "marks" / "step-6-0").exists, process)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert time.monotonic() - begun > 2
    assert "no checkpoint within 2 s" in log.read_text()
    last = checkpoint.latest(folder / "checkpoints")
    assert last is not None
    assert last.step == 4
    assert journal.load(folder).status == "stopped"


# ------------------------------------------------------------------------------------------- the request itself


@pytest.fixture
def handler() -> Iterator[list[int]]:
    """SIGTERM that is heard, and does nothing."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, before)


def test_a_request_is_taken_where_something_runs_and_once(tmp_path: Path, handler: list[int]) -> None:
    said: list[str] = []
    assert not stopping.ask()
    (tmp_path / stopping.NAME).write_text("of an earlier run")
    poll, elsewhere = stopping.polled(tmp_path), stopping.polled(tmp_path / "other", tmp_path)
    with stopping.listening(tmp_path, 0.3, said.append):
        assert not (tmp_path / stopping.NAME).exists()
        assert not poll()
        assert stopping.ask()
        assert stopping.asked()
        assert poll()
        assert not stopping.ask(), "the second time it is an interrupt"
        faults.wait(lambda: (tmp_path / stopping.NAME).exists(), limit=15)
        stopping._State.asked = False  # as in another process
        faults.wait(elsewhere, limit=15)
        faults.wait(lambda: handler == [signal.SIGTERM], limit=15)
    assert [line.partition(":")[0] for line in said] == ["asked to stop", "no checkpoint within 0.3 s"]
    assert not (tmp_path / stopping.NAME).exists()
    assert not stopping.ask()


def test_a_request_reaches_workers_through_shared_storage(tmp_path: Path, handler: list[int]) -> None:
    from pipelines.storage import Storage

    storage = Storage(str(tmp_path / "storage"))
    folder = tmp_path / "run"
    folder.mkdir()
    with stopping.listening(folder, 30, lambda line: None, storage):
        assert not stopping.polled(storage=storage)()
        assert stopping.ask()
        faults.wait(lambda: storage.read(stopping.NAME) is not None, limit=15)
        stopping._State.asked = False
        assert stopping.polled(storage=storage)()
    assert storage.read(stopping.NAME) is None


# ---------------------------------------------------------------------------------------------------- jobs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_outlives_its_client_and_is_stopped_and_sent_again(
    study: Study,
    tmp_path: Path,
    ray_head: Head,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    given = ["unlearn.steps=150", "unlearn.evaluate_every=150", "train.checkpoint_every=200"]
    calm, folder = tmp_path / "calm", tmp_path / "run"
    unlearn.run(study.load(calm, *given), say=lambda line: None)
    job = ["unlearn", "-c", str(study.config), "--output", str(folder), "--tracking-uri", faults.store_of(study)]
    job += [word for each in given for word in ("--set", each)]
    command = ["submit", "--address", ray_head.address, *job]
    client = faults.driver(command, study, tmp_path / "log", faults.slowly(2, 150))  # minutes, were it left alone
    faults.wait(lambda: faults.reached(folder, 1), client)
    client.kill()
    client.wait()
    at = max(journal.load(folder).metrics)
    faults.wait(lambda: faults.reached(folder, at + 3))
    found = _only_job(ray_head)
    jobs.stop(found, address=ray_head.address)
    assert jobs.status(found, address=ray_head.address)["status"] == "STOPPED"
    last = checkpoint.latest(folder / "checkpoints")
    assert last is not None
    assert last.step == max(journal.load(folder).metrics) < 150, "the only one: written for the stop"
    again = jobs.submit([*job, "--resume"], address=ray_head.address, wait=True, say=lambda line: None)
    assert again["status"] == "SUCCEEDED"
    assert faults.same_result(calm, folder)
    faults.each_once(folder, 150, [0, 150])


def _only_job(head: Head) -> str:
    from pipelines import cluster

    found: list[Any] = [each for each in cluster.connect(head.address).client.list_jobs() if each.status == "RUNNING"]
    return str(found[0].submission_id)
