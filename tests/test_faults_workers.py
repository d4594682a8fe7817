"""Workers that die or hang, at chosen moments, on a running Ray: the result is that of the undisturbed run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gru_core import checkpoint
from gru_core.errors import StorageError
from pipelines import journal, settings, unlearn
from tests import faults
from tests.faults import Fault
from tests.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        faults.switches(patch)
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
            object_store_memory=120_000_000,
        )  # fmt: skip
        ray.cloudpickle.register_pickle_by_value(faults)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def calm(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run on two workers."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    unlearn.run(study.load(folder, *faults.STEPS, "train.workers=2"), say=lambda line: None)
    return folder


def shaken(
    monkeypatch: pytest.MonkeyPatch, study: Study, folder: Path, plan: list[Fault], *given: str
) -> tuple[list[str], dict[str, Any]]:
    """A run with faults; what was said, and its result."""
    marks = folder.parent / "marks"
    said: list[str] = []
    monkeypatch.setattr(unlearn.worker, "task", faults.planned(plan, marks))
    result = unlearn.run(study.load(folder, *faults.STEPS, *given), say=said.append)
    assert faults.struck(marks) == {fault.name for fault in plan}, "a fault did not strike"
    return said, result


def test_killed_hung_and_frozen_again_and_again(
    monkeypatch: pytest.MonkeyPatch, study: Study, calm: Path, tmp_path: Path
) -> None:
    """One run, five deaths: a rank killed in a step, in an evaluation, the writing one in a checkpoint; one hangs in a
    loop, which it notices itself; one is frozen (SIGSTOP) and cannot: the one that waits for it does."""
    folder = tmp_path / "run"
    plan = [
        Fault("step", 5, rank=1), Fault("evaluation", 6, rank=1), Fault("checkpoint", 8),
        Fault("step", 10, rank=1, how="loop"), Fault("step", 11, rank=0, how="freeze"),
    ]  # fmt: skip
    said, _ = shaken(
        monkeypatch, study, folder, plan, "train.workers=2", "train.max_failures=5", "train.hang_timeout=12"
    )
    assert faults.same_result(calm, folder)
    faults.each_once(folder, 12, [0, 6, 12])
    faults.tracked_once(folder, 12, faults.store_of(study))
    notes = [f"started again with 2 workers, from step {step} on" for step in (4, 4, 4, 8, 8)]
    assert [note for note in journal.load(folder).notes if "started again" in note] == notes
    assert [line for line in said if "started again" in line] == [f"note: {note}" for note in notes]
    assert sum("made no progress for 12 s" in line for line in said) >= 2, "the one in a loop, and the frozen one"
    assert max(faults.executed(tmp_path / "marks").values()) <= 4 * 2, "each start repeats one interval at most"


def test_sharded_workers_killed_in_a_checkpoint_and_in_an_evaluation(
    monkeypatch: pytest.MonkeyPatch, study: Study, tmp_path: Path
) -> None:
    """Every rank writes its own part: one dies with its part on the disk, and that is no checkpoint."""
    given = ("train.workers=2", "train.strategy=fsdp", "train.max_failures=2")
    calm, folder = tmp_path / "calm", tmp_path / "shaken" / "run"
    unlearn.run(study.load(calm, *faults.STEPS, *given), say=lambda line: None)
    plan = [Fault("checkpoint", 8, rank=1), Fault("evaluation", 12)]
    shaken(monkeypatch, study, folder, plan, *given)
    assert faults.same_result(calm, folder)
    faults.each_once(folder, 12, [0, 6, 12])
    faults.tracked_once(folder, 12, faults.store_of(study))
    notes = [f"started again with 2 workers, from step {step} on" for step in (4, 8)]
    assert list(journal.load(folder).notes) == notes


def test_a_frozen_worker_that_is_alone_is_replaced(
    monkeypatch: pytest.MonkeyPatch, study: Study, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    unlearn.run(study.load(alone, *faults.STEPS), say=lambda line: None)
    folder = tmp_path / "shaken" / "run"
    plan = [Fault("step", 7, how="freeze")]
    shaken(monkeypatch, study, folder, plan, "train.workers=1", "train.hang_timeout=12")
    assert faults.same_result(alone, folder)
    faults.each_once(folder, 12, [0, 6, 12])


def test_a_full_disk_is_not_tried_again_and_resumes_and_a_full_object_store_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, study: Study, calm: Path, tmp_path: Path
) -> None:
    """The disk is full in the checkpoint after step 8: one start, one error; then there is room again. All the while
    the object store is full of what somebody else has in use, so that Ray cannot move it to the disk."""
    import numpy as np
    import ray

    kept = [ray.put(np.ones(2_000_000)) for _ in range(8)]  # 16 MB each: more than there is room for
    used = [ray.get(each) for each in kept]
    folder = tmp_path / "run"
    plan = [Fault("checkpoint", 8, how="full")]
    given = ("train.workers=2", "train.max_failures=3")
    with pytest.raises(StorageError, match=r"No space left.*last whole checkpoint is .*step-00000004"):
        shaken(monkeypatch, study, folder, plan, *given)
    assert set(faults.executed(tmp_path / "marks").values()) == {2}, "each step once on each rank: no restart"
    assert journal.load(folder).status == "failed"
    monkeypatch.undo()
    unlearn.run(study.load(folder, *faults.STEPS, *given), resume=True, say=lambda line: None)
    assert faults.same_result(calm, folder)
    faults.each_once(folder, 12, [0, 6, 12])
    faults.tracked_once(folder, 12, faults.store_of(study))
    assert all(each.sum() == 2_000_000 for each in used)


def test_the_number_of_workers_changes_between_stop_and_resume(
    monkeypatch: pytest.MonkeyPatch, study: Study, calm: Path, tmp_path: Path
) -> None:
    """1 -> 2, stopped by a request in the folder; 2 -> 1 is what test_faults_nodes.py does."""
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        shaken_once(patch, study, folder, Fault("step", 3, 0, "ask"), "train.workers=1")
    assert journal.load(folder).status == "stopped"
    unlearn.run(study.load(folder, *faults.STEPS, "train.workers=2"), resume=True, say=lambda line: None)
    start = Path(settings.load(str(folder / "config.yaml")).model.path)
    assert 0 < faults.distance(folder, calm, start) < 1e-4
    faults.each_once(folder, 12, [0, 6, 12])
    faults.tracked_once(folder, 12, faults.store_of(study))
    assert [note.rpartition(" on")[0] for note in journal.load(folder).notes] == [
        "started again with 2 workers, from step 4"
    ]


def shaken_once(
    monkeypatch: pytest.MonkeyPatch, study: Study, folder: Path, fault: Fault, *given: str
) -> dict[str, Any]:
    monkeypatch.setattr(unlearn.worker, "task", faults.planned([fault], folder.parent / "marks"))
    return unlearn.run(study.load(folder, *faults.STEPS, *given), resume=folder.exists(), say=lambda line: None)


def test_a_driver_with_workers_is_ended_and_resumed_twice(study: Study, calm: Path, tmp_path: Path) -> None:
    """SIGTERM: a checkpoint at the step at hand, exit code 130. Then SIGKILL: the last checkpoint stands."""
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = ["unlearn", "-c", str(study.config), "--output", str(folder), "--set", "train.workers=2"]
    arguments += [word for each in faults.STEPS for word in ("--set", each)]

    def end(how: int, step: int, last: int, *more: str) -> tuple[int, str]:
        process = faults.driver([*arguments, *more], study, log, faults.slowly(step + 1, last))
        faults.wait(lambda: faults.reached(folder, step), process)
        process.send_signal(how)
        return process.wait(90), log.read_text()

    code, text = end(signal.SIGTERM, 3, 6)
    stopped = checkpoint.latest(folder / "checkpoints")
    assert stopped is not None
    assert code == 130, text
    assert f"stopped at step {stopped.step} of 12; --resume goes on" in text
    assert 3 <= stopped.step <= 7
    assert max(journal.load(folder).metrics) == stopped.step
    code, text = end(signal.SIGKILL, 9, 12, "--resume")
    assert code == -signal.SIGKILL, text
    left = checkpoint.latest(folder / "checkpoints")
    assert left is not None
    assert left.step == 8
    assert journal.load(folder).status != "finished"
    unlearn.run(study.load(folder, *faults.STEPS, "train.workers=2"), resume=True, say=lambda line: None)
    assert faults.same_result(calm, folder)
    faults.each_once(folder, 12, [0, 6, 12])
    faults.tracked_once(folder, 12, faults.store_of(study))
