"""One run, end to end: tracked, resumable, the same on Ray workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from gru_core.errors import InputError
from pipelines import courier, journal, ray_start, search_inputs, settings, unlearn
from tests.study import Study, final_weights, gru

QUIET: list[str] = []


def say(line: str) -> None:
    QUIET.append(line)


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run in this process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, unlearn.run(study.load(folder), say=say)


def test_a_run_forgets_and_writes_everything(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, result = whole
    assert result["status"] == "finished"
    assert [p["step"] for p in result["points"]] == [0, 4, 8, 12]
    first, last = result["points"][0], result["points"][-1]
    assert (first["unlearning"], first["retention"]) == (0.0, 1.0)
    assert last["unlearning"] > 0.5
    assert last["retention"] > 0.3
    assert json.loads((folder / "scores.json").read_text())["scores"] == result["scores"]
    for name in (
        "config.yaml",
        "request.yaml",
        "baseline.json",
        "journal.jsonl",
        "mlflow.json",
        "model/model.safetensors",
    ):
        assert (folder / name).exists(), name


def test_the_written_config_runs_again_to_the_same_model(
    whole: tuple[Path, dict[str, Any]], study: Study, tmp_path: Path
) -> None:
    from pipelines import settings

    again = settings.load(str(whole[0] / "config.yaml"), [f"output.dir={tmp_path / 'again'}"])
    unlearn.run(again, say=say)
    assert equal(final_weights(whole[0]), final_weights(tmp_path / "again"))


def test_mlflow_holds_each_step_once(whole: tuple[Path, dict[str, Any]], study: Study) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{study.folder}/mlflow.db")
    run = client.get_run(whole[1]["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["rectify.rule"] == "gru"
    assert run.data.tags["gru.kind"] == "run"
    assert "gru.versions.torch" in run.data.tags
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/retain_loss")] == list(range(1, 13))
    assert [m.step for m in client.get_metric_history(run.info.run_id, "eval/unlearning")] == [0, 4, 8, 12]


def test_the_saved_model_scores_as_reported(whole: tuple[Path, dict[str, Any]], study: Study) -> None:
    """The model folder, loaded by transformers alone, gives the scores of the run."""
    from gru_core import models
    from gru_core.benchmarks import load_benchmark
    from gru_core.config import ModelConfig
    from gru_core.metrics import evaluate

    config = study.load(whole[0])
    folder = str(whole[0] / "model")
    net, tok = models.load_model(folder, ModelConfig()), models.load_tokenizer(folder)
    found = evaluate(net, tok, load_benchmark(config.benchmark), config.evaluate, config.model).scores
    for name, value in found.items():
        assert value == pytest.approx(whole[1]["scores"][name], abs=1e-6), name


def test_forget_texts_stay_out_of_every_file(whole: tuple[Path, dict[str, Any]], study: Study) -> None:
    """Answers of the forget set are in no journal, config, evaluation, log line or tracking database."""
    rows = [json.loads(line) for line in (study.folder / "forget.jsonl").read_text().splitlines()]
    secrets = [text for row in rows for text in (row["answer"], row["question"])]
    files = [f for f in whole[0].rglob("*") if f.is_file() and f.suffix != ".safetensors" and "model" not in f.parts]
    files += [study.folder / "mlflow.db", *(f for f in (study.folder / "mlartifacts").rglob("*") if f.is_file())]
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        assert not any(secret.encode() in content for secret in secrets), file
    assert not any(secret in line for line in QUIET for secret in secrets)


def kill_when(process: subprocess.Popen[str], folder: Path, step: int, limit: float = 120) -> None:
    """SIGKILL as soon as the journal has reached ``step``."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if max(journal.load(folder).metrics, default=0) >= step:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("the run never got there")


@pytest.mark.slow
def test_killed_and_resumed_is_the_undisturbed_run(study: Study, tmp_path: Path) -> None:
    """`gru unlearn --resume` after SIGKILL: the same weights bit for bit, each step once in the journal."""
    arguments = [
        "unlearn",
        "-c",
        str(study.config),
        "--set",
        "unlearn.steps=400",
        "--set",
        "unlearn.evaluate_every=100",
    ]
    calm, shaken = tmp_path / "calm", tmp_path / "shaken"
    assert gru([*arguments, "--output", str(calm)], study.environment).returncode == 0
    command = [sys.executable, "-m", "pipelines", *arguments, "--output", str(shaken)]
    process = subprocess.Popen(command, env={**os.environ, **study.environment}, stdout=subprocess.DEVNULL, text=True)
    kill_when(process, shaken, 130)
    assert not (shaken / "scores.json").exists()
    done = gru([*arguments, "--output", str(shaken), "--resume", "--json"], study.environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 400
    assert equal(final_weights(calm), final_weights(shaken))
    entries = [e for e in journal.read(shaken)[0] if e["kind"] == "metrics"]
    seen = [(e["step"], key) for e in entries for key in e["metrics"]]
    assert len(seen) == len(set(seen)), "a step stands twice in the journal"
    changed = gru([*arguments, "--output", str(shaken), "--resume", "--set", "unlearn.lr=5.0e-4"], study.environment)
    assert changed.returncode == 2
    assert "was started with other settings: unlearn.lr" in changed.stderr


@pytest.mark.slow
def test_two_ray_workers_are_one_process(whole: tuple[Path, dict[str, Any]], study: Study, tmp_path: Path) -> None:
    """TorchTrainer with 2 gloo workers: the same points, and after SIGKILL of a worker the same weights."""
    import ray

    from pipelines import prepare

    calm, shaken = tmp_path / "calm", tmp_path / "shaken"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        two = unlearn.run(study.load(calm, "train.workers=2"), say=say)
        for ours, alone in zip(two["points"], whole[1]["points"], strict=True):
            assert ours["unlearning"] == pytest.approx(alone["unlearning"], abs=0.05)
            assert ours["retention"] == pytest.approx(alone["retention"], abs=0.05)
        killer = _Killer(shaken, 6)
        killer.start()
        again = unlearn.run(study.load(shaken, "train.workers=2"), say=say)
        killer.join()
        assert killer.killed, "no worker was there to kill"
        assert again["steps"] == 12
        assert equal(final_weights(calm), final_weights(shaken))
        steps = [e["step"] for e in journal.read(shaken)[0] if "train/lr" in e.get("metrics", {})]
        assert steps == list(range(1, 13)), "each step once"

        before = contents(calm)
        where = prepare.folders(study.load(calm)).retain  # knows nothing of what is to be forgotten
        with pytest.raises(InputError, match="nothing to forget"):
            unlearn.run(study.load(calm, "train.workers=2", f"model.path={where}"), overwrite=True, say=say)
        assert contents(calm) == before, "bad input that only weights tell must leave the old result alone"
    finally:
        ray.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def runs(study: Study) -> int:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{study.folder}/mlflow.db")
    return len(client.search_runs([each.experiment_id for each in client.search_experiments()]))


@pytest.fixture
def old(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of a result, in the way of a new run."""
    return shutil.copytree(whole[0], tmp_path / "old")


def test_what_workers_cannot_read_is_told_before_the_old_result_goes(
    study: Study, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(*given: Any) -> None:
        assert given[1:3] == ((), 0.0)
        raise InputError("no such file on the worker's node")

    monkeypatch.setattr(ray_start, "connect", lambda train, say: 0.0)
    monkeypatch.setattr(search_inputs, "put", put)
    before, known = contents(old), runs(study)
    with pytest.raises(InputError, match="no such file on the worker's node"):
        unlearn.run(study.load(old, "train.workers=2"), overwrite=True, say=say)
    assert contents(old) == before
    assert runs(study) == known


def test_a_deleted_experiment_is_told_before_the_old_result_goes(study: Study, old: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{study.folder}/mlflow.db")
    client.delete_experiment(client.create_experiment("gone"))
    before = contents(old)
    with pytest.raises(InputError, match="experiment 'gone' was deleted"):
        unlearn.run(study.load(old, "track.experiment=gone"), overwrite=True, say=say)
    assert contents(old) == before


def test_a_run_that_replaces_another_measures_its_own_end_points(
    study: Study, old: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    (old / "baseline.json").write_text("another run's")
    again = unlearn.run(study.load(old), overwrite=True, say=say)
    assert again["points"] == whole[1]["points"]


def test_no_gpu_is_told_before_the_old_result_goes(study: Study, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = contents(old)
    for override, message in (("train.gpus_per_worker=1", "at most 0"), ("train.gpus_per_worker=1.5", "a fraction")):
        with pytest.raises(InputError, match=f"train.gpus_per_worker.*{message}"):
            unlearn.run(study.load(old, override), overwrite=True, say=say)
    assert contents(old) == before


def test_credentials_of_the_store_are_written_nowhere(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver alone knows them: no file, parameter or line holds them."""
    given, store = "postgresql://somebody:planted-secret@127.0.0.1/runs", tmp_path / "store" / "mlflow.db"
    used: list[str] = []

    class Local(courier.Courier):
        def __init__(self, uri: str, *rest: Any, **more: Any) -> None:
            used.append(uri)
            super().__init__(f"sqlite:///{store}", *rest, **more)

    monkeypatch.setattr(unlearn.tracking, "check", lambda uri, say: used.append(uri))
    monkeypatch.setattr(unlearn, "Courier", Local)
    said: list[str] = []
    result = unlearn.run(study.load(tmp_path / "run", f"track.uri={given}"), say=said.append)
    assert used == [given, given]
    assert result["tracking_uri"] == "postgresql://127.0.0.1/runs"
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert {"config.yaml", "request.yaml", "journal.jsonl", "mlflow.db"} <= {f.name for f in files}
    for secret in ("planted-secret", "somebody"):
        assert [f for f in files if secret.encode() in f.read_bytes()] == []
        assert secret not in "\n".join(said)
    assert settings.load(str(tmp_path / "run" / "config.yaml")).track.uri == "postgresql://127.0.0.1/runs"


def test_how_a_run_ended_is_recorded_each_time_and_hides_nothing(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    config = study.load(folder)

    def failing(error: BaseException) -> Any:
        def work(assignment: Any, group: Any, report: Any) -> None:
            with journal.Journal(folder) as record:
                record.run("run", {})
                record.metrics(len(seen) + 1, {"train/lr": 1.0})
            seen.append(error)
            raise error

        return work

    seen: list[BaseException] = []
    statuses = []
    for error in (RuntimeError("first"), RuntimeError("second"), KeyboardInterrupt()):
        monkeypatch.setattr(unlearn.worker, "task", failing(error))
        with pytest.raises(type(error), match=f"^{error}$"):
            unlearn.run(config, resume=bool(seen), say=say)
        statuses.append(run_status(study, folder))
    assert statuses == ["FAILED", "FAILED", "KILLED"]
    assert journal.load(folder).status == "stopped"

    with (folder / journal.NAME).open("a") as file:
        file.write("broken\n{}\n")
    monkeypatch.setattr(unlearn.worker, "task", _raise_disk)
    with pytest.raises(OSError, match="disk full"):
        unlearn.run(config, resume=True, say=say)


def _raise_disk(assignment: Any, group: Any, report: Any) -> None:
    raise OSError("disk full")


def run_status(study: Study, folder: Path) -> str:
    from mlflow import MlflowClient

    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    return MlflowClient(f"sqlite:///{study.folder}/mlflow.db").get_run(run_id).info.status


def _workers() -> list[int]:
    """Of the Ray that this process started; others may run beside it."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any("RayTrainWorker" in part for part in process.cmdline()):
                found.append(process.pid)
    return sorted(found)


class _Killer(threading.Thread):
    """Kills one Ray Train worker once the journal has reached a step."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.step, self.killed = folder, step, 0

    def run(self) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if max(journal.load(self.folder).metrics, default=0) >= self.step:
                workers = _workers()
                if workers:
                    os.kill(workers[-1], signal.SIGKILL)
                    self.killed = workers[-1]
                return
            time.sleep(0.002)


def test_a_non_finite_loss_is_a_failure_that_says_where(study: Study, tmp_path: Path) -> None:
    from gru_core import models

    broken = tmp_path / "broken"
    config = study.load(tmp_path / "run")
    from pipelines import prepare

    where = prepare.folders(config).target
    net, tok = models.load_model(str(where), config.model), models.load_tokenizer(str(where))
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 1:
                p.fill_(float("inf"))
    models.save_model(net, tok, broken)
    with pytest.raises((RuntimeError, InputError), match=r"nothing to forget|is nan|is inf"):
        unlearn.run(study.load(tmp_path / "run", f"model.path={broken}"), say=say)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=/no/such/folder", "there is no folder"),
        ("benchmark.forget=/no/such/file.jsonl", "/no/such/file.jsonl"),
        ("retain.size=500", "retain.size"),
        ("retain.size=0", "retain.size"),
        ("retain_model=null evaluate.metrics=[forget_quality]", "retain_model"),
        ("track.uri=http://127.0.0.1:9", "127.0.0.1:9"),
        ("rectify.rule=sum", "retain_weight"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(
    study: Study, tmp_path: Path, override: str, message: str
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(InputError, match=message) as error:
        unlearn.run(study.load(folder, *override.split()), say=say)
    assert "\n" not in str(error.value)
    assert not folder.exists()


def test_overlap_is_counted_and_named_without_texts(study: Study, tmp_path: Path) -> None:
    lines = (study.folder / "retain.jsonl").read_text().splitlines()
    both = (study.folder / "forget.jsonl").read_text() + lines[3] + "\n"
    (tmp_path / "forget.jsonl").write_text(both)
    with pytest.raises(InputError, match=r"\b1\b.*forget:9|forget:9") as error:
        unlearn.run(study.load(tmp_path / "out", f"benchmark.forget={tmp_path / 'forget.jsonl'}"), say=say)
    assert json.loads(lines[3])["answer"] not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_ends_with_1_and_keeps_the_checkpoint(study: Study, tmp_path: Path) -> None:
    """A real file system that fills up: exit code 1, one line that names the last whole checkpoint."""
    from gru_core import checkpoint

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = gru(
            ["unlearn", "-c", str(study.config), "--output", str(small / "run"), "--set", "train.checkpoint_every=1"],
            study.environment,
        )
        assert done.returncode == 1, (done.returncode, done.stderr)
        line = done.stderr.strip().splitlines()[-1]
        assert "No space left on device" in line
        assert "last whole checkpoint is" in line
        last = checkpoint.latest(small / "run" / "checkpoints")
        assert last is not None
        assert str(last.folder) in line
    finally:
        subprocess.run(["umount", str(small)], check=False)


@pytest.mark.slow
def test_resume_needs_no_config(study: Study, tmp_path: Path) -> None:
    """`gru unlearn --output FOLDER --resume` goes on with what the folder was started with, and says from where."""
    folder = tmp_path / "run"
    arguments = [
        "unlearn",
        "-c",
        str(study.config),
        "--set",
        "unlearn.steps=300",
        "--set",
        "unlearn.evaluate_every=300",
    ]
    command = [sys.executable, "-m", "pipelines", *arguments, "--output", str(folder)]
    process = subprocess.Popen(command, env={**os.environ, **study.environment}, stdout=subprocess.DEVNULL, text=True)
    kill_when(process, folder, 20)
    done = gru(["unlearn", "--output", str(folder), "--resume"], study.environment)
    assert done.returncode == 0, done.stderr
    assert "300 steps, 24 retain rows, from step" in done.stdout
