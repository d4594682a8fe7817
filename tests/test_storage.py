"""Runs and searches kept in shared storage: nothing that is lost on a machine is missed, kills and damage included."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file

from gru_core.errors import InputError, StorageError
from gru_core.parallel import Group
from pipelines import alive, export, journal, output, stopping, storage, unlearn
from pipelines.keeper import Keeper
from pipelines.mirror import Mirror
from pipelines.storage import EVALUATING, Storage
from tests.ray_head import can_hide, start_head, start_node
from tests.study import Study, final_weights, gru

T = TypeVar("T")
SHORT = ("unlearn.steps=6", "unlearn.evaluate_every=3", "train.checkpoint_every=2", "evaluate.rows=4")


def say(line: str) -> None:
    pass


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def once(folder: Path, steps: int) -> None:
    """Each step and each evaluation stands once in the journal."""
    seen = [(e["step"], key) for e in journal.read(folder)[0] if e["kind"] == "metrics" for key in e["metrics"]]
    assert len(seen) == len(set(seen))
    assert [step for step, key in seen if key == "train/lr"] == list(range(1, steps + 1))


@pytest.fixture(scope="module")
def calm(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run without storage."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    unlearn.run(study.load(folder, *SHORT), say=say)
    return folder


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0, 0.0))


# -------------------------------------------------------------------------------------------------- files


def test_files_go_there_and_come_back(tmp_path: Path) -> None:
    here, back = tmp_path / "here", tmp_path / "back"
    (here / "a" / "b").mkdir(parents=True)
    (here / "one.bin").write_bytes(bytes(range(256)) * 9)
    (here / "a" / "b" / "two.txt").write_text("two")
    there = Storage(f"file://{tmp_path}/there/x")
    assert there.names() == {}
    there.push(here, ["one.bin", "a/b/two.txt"])
    assert {name: size for name, (size, _) in there.names().items()} == {"one.bin": 2304, "a/b/two.txt": 3}
    assert [*there.names("a")] == ["a/b/two.txt"]
    same = pickle.loads(pickle.dumps(there))
    same.pull(back, [*there.names(), "missing"])
    assert (back / "one.bin").read_bytes() == (here / "one.bin").read_bytes()
    assert same.under("a").read("b/two.txt") == b"two"
    assert same.read("missing") is None
    same.delete(["one.bin", "missing"])
    assert [*there.names()] == ["a/b/two.txt"]
    assert [p.name for p in tmp_path.rglob(".*")] == [], "no file is left under another name"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://planted:planted-secret@bucket/x",
        "s3://bucket/x?access_key=planted&secret_key=planted-secret",
        "s3://bucket/x?scheme=http&password=planted-secret",
        "file:///tmp/x?token=planted-secret",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_shown(uri: str, study: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"output\.storage: .* from the environment") as error:
        unlearn.run(study.load(tmp_path / "run", f"output.storage={uri}"), say=say)
    assert "planted" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "uri", ["runs/one", "http://host/x", "s3://", "s3://bucket/x?retries=3", "file://host/x", "/tmp/../etc"]
)
def test_other_places_are_refused(uri: str) -> None:
    with pytest.raises(InputError, match=r"output\.storage: got .*allowed"):
        Storage(uri)


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Storage(str(tmp_path))
    monkeypatch.setattr(Storage, "_tried", lambda *given: {"a/../../b": (1, 1)})
    with pytest.raises(StorageError, match="not allowed"):
        there.names()


def test_what_fails_is_tried_again_and_then_told_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: None
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    (tmp_path / "a").write_text("a")
    there, put = Storage(f"{tmp_path}/there"), Storage._put
    left = [3]

    def failing(self: Storage, *given: Any) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError("503 for planted-secret at https://me:word@host/x")
        return put(self, *given)

    monkeypatch.setattr(Storage, "_put", failing)
    there.push(tmp_path, ["a"])
    assert there.read("a") == b"a"
    left[0] = 4
    with pytest.raises(StorageError, match=rf"^the storage {tmp_path}/there cannot be written \(a\): 503") as error:
        there.push(tmp_path, ["a"])
    assert "planted-secret" not in str(error.value)
    assert "word" not in str(error.value)


def test_a_storage_that_cannot_be_used_is_told_before_anything_is_written(study: Study, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=rf"output\.storage: {tmp_path}/file/x cannot be used"):
        unlearn.run(study.load(tmp_path / "run", f"output.storage={tmp_path}/file/x"), say=say)
    assert not (tmp_path / "run").exists()


class _Store:
    """Stands for an object store's file system: closing a stream publishes what was written so far."""

    def __init__(self, **objects: bytes) -> None:
        self.objects = objects

    def open_output_stream(self, path: str) -> Any:
        store = self

        class Stream(io.BytesIO):
            def close(self) -> None:
                if not self.closed:
                    store.objects[path] = self.getvalue()
                super().close()

        return Stream()

    def delete_file(self, path: str) -> None:
        del self.objects[path]


class _Torn(io.BytesIO):
    """A file on a disk that fails after its first bytes."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise OSError("the disk failed")
        return super().read(3)


def test_an_upload_that_breaks_off_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, file = Storage("s3://study/x"), tmp_path / "file"
    file.write_bytes(b"whole content")
    small, large = _Store(file=b"before"), _Store()
    assert there._put(small, "file", file) == 13
    assert small.objects == {"file": b"whole content"}

    def failing(path: Path) -> bytes:
        raise OSError("the disk failed")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(OSError, match="the disk failed"):
            there._put(small, "file", file)
    assert small.objects == {"file": b"whole content"}, "what stood there is still there"
    monkeypatch.setattr(storage, "_SMALL", 5)
    assert there._put(large, "file", file) == 13
    assert large.objects == {"file": b"whole content"}
    monkeypatch.setattr(Path, "open", lambda path, mode: _Torn(b"whole content"))
    with pytest.raises(OSError, match="the disk failed"):
        there._put(large, "file", file)
    assert large.objects == {}
    monkeypatch.setattr(storage, "WAITS", ())
    with pytest.raises(StorageError, match="the disk failed"):
        Storage(f"{tmp_path}/folder").push(tmp_path, ["file"])
    assert [p for p in (tmp_path / "folder").rglob("*") if p.is_file()] == []


def test_an_interrupt_waits_for_the_upload_of_a_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("whole")
    put = Storage._put

    def slow(self: Storage, *given: Any) -> int:
        time.sleep(0.1)  # until the main thread waits
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        return put(self, *given)

    monkeypatch.setattr(Storage, "_put", slow)
    there = Storage(f"{tmp_path}/there")
    with pytest.raises(KeyboardInterrupt):
        there.push(tmp_path, ["a"])
    assert there.read("a") == b"whole"


def test_what_a_killed_check_left_is_no_content(tmp_path: Path) -> None:
    (tmp_path / ".gru-check-0123abcd").write_text("gru")
    assert Storage(str(tmp_path)).names() == {}
    assert output.examine(tmp_path / "run", overwrite=False, resume=False, storage=Storage(str(tmp_path)))


def test_a_local_journal_of_another_run_is_refused_while_the_storage_has_none(tmp_path: Path) -> None:
    there, folder = tmp_path / "there", tmp_path / "run"
    there.mkdir()
    with journal.Journal(folder) as record:
        record.run("mine", {})
    copy = Mirror(str(there), folder)
    (folder / "request.yaml").write_text("unlearn: {steps: 1}\n")
    (there / "config.yaml").write_text("unlearn: {steps: 9}\n")
    (folder / "config.yaml").write_text("unlearn: {steps: 9}\n")
    copy.resume()  # a search that died while it uploaded its first files
    (there / "request.yaml").write_text("unlearn: {steps: 2}\n")
    with pytest.raises(InputError, match="holds another run than"):
        copy.resume()
    assert (folder / "request.yaml").read_text() == "unlearn: {steps: 1}\n"
    (there / "request.yaml").write_text("unlearn: {steps: 1}\n")
    copy.resume()


# ---------------------------------------------------------------------------------------- while the storage is away


def test_a_storage_that_is_away_holds_up_no_step_and_no_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = threading.Event()

    def hang(error: Exception) -> Callable[..., Any]:
        def asked(self: Storage, *given: Any) -> Any:
            away.wait(20)
            raise error

        return asked

    monkeypatch.setattr(Storage, "has", hang(OSError("away")))
    monkeypatch.setattr(Storage, "push", hang(StorageError("away")))
    monkeypatch.setattr(stopping, "FIRST_S", 0.1)
    monkeypatch.setattr(stopping, "STORAGE_S", 0.0)
    heard: list[float] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(time.monotonic()))
    there, home = Storage(f"{tmp_path}/there"), tmp_path / "run"
    (home / storage.WORK).mkdir(parents=True)
    try:
        poll = stopping.polled(home / storage.WORK, storage=there)
        began = time.monotonic()
        assert not any(poll() for _ in range(50))
        assert time.monotonic() - began < 5, "the storage would have taken 20 s for each look"
        with stopping.listening(home, 0.5, say, there):
            asked = time.monotonic()
            assert stopping.ask()
            while not heard and time.monotonic() < asked + 10:
                time.sleep(0.02)
            stopping._State.asked = False  # as in a worker's process
            time.sleep(stopping.POLL_S)
            assert poll(), "found on the driver's machine, without the storage"
            late = stopping.polled(home / storage.WORK)
            assert not late(), "what stands there from the start is of a driver that died"
        assert heard, "the interrupt at the end of the grace period waits for the storage"
    finally:
        away.set()
        signal.signal(signal.SIGTERM, before)


def test_a_checkpoint_that_grows_in_the_copy_is_a_sign_of_life(tmp_path: Path) -> None:
    before = alive._signs(tmp_path)
    file = tmp_path / storage.WORK / "checkpoints" / ".part-1" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_text("x")
    assert alive._signs(tmp_path) != before


# --------------------------------------------------------------------------------------------------- runs


def test_a_run_in_storage_is_the_run(study: Study, calm: Path, tmp_path: Path) -> None:
    there, folder = tmp_path / "there", tmp_path / "run"
    said: list[str] = []
    result = unlearn.run(study.load(folder, *SHORT, f"output.storage={there}"), say=said.append)
    assert equal(final_weights(calm), final_weights(folder))
    assert equal(final_weights(calm), final_weights(there))
    assert result["points"] == journal.points(calm)
    assert [line for line in said if line.startswith("step")], "progress is told from the storage"
    assert not (folder / ".work").exists()
    assert sorted(p.name for p in (there / "checkpoints").glob("*/state.json")) == ["state.json"] * 2
    for name in ("journal.jsonl", "scores.json", "baseline.json", "evaluations/step-00000003.json"):
        assert (there / name).read_bytes() == (folder / name).read_bytes(), name
    once(folder, 6)


def test_a_stored_run_is_exported(study: Study, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, folder = tmp_path / "there" / "one", tmp_path / "run"
    with pytest.raises(_Killed):
        _killed_at(study, folder, there, "scores.json")  # also a model, which nothing says is whole
    (folder / "config.yaml").write_bytes((there / "config.yaml").read_bytes())
    weights = there / "checkpoints" / "step-00000006" / "model.safetensors"

    def exported(run: str, name: str | None, step: int | None) -> dict[str, Any]:
        return export.run(run, to=name and str(tmp_path / name), step=step, merged=False, say=say)

    for run, name in ((f"file://{there}", "by-uri"), (str(folder), "by-folder")):
        result = exported(run, name, 4)
        assert (result["step"], result["source"][-24:]) == (4, "checkpoints/step-00000004"[-24:])
        kept = load_file(there / "checkpoints" / "step-00000004" / "model.safetensors")
        assert equal(load_file(tmp_path / name / "model.safetensors"), kept)
    monkeypatch.chdir(tmp_path)
    assert exported(f"file://{there}", None, None)["model"] == str(tmp_path / "export-one")
    assert equal(load_file(tmp_path / "export-one" / "model.safetensors"), load_file(weights))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert exported(f"file://{there}", "older", None)["step"] == 4
    for run, step, line in (
        (f"file://{there}", 5, "--step: got 5, checkpoints there: 4, 6"),
        (f"file://{there}", 6, "--step: checkpoint 6 is damaged; checkpoints there: 4, 6"),
        (f"file://{tmp_path}/nothing", None, "no run there"),
    ):
        with pytest.raises(InputError, match=line):
            exported(run, "refused", step)

    def killed(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copytree", killed)
    with pytest.raises(KeyboardInterrupt):
        export.run(str(calm), to=str(tmp_path / "refused"), step=None, merged=False, say=say)
    assert not [p for p in tmp_path.iterdir() if "refused" in p.name]


def test_another_run_in_the_way_is_told(study: Study, tmp_path: Path) -> None:
    there = tmp_path / "there"
    config = study.load(tmp_path / "run", *SHORT, f"output.storage={there}")
    with pytest.raises(InputError, match="holds nothing to resume"):
        unlearn.run(config, resume=True, say=say)
    unlearn.run(config, say=say)
    key = (there / "journal.jsonl").read_text().splitlines()[0]
    elsewhere = study.load(tmp_path / "elsewhere", *SHORT, f"output.storage={there}")
    with pytest.raises(InputError, match="is not empty; --overwrite replaces"):
        unlearn.run(elsewhere, say=say)
    other = study.load(tmp_path / "other", *SHORT)
    unlearn.run(other, say=say)
    with pytest.raises(InputError, match="holds another run than"):
        unlearn.run(study.load(tmp_path / "other", *SHORT, f"output.storage={there}"), resume=True, say=say)
    changed = study.load(tmp_path / "new", *SHORT, "unlearn.lr=5e-4", f"output.storage={there}")
    with pytest.raises(InputError, match=r"other settings: unlearn\.lr"):
        unlearn.run(changed, resume=True, say=say)
    assert (there / "journal.jsonl").read_text().splitlines()[0] == key
    (there / "model" / "left.txt").write_text("of the run before")
    unlearn.run(elsewhere, overwrite=True, say=say)
    assert (there / "journal.jsonl").read_text().splitlines()[0] != key
    assert not (there / "model" / "left.txt").exists()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="holds no result of gru"):
        unlearn.run(study.load(tmp_path / "run2", f"output.storage={foreign}"), overwrite=True, say=say)
    assert (foreign / "thesis.txt").read_text() == "precious"


def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(study: Study, calm: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    with pytest.raises(_Killed):
        _killed_at(study, tmp_path / "one", there, "scores.json")
    newest = max((there / "checkpoints").iterdir())
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    unlearn.run(study.load(tmp_path / "two", *SHORT, f"output.storage={there}"), resume=True, say=say)
    assert equal(final_weights(calm), final_weights(tmp_path / "two"))
    assert f"checkpoint {there}/checkpoints/{newest.name} is damaged and is passed over" in journal.load(there).notes
    once(tmp_path / "two", 6)


class _Killed(BaseException):
    """Stands for SIGKILL: from then on the process does nothing to the storage."""


def _killed_at(study: Study, folder: Path, there: Path, stop: str | int, resume: bool = False) -> int:
    """A run that dies before its change number ``stop`` of the storage, or that of the file ``stop``; returns the
    number of changes."""
    count, dead = 0, False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_AT_ONCE", 1)

        def counted(real: Callable[..., T], file: Callable[..., str]) -> Callable[..., T]:
            def change(self: Storage, *given: Any) -> T:
                nonlocal count, dead
                dead = dead or count == stop or (isinstance(stop, str) and file(*given).endswith(stop))
                if dead:
                    raise _Killed
                count += 1
                return real(self, *given)

            return change

        patch.setattr(Storage, "_put", counted(Storage._put, lambda files, path, data: path))
        patch.setattr(Storage, "_remove", counted(Storage._remove, lambda name: name))
        unlearn.run(study.load(folder, *SHORT, f"output.storage={there}"), resume=resume, say=say)
    return count


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_before_any_upload_and_resumed_elsewhere_is_the_undisturbed_run(
    study: Study, calm: Path, tmp_path: Path
) -> None:
    """Before every second upload or removal of a run; the machine's own copy is lost each time."""
    total = _killed_at(study, tmp_path / "whole", tmp_path / "whole-there", -1)
    assert total > 40
    resumed = 0
    for stop in range(1, total, 2):  # 0 is the check that writes nothing
        there, folder = tmp_path / f"there-{stop}", tmp_path / f"run-{stop}"
        with pytest.raises(_Killed):
            _killed_at(study, folder, there, stop)
        shutil.rmtree(folder, ignore_errors=True)
        found = Storage(str(there)).names()
        config = study.load(folder, *SHORT, f"output.storage={there}")
        unlearn.run(config, resume=bool(found), say=say)
        resumed += bool(found)
        assert equal(final_weights(calm), final_weights(folder)), stop
        assert journal.points(folder) == journal.points(calm), stop
        once(folder, 6)
        shutil.rmtree(there)
        shutil.rmtree(folder)
    assert resumed > 15
    assert set(_mlflow_steps(study)) == {tuple(range(1, 7))}, "each step once in every MLflow run that was finished"


def _mlflow_steps(study: Study) -> list[tuple[int, ...]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{study.folder}/mlflow.db")
    found = client.search_experiments(filter_string="name = 'tests'")
    runs = [run for run in client.search_runs([found[0].experiment_id]) if run.info.run_name.startswith("run-")]
    return [
        tuple(m.step for m in client.get_metric_history(run.info.run_id, "train/lr"))
        for run in runs
        if run.info.status == "FINISHED"
    ]


# ------------------------------------------------------------------------------------ ranks without a common disk


class _Threads(Group):
    """A group whose ranks are threads of this process."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, board: dict[int, Any]) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "_meeting", meeting)
        object.__setattr__(self, "_board", board)

    def gather(self, value: T) -> list[T]:
        self._board[self.rank] = value  # type: ignore[attr-defined]
        self._meeting.wait(20)  # type: ignore[attr-defined]
        found = [self._board[rank] for rank in range(self.size)]  # type: ignore[attr-defined]
        self._meeting.wait(20)  # type: ignore[attr-defined]
        return found


def _ranks(size: int, work: Callable[[Group], T]) -> list[T | BaseException]:
    meeting = threading.Barrier(size)
    board: dict[int, Any] = {}
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            results[rank] = work(_Threads(rank, size, meeting, board))
        except StorageError as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _sharded(folder: Path, step: int, rank: int, size: int) -> Path:
    """What a rank of a sharded run leaves in a folder of its own machine: its part; rank 0 also what is common."""
    from gru_core import checkpoint

    target = folder / "checkpoints" / f"step-{step:08d}"
    target.mkdir(parents=True)
    contents = {f"shard-{r + 1:05d}.safetensors": bytes([r, step]) * 50 for r in range(size)}
    (target / f"shard-{rank + 1:05d}.safetensors").write_bytes(contents[f"shard-{rank + 1:05d}.safetensors"])
    if rank == 0:
        (folder / "journal.jsonl").write_text("")
        files = {name: {"size": len(text), "crc32": zlib.crc32(text)} for name, text in contents.items()}
        state = {"step": step, "files": files}
        (target / "state.json").write_text(json.dumps(state | {"checksum": checkpoint._state_checksum(state)}))
    return target


def test_every_rank_stores_its_own_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: None) -> None:
    there = tmp_path / "there"

    def write(group: Group, step: int) -> None:
        mine = Keeper(str(there), tmp_path / f"machine-{group.rank}", group)
        mine.saved(_sharded(mine.folder, step, group.rank, group.size))

    for step in (2, 4, 6):
        assert _ranks(2, partial(write, step=step)) == [None, None]
    names = ["shard-00001.safetensors", "shard-00002.safetensors", "state.json"]
    found = sorted(p.relative_to(there / "checkpoints").as_posix() for p in there.rglob("step-*/*"))
    assert found == [f"step-{step:08d}/{name}" for step in (4, 6) for name in names]

    put = Storage._put

    def broken(self: Storage, files: Any, path: str, data: Any) -> int:
        if path.endswith("step-00000008/shard-00002.safetensors"):
            raise OSError("connection lost")
        return put(self, files, path, data)

    monkeypatch.setattr(Storage, "_put", broken)
    errors = _ranks(2, partial(write, step=8))
    assert [str(error).partition(" (")[0] for error in errors] == [f"the storage {there} cannot be written"] * 2

    assert not (there / "checkpoints" / "step-00000008" / "state.json").exists(), "one part is missing"

    def read(group: Group) -> list[str]:
        mine = Keeper(str(there), tmp_path / f"other-{group.rank}", group)
        mine.fetch()
        return sorted(p.relative_to(mine.folder / "checkpoints").as_posix() for p in mine.folder.rglob("step-*/*"))

    assert _ranks(3, read) == [[f"step-00000006/{name}" for name in names]] * 3

    def stale(group: Group) -> list[str]:
        mine = Keeper(str(there), tmp_path / f"machine-{group.rank}", group)  # holds 2 to 8 in part
        mine.fetch()
        return sorted(p.relative_to(mine.folder / "checkpoints").as_posix() for p in mine.folder.rglob("step-*/*"))

    assert _ranks(2, stale) == [[f"step-00000006/{name}" for name in names]] * 2


def test_what_an_evaluation_has_measured_stays_on_its_machine(tmp_path: Path) -> None:
    mine = Keeper(Storage(str(tmp_path / "there")).uri, tmp_path / "machine", Group())
    kept = mine.folder / EVALUATING / "rows" / "rank-0.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("measured")
    (mine.folder / "left over").touch()
    mine.fetch()  # as a restart does
    assert kept.read_text() == "measured"
    assert not (mine.folder / "left over").exists()


def test_a_journal_line_comes_after_the_file_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver looks while a worker uploads: whatever it finds in the journal is there."""
    there, worker = Storage(str(tmp_path / "there")), tmp_path / "worker"
    mine = Keeper(there.uri, worker, Group())
    mine.folder.mkdir(parents=True)
    copy = Mirror(there.uri, tmp_path / "driver")
    names, looks = Storage.names, [0]
    with journal.Journal(mine.folder) as record:

        def busy(self: Storage, under: str = "") -> dict[str, Any]:
            found = names(self, under)
            looks[0] += 1
            file = mine.folder / f"{looks[0]}.json"  # between a listing and what is made of it
            file.write_text("{}")
            record.artifact(file.name)
            mine.store(file.name)
            return found

        monkeypatch.setattr(Storage, "names", busy)
        for _ in range(4):
            copy.pull()
            for entry in journal.read(tmp_path / "driver")[0]:
                assert (tmp_path / "driver" / entry["path"]).exists()
    assert looks[0] >= 7
    assert journal.read(tmp_path / "driver")[0]


# ----------------------------------------------------------------------------------------------- an S3 server


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on a local S3 server, with what reaches it in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "planted-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="study")
        yield "s3://study"
    server.stop()


@pytest.mark.slow
def test_what_is_wrong_with_a_bucket_is_one_line(bucket: str, study: Study, tmp_path: Path) -> None:
    words = ["unlearn", "-c", str(study.config), "--output", str(tmp_path / "run"), "--set"]
    done = gru([*words, "output.storage=s3://nowhere/x"], study.environment)
    assert (done.returncode, done.stderr) == (2, "gru: output.storage: there is no bucket 'nowhere' (s3://nowhere/x)\n")
    away = study.environment | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = gru([*words, f"output.storage={bucket}/x"], away)
    assert done.returncode == 2
    assert done.stderr.startswith("gru: output.storage: s3://study/x cannot be used: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def _until(condition: Callable[[], bool], process: subprocess.Popen[str], limit: float = 200) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run never got there"
        time.sleep(0.02)


def _kill_when(condition: Callable[[], bool], words: list[str], environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", *words],
        env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _until(condition, process)
    finally:
        process.kill()
        process.wait()


def _no_secrets(*folders: Path) -> None:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 5
    assert [file for file in files if b"planted-" in file.read_bytes()] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_s3_is_killed_and_resumed_elsewhere(bucket: str, study: Study, tmp_path: Path) -> None:
    """In one process, with SIGKILL; what is left is the bucket alone."""
    short = ("unlearn.steps=30", "unlearn.evaluate_every=15", "train.checkpoint_every=3", "evaluate.rows=4")
    kept, there = f"output.storage={bucket}/single", Storage(f"{bucket}/single")
    unlearn.run(study.load(tmp_path / "quiet", *short), say=say)
    words = ["unlearn", "-c", str(study.config), "--output", str(tmp_path / "first")]
    for each in (*short, kept):
        words += ["--set", each]
    _kill_when(lambda: there.read("checkpoints/step-00000006/state.json") is not None, words, study.environment)
    assert there.read("scores.json") is None, "the run was over before it was killed"
    _no_secrets(tmp_path / "first", study.folder)
    shutil.rmtree(tmp_path / "first")
    said: list[str] = []
    unlearn.run(study.load(tmp_path / "second", *short, kept), resume=True, say=said.append)
    assert [line for line in said if ", from step " in line]
    assert equal(final_weights(tmp_path / "quiet"), final_weights(tmp_path / "second"))
    assert journal.points(tmp_path / "quiet") == journal.points(tmp_path / "second")
    once(tmp_path / "second", 30)
    there.pull(tmp_path / "all", there.names())
    assert equal(final_weights(tmp_path / "all"), final_weights(tmp_path / "second"))
    _no_secrets(tmp_path / "second", tmp_path / "all", study.folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not can_hide(), reason="needs root and unshare for machines without a common file system")
def test_two_machines_without_a_common_disk(bucket: str, study: Study, tmp_path: Path) -> None:
    """Driver and two nodes see three different output folders; the driver is killed and its folder is lost."""
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / "mark").touch()
    environment = study.environment | {"OMP_NUM_THREADS": "1"}
    words = ["unlearn", "-c", str(study.config), "--set", "train.workers=2", "--json"]
    for each in ("unlearn.steps=40", "unlearn.evaluate_every=20", "train.checkpoint_every=8", "evaluate.rows=4"):
        words += ["--set", each]

    def kept(name: str) -> list[str]:
        return ["--output", str(outputs / name), "--set", f"output.storage={bucket}/runs/{name}"]

    with start_head(cpus=1, hide=outputs, env=_aws()) as head, start_node(head, cpus=1, hide=outputs):
        environment["RAY_ADDRESS"] = head.gcs
        done = gru([*words, *kept("calm")], environment)
        assert done.returncode == 0, done.stderr
        there = Storage(f"{bucket}/runs/shaken")
        _kill_when(lambda: len(there.names("checkpoints")) > 10, [*words, *kept("shaken")], environment)
        assert there.read("scores.json") is None, "the run was over before it was killed"
        shutil.rmtree(outputs / "shaken")
        again = gru([*words, *kept("shaken"), "--resume"], environment)
        assert again.returncode == 0, again.stderr
    assert "from step" in again.stderr
    assert json.loads(again.stdout)["steps"] == 40
    assert equal(final_weights(outputs / "calm"), final_weights(outputs / "shaken"))
    assert json.loads(again.stdout)["points"] == json.loads(done.stdout)["points"]
    once(outputs / "shaken", 40)
    _no_secrets(outputs, study.folder)
    there.pull(tmp_path / "all", there.names())
    _no_secrets(tmp_path / "all")


def _aws() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")} | {
        "GRU_CACHE": os.environ["GRU_CACHE"]
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_goes_on_from_storage_alone(bucket: str, study: Study, tmp_path: Path) -> None:
    """The machine of a search is lost: another one has its trials, finished ones as they were."""
    words = ["search", "-c", str(study.config), "--json", "--set", f"output.storage={bucket}/search"]
    for each in ("search.trials=4", "search.sampler=random", "search.families={gru: {}}", "search.concurrent=2"):
        words += ["--set", each]
    words += ["--set", "search.space={unlearn.lr: [1.0e-5, 1.2e-5, 1.4e-5, 1.6e-5]}", "--set", "unlearn.steps=60"]
    words += ["--set", "unlearn.evaluate_every=30", "--set", "evaluate.rows=4", "--set", "train.checkpoint_every=20"]
    there, first = Storage(f"{bucket}/search"), tmp_path / "first"

    def lines(kind: str) -> list[dict[str, Any]]:
        entries = map(json.loads, (there.read("trials.jsonl") or b"").splitlines())
        return [entry for entry in entries if entry["kind"] == kind]

    _kill_when(lambda: bool(lines("end")), [*words, "--output", str(first)], study.environment)
    finished, asked = lines("end"), lines("ask")
    assert 1 <= len(finished) < 4
    journals = {end["id"]: there.read(f"trials/{end['id']}/journal.jsonl") for end in finished}
    shutil.rmtree(first, ignore_errors=True)  # a trial may outlive its driver by a moment
    again = gru([*words, "--output", str(tmp_path / "second"), "--resume"], study.environment)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["trials"] == {
        "total": 4,
        "finished": 4,
        "collapsed": 0,
        "non_finite": 0,
        "failed": 0,
    }
    assert {name: there.read(f"trials/{name}/journal.jsonl") for name in journals} == journals, "no trial ran twice"
    assert lines("ask")[: len(asked)] == asked
    assert len(lines("ask")) == len(lines("end")) == 4
    for end in lines("end"):
        once(tmp_path / "second" / "trials" / end["id"], 60)
        assert not there.names(f"trials/{end['id']}/checkpoints")
    assert there.read("frontier.json") == (tmp_path / "second" / "frontier.json").read_bytes()
    assert journal.load(tmp_path / "second").status == "finished"
    drawn = gru(["frontier", f"{bucket}/search", "--json"], study.environment, cwd=first.parent)
    assert drawn.returncode == 0, drawn.stderr
    assert json.loads(drawn.stdout)["frontier"] == json.loads(again.stdout)["frontier"]
    assert (tmp_path / "frontier-search" / "frontier.csv").exists()
