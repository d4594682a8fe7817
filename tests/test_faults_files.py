"""Damaged checkpoints: noticed by their checksums, passed over, and told; the result is the undisturbed one."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest

from pipelines import journal, unlearn
from tests import faults
from tests.mlflow_server import empty_store
from tests.study import Study


@pytest.fixture(scope="module")
def calm(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm") / "run"
    unlearn.run(study.load(folder, *faults.STEPS), say=quiet)
    return folder


@pytest.fixture(scope="module")
def stopped(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was asked to stop in its tenth step: checkpoints after steps 8 and 10."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    asked = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearn.worker.stopping, "polled", lambda *folders, storage: lambda: next(asked) >= 10)
        with pytest.raises(KeyboardInterrupt):
            unlearn.run(study.load(folder, *faults.STEPS), say=quiet)
    assert sorted(each.name for each in (folder / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]
    assert journal.load(folder).status == "stopped"
    assert not (folder / "scores.json").exists()
    return folder


@pytest.mark.parametrize(
    ("name", "how", "fault"),
    [
        ("model.safetensors", "flip", "model.safetensors has another checksum"),
        ("optimizer.safetensors", "truncate", "optimizer.safetensors has"),
        ("state.json", "remove", "state.json cannot be read"),
        ("state.json", "flip", "state.json"),
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_used_and_that_is_said(
    study: Study, calm: Path, stopped: Path, tmp_path: Path, name: str, how: str, fault: str
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    part = shutil.copytree(folder / "checkpoints" / "step-00000010", folder / "checkpoints" / ".part-00000011")
    (part / "state.json").unlink()  # as a kill in the middle of writing leaves it
    faults.damage(folder / "checkpoints" / "step-00000010" / name, how)
    said: list[str] = []
    store = empty_store(tmp_path / "mlflow.db")  # of its own: copies of one run would meet in one place
    unlearn.run(study.load(folder, *faults.STEPS, f"track.uri={store}"), resume=True, say=said.append)
    assert faults.same_result(calm, folder)
    faults.each_once(folder, 12, [0, 6, 12])
    faults.tracked_once(folder, 12, store)
    told = [line for line in said if "is damaged" in line]
    assert len(told) == 1
    assert "step-00000010" in told[0]
    assert fault in told[0]
    first, second = journal.load(folder).notes
    assert told == [f"note: {first}"]
    assert second == "started again, from step 8 on"
    assert faults.tracked(folder, store).data.tags["gru.note.1"] == first


def test_without_any_whole_checkpoint_the_run_begins_again(
    study: Study, calm: Path, stopped: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    for each in (folder / "checkpoints").iterdir():
        faults.damage(each / "rng.safetensors", "truncate")
    said: list[str] = []
    store = empty_store(tmp_path / "mlflow.db")
    unlearn.run(study.load(folder, *faults.STEPS, f"track.uri={store}"), resume=True, say=said.append)
    assert faults.same_result(calm, folder)
    assert sum("is damaged" in line for line in said) == 2
    assert json.loads((folder / "scores.json").read_text())["steps"] == 12


def test_settings_of_the_machines_may_change_on_resume_and_no_others(study: Study, stopped: Path) -> None:
    free = ["train.workers=3", "train.min_workers=1", "train.micro_batch=2", "train.max_failures=7", "train.grace=3"]
    free += ["train.hang_timeout=5", "train.cpus_per_worker=2", "train.gpus_per_worker=0"]
    free += ["train.activation_checkpointing=true", "train.strategy=fsdp", "train.cpu_offload=true"]
    unlearn.same_config(study.load(stopped, *faults.STEPS, *free), stopped, "content")
    for other in ("train.seed=1", "unlearn.batch_size=4", "train.checkpoint_every=3"):
        with pytest.raises(unlearn.InputError, match=other.partition("=")[0]):
            unlearn.same_config(study.load(stopped, *faults.STEPS, other), stopped, "content")


def test_rows_may_lie_elsewhere_on_resume_where_they_are_the_same(
    study: Study, calm: Path, stopped: Path, tmp_path: Path
) -> None:
    """As a job finds them on another cluster; other rows are refused."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    moved, other = tmp_path / "moved.jsonl", tmp_path / "other.jsonl"
    rows = (study.folder / "forget.jsonl").read_text().splitlines(keepends=True)
    moved.write_text("".join(rows))
    other.write_text("".join(rows[:-1]))
    store = f"track.uri={empty_store(tmp_path / 'mlflow.db')}"
    with pytest.raises(unlearn.InputError, match=r"benchmark\.forget"):
        unlearn.run(study.load(folder, *faults.STEPS, store, f"benchmark.forget={other}"), resume=True, say=quiet)
    unlearn.run(study.load(folder, *faults.STEPS, store, f"benchmark.forget={moved}"), resume=True, say=quiet)
    assert faults.same_result(calm, folder)


def quiet(line: str) -> None:
    """Says nothing."""
