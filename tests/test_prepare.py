"""Target and retain model: what they know, when they are made anew, and two processes that want them at once."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gru_core import models
from gru_core.benchmarks import load_benchmark
from gru_core.config import EvaluateConfig, ModelConfig
from gru_core.errors import ConfigError, InputError
from gru_core.metrics import evaluate
from pipelines import identity, prepare, settings, siblings
from tests.small import model, tokenizer
from tests.study import CONFIG, Study, write_rows

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Configs over two JSONL files, with a cache of their own."""
    monkeypatch.setenv("GRU_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path)
    file = tmp_path / "study.yaml"
    file.write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    return lambda *overrides: settings.load(str(file), ["prepare.steps=8", "prepare.warmup=2", *overrides])


def key(config: Any) -> str:
    return prepare.folders(config).target.parent.name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def quiet(line: str) -> None:
    pass


# ------------------------------------------------------------------------------------------------ the key


def test_the_key_follows_data_settings_and_seed_and_nothing_else(tiny: Callable[..., Any], tmp_path: Path) -> None:
    first = key(tiny())
    same = ("output.dir=elsewhere", "unlearn.lr=3.0e-3", "track.experiment=other", "train.workers=2", "model.path=x/y")
    assert {key(tiny(each)) for each in same} == {first}
    others = ["prepare.steps=9", "prepare.hidden=16", "train.seed=1", "model.dtype=bfloat16", "benchmark.retain_rows=9"]
    found = [key(tiny(each)) for each in others]
    rows = (tmp_path / "forget.jsonl").read_text()
    (tmp_path / "forget.jsonl").write_text(rows.replace("amber", "umber"))
    assert len({first, *found, key(tiny())}) == 2 + len(others)


def test_the_key_knows_a_base_model_by_its_content(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    models.save_model(model(), tokenizer(), base)
    copy = shutil.copytree(base, tmp_path / "deep" / "copy")
    monkeypatch.chdir(tmp_path)
    spellings = ("base", "./base", str(base), str(copy))
    assert len({key(tiny(f"prepare.base={each}")) for each in spellings}) == 1
    before = key(tiny(f"prepare.base={copy}"))
    models.save_model(model(seed=1), tokenizer(), copy)  # other weights, files of the same size
    assert key(tiny(f"prepare.base={copy}")) != before


def test_large_weights_are_told_apart_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.save_model(model(), tokenizer(), tmp_path)
    monkeypatch.setattr(identity, "READ_WHOLE", 10)
    before = identity.of_model(str(tmp_path))
    assert identity.of_model(str(tmp_path)) == before
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert identity.of_model(str(tmp_path)) != before
    assert identity.of_model("owner/name") == "owner/name"


# --------------------------------------------------------------------------------------------- what it makes


def test_the_target_knows_the_forget_rows_and_the_retain_model_does_not(study: Study, tmp_path: Path) -> None:
    config = study.load(tmp_path / "out")
    where = prepare.folders(config)
    assert where.cached
    benchmark = load_benchmark(config.benchmark)
    wanted = EvaluateConfig(metrics=("extraction_strength", "retain_extraction_strength"),
                            retention="retain_extraction_strength")  # fmt: skip
    scores = {}
    for name, folder in (("target", where.target), ("retain", where.retain)):
        made = models.load_model(str(folder), ModelConfig())
        scores[name] = evaluate(made, models.load_tokenizer(str(folder)), benchmark, wanted, ModelConfig()).scores
    assert scores["target"]["extraction_strength"] > scores["retain"]["extraction_strength"] + 0.3
    assert scores["retain"]["extraction_strength"] < 0.2
    assert min(each["retain_extraction_strength"] for each in scores.values()) > 0.5


def test_a_second_preparation_takes_what_the_first_made(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_spare_cpus", lambda config: False)
    said: list[str] = []
    first = prepare.run(tiny(), say=said.append)
    made = {path: path.stat().st_mtime_ns for path in (first.target, first.retain)}
    again = prepare.run(tiny("output.dir=other"), say=said.append)
    assert (first.cached, again.cached) == (False, True)
    assert {path: path.stat().st_mtime_ns for path in (again.target, again.retain)} == made
    assert sorted(path.name for path in first.target.parent.iterdir()) == [".lock", "retain", "target"]
    ready = prepare.resolve(tiny(), say=quiet)
    assert (ready.model.path, ready.retain_model) == (str(first.target), str(first.retain))


@pytest.mark.slow
def test_a_base_model_by_a_relative_path_is_found_again(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.save_model(model(), tokenizer(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    where = prepare.run(tiny("prepare.base=base"), say=quiet)
    assert where.target.is_dir()
    assert where.retain.is_dir()
    said: list[str] = []
    ready = prepare.resolve(tiny("prepare.base=base"), say=said.append)
    assert ready.model.path == str(where.target)
    assert len(said) == 1
    assert "cached" in said[0]


# ------------------------------------------------------------------------------------- refused before anything


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.workers=20", "unlearn.batch_size=20"], r"prepare\.batch_size: got 16, allowed: at least .* \(20\)"),
        (["model.dtype=pure_bfloat16"], "from scratch: float32, bfloat16"),
        (["prepare.base=./nothing"], r"prepare\.base: there is no folder"),
    ],
)
def test_bad_input_is_told_before_anything_is_made(
    tiny: Callable[..., Any], tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare.run(tiny(*overrides), say=quiet)
    assert not (tmp_path / "cache").exists()


def test_more_gpus_than_there_are_is_refused_without_workers(tiny: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.gpus_per_worker"):
        prepare.run(tiny("train.gpus_per_worker=512"), say=quiet)
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------------- two at a time


def test_the_second_of_two_waits_and_finds_the_models_made(tiny: Callable[..., Any]) -> None:
    config, said, results = tiny(), [], []
    where = prepare.folders(config)
    where.target.parent.mkdir(parents=True)
    with siblings.locked(where.target.parent / ".lock", lambda: pytest.fail("nobody else holds it")):
        second = threading.Thread(target=lambda: results.append(prepare.run(config, say=said.append)))
        second.start()
        _wait(lambda: bool(said))
        assert said == ["waiting for another process that prepares these models"]
        where.target.mkdir()
        where.retain.mkdir()
    second.join(60)
    assert [each.cached for each in results] == [True]
    assert list(where.target.iterdir()) == []  # nothing was trained into it


def test_one_that_fails_ends_the_other_at_once(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    slow = f"import os, pathlib, time; pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    wait = f"import pathlib, sys, time\nwhile not pathlib.Path({str(file)!r}).exists(): time.sleep(.01)\n"
    began = time.monotonic()
    for code, kind in ((2, InputError), (1, RuntimeError)):
        file.unlink(missing_ok=True)
        commands = {
            "slow": [sys.executable, "-c", slow],
            "bad": [sys.executable, "-c", f"{wait}print('first')\nprint('the cause')\nsys.exit({code})"],
        }
        with siblings.locked(tmp_path / ".lock", quiet_waiting) as lock, pytest.raises(kind, match=r"the cause$"):
            siblings.run(commands, lock)
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
    assert time.monotonic() - began < 30


def quiet_waiting() -> None:
    pytest.fail("nobody else holds it")


def test_a_killed_parent_leaves_the_lock_to_its_children(tmp_path: Path) -> None:
    """Else the next process would train into the folders that the orphans still write to."""
    script = (
        "import sys; from pathlib import Path; from pipelines import siblings\n"
        f"with siblings.locked(Path({str(tmp_path / '.lock')!r}), lambda: None) as lock:\n"
        f"    siblings.run({{'child': [sys.executable, '-c', \"import pathlib, time; "
        f'pathlib.Path({str(tmp_path / "up")!r}).touch(); time.sleep(3)"]}}, lock)\n'
    )
    parent = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)})
    _wait((tmp_path / "up").exists)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    with (tmp_path / ".lock").open("w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        began = time.monotonic()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert time.monotonic() - began < 10


def _wait(ready: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, "nothing happened in time"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_preparation_goes_on_from_its_checkpoint(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["prepare.steps=400", "train.checkpoint_every=20"]
    config = tiny(*overrides)
    where = prepare.folders(config)
    words = [word for each in (*overrides, "prepare.warmup=2") for word in ("--set", each)]
    command = [sys.executable, "-m", "pipelines", "prepare", "-c", str(tmp_path / "study.yaml"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait(lambda: any((where.target.parent / ".target-work" / "checkpoints").glob("step-*/state.json")), 120)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not where.target.exists()

    starts: list[int] = []

    class Run(prepare.Run):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            starts.append(self.start)

    monkeypatch.setattr(prepare, "Run", Run)
    monkeypatch.setattr(prepare, "_spare_cpus", lambda config: False)  # in this process, where we see it
    prepare.run(config, say=quiet)
    assert starts[0] >= 100  # the target's first checkpoint
    monkeypatch.setenv("GRU_CACHE", str(tmp_path / "calm"))
    calm = prepare.run(config, say=quiet)
    assert starts[2:] == [0, 0]
    for name, tensor in weights(calm.target).items():
        torch.testing.assert_close(weights(where.target)[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_workers_make_the_same_models(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    overrides = ["prepare.steps=20", "prepare.lr=1.0e-3"]
    alone = prepare.run(tiny(*overrides), say=quiet)
    monkeypatch.setenv("GRU_CACHE", str(tmp_path / "other"))
    try:
        together = prepare.run(tiny(*overrides, "train.workers=2"), say=quiet)
    finally:
        ray.shutdown()
    assert together.target.parent.name == alone.target.parent.name
    for one, two in ((alone.target, together.target), (alone.retain, together.retain)):
        for name, tensor in weights(one).items():
            torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=2e-4)
    start = models.build_small(models.load_tokenizer(str(alone.target)), tiny(*overrides).prepare, 0).state_dict()
    moved = max(float((start[name] - tensor).abs().max()) for name, tensor in weights(alone.target).items())
    assert moved > 5e-3  # the tolerance above is small against what training does
