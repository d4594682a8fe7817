"""Tasks on workers or here: devices, what a failure looks like, what is tried again, what a signal does."""

from __future__ import annotations

import datetime
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gru_core import checkpoint
from gru_core.config import EvaluateConfig, RunConfig, TrainConfig
from gru_core.errors import ConfigError, InputError, StorageError
from gru_core.metrics import Progress
from gru_core.parallel import Group
from pipelines import alive, capacity, cli, exits, inputs, launch, ray_start, worker

ONE = TrainConfig(workers=1, gpus_per_worker=0)
SETTINGS = {"threads": 1, "gpus": 0, "folder": Path("unused"), "hang_timeout": 600.0}


def cause_of(task: Any, payload: Any = None, train: TrainConfig = ONE, gpus: float = 0.0) -> Any:
    return launch.launch(task, payload, train, Path("unused"), name="test", gpus=gpus)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type:
    """Stands in for Ray's trainer: ``fit`` does what the class attribute says."""

    class Trainer:
        fit: Any = None

        def __init__(self, *args: Any, **settings: Any) -> None:
            """Takes what the real one takes."""

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    return Trainer


def raising(error: BaseException) -> Any:
    def fit(self: Any) -> Any:
        raise error

    return fit


# ---------------------------------------------------------------- failures


def test_an_error_of_the_controller_is_told_and_is_not_its_own_cause(trainer: Any) -> None:
    from ray.train import ControllerError

    trainer.fit = raising(ControllerError(RuntimeError("no placement group")))
    with pytest.raises(RuntimeError, match="no placement group") as caught:
        cause_of(None)
    assert exits.explain(caught.value) == (1, "no placement group (--verbose shows where)")

    trainer.fit = raising(RuntimeError("out of sorts"))
    with pytest.raises(RuntimeError, match="out of sorts") as caught:
        cause_of(None)
    assert caught.value.__cause__ is not caught.value
    assert exits.explain(caught.value)[0] == 1


def test_errors_in_a_ring_are_explained_too() -> None:
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__cause__, two.__cause__ = two, one
    assert [str(each) for each in exits._chain(one)] == ["one", "two"]


def test_the_first_workers_error_is_the_one_that_is_raised(trainer: Any) -> None:
    from ray.train import WorkerGroupError

    trainer.fit = raising(WorkerGroupError("both", {1: ValueError("second"), 0: OSError("first")}))
    with pytest.raises(OSError, match="first"):
        cause_of(None)


def refuse(payload: Any, group: Group, report: Any) -> None:
    raise ConfigError("train.seed", payload, "another one")


def test_bad_input_on_a_worker_comes_back_as_a_value_and_is_raised_here(trainer: Any) -> None:
    value = launch._on_worker({**SETTINGS, "task": refuse, "payload": 3})
    trainer.fit = lambda self: SimpleNamespace(return_value=value)
    with pytest.raises(ConfigError, match=r"train\.seed: got 3"):
        cause_of(None)


def _refusing(rank: int, store: str, out: str, who: int) -> None:
    launch.REFUSAL_S = 2.0
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )

    def task(payload: Any, group: Group, report: Any) -> str:
        if group.rank >= who:
            raise InputError("bad")
        return "good"

    try:
        found = launch._on_worker({**SETTINGS, "task": task, "payload": None})
    except InputError:
        found = "raised"
    Path(f"{out}-{rank}").write_text(type(found).__name__ if isinstance(found, launch._Refused) else found)
    dist.destroy_process_group()


@pytest.mark.slow
def test_only_what_all_workers_refuse_is_no_failure_of_a_worker(tmp_path: Path) -> None:
    """A rank that refuses alone must die, or the others would wait for it."""
    for who, expected in ((0, ["_Refused", "_Refused"]), (1, ["good", "raised"])):
        out = tmp_path / f"out{who}"
        mp.spawn(_refusing, args=(str(tmp_path / f"store{who}"), str(out), who), nprocs=2)
        assert [Path(f"{out}-{rank}").read_text() for rank in range(2)] == expected


def count(payload: str, group: Group, report: Any) -> None:
    with Path(payload).open("a") as file:
        file.write(f"{group.rank}{group.device}\n")
    raise InputError("the same everywhere")


@pytest.mark.slow
def test_bad_input_is_not_tried_again_by_ray(tmp_path: Path) -> None:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        train = TrainConfig(workers=2, gpus_per_worker=0, max_failures=2)
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(InputError, match="the same everywhere"):
            launch.launch(count, str(tmp_path / "calls"), train, tmp_path, name="test")
        assert sorted((tmp_path / "calls").read_text().split()) == ["0cpu", "1cpu"]
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        ray.shutdown()


# ---------------------------------------------------------------- signals


def test_ctrl_c_under_ray_train_is_an_interrupt_and_the_handler_comes_back(trainer: Any) -> None:
    def fit(self: Any) -> Any:  # what Ray Train does
        signal.signal(signal.SIGINT, lambda number, frame: sys.exit(0))
        signal.raise_signal(signal.SIGINT)

    trainer.fit = fit
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        cause_of(None)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_does_what_ctrl_c_does(handlers: None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray in an earlier test may have left its own
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    heard = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_ray_does_not_take_sigterm_away(handlers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**options: Any) -> None:  # what Ray does
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_start, "_token", lambda address, say: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ray_start.SWITCHES:  # start sets them: gone again afterwards
        monkeypatch.setenv(name, ray_start.SWITCHES[name])
    signal.signal(signal.SIGTERM, cli._stop)
    ray_start.start(lambda line: None)
    assert signal.getsignal(signal.SIGTERM) is cli._stop


# ---------------------------------------------------------------- GPUs


def device(payload: Any, group: Group, report: Any) -> int:
    return group.rank


def test_a_task_in_this_process_is_on_the_gpu_only_where_one_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "current_group", lambda: Group(rank=7))  # stands for a GPU
    here = TrainConfig(workers=0)
    assert cause_of(device, None, here, gpus=1.0) == 7
    assert cause_of(device, None, here, gpus=0.0) == 0


def test_auto_is_one_gpu_each_and_too_few_are_refused() -> None:
    four = TrainConfig(workers=4)
    assert ray_start.gpus_per_worker(four, 2.0) == 1.0
    assert ray_start.gpus_per_worker(four, 0.0) == 0.0
    with pytest.raises(InputError, match=r"4 workers need 4 CPUs and 4 GPUs.*2 GPUs"):
        capacity.check_room(four, ray_start.gpus_per_worker(four, 2.0), [{"CPU": 16.0, "GPU": 2.0}])


@pytest.mark.parametrize(
    ("workers", "gpus", "allowed"),
    [
        (2, 0.5, False),
        (2, 1.5, False),
        (1, 1.5, False),
        (0, 2.5, False),
        (1, 0.5, True),
        (0, 0.25, True),
        (2, 1.0, True),
        (2, 0, True),
        (2, "auto", True),
    ],
)
def test_shares_of_a_gpu(workers: int, gpus: Any, allowed: bool) -> None:
    train = TrainConfig(workers=workers, gpus_per_worker=gpus)
    if allowed:
        assert ray_start.gpus_per_worker(train, 2.0) == (1.0 if gpus == "auto" else gpus)
        return
    for refused in (lambda: ray_start.gpus_per_worker(train, 8.0), lambda: ray_start.local_gpus(train)):
        with pytest.raises(ConfigError, match=r"train.gpus_per_worker: got \d.5"):
            refused()


def test_gpus_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_gpus(number: int, gpus: Any) -> float:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        return ray_start.local_gpus(TrainConfig(workers=0, gpus_per_worker=gpus))

    assert with_gpus(2, "auto") == 1.0
    assert with_gpus(0, "auto") == 0.0
    assert with_gpus(2, 0) == 0.0
    assert with_gpus(1, 0.5) == 0.5
    for number, gpus in ((1, 2), (0, 1), (0, 0.5)):
        with pytest.raises(ConfigError, match=f"train.gpus_per_worker: got {gpus}.*at most {number}"):
            with_gpus(number, gpus)


# ---------------------------------------------------------------- workers


def test_ranks_go_by_what_rank_0_finds(tmp_path: Path) -> None:
    """Rank 1 sees a result that rank 0 does not: it must not leave rank 0 alone in the run."""

    class Lead(Group):
        def gather(self, value: Any) -> list[Any]:
            return [(None, None), value]

    (tmp_path / "scores.json").write_text("{}")
    assert worker._found(tmp_path, Group()) == ({}, None)
    assert worker._found(tmp_path, Lead(rank=1, size=2)) == (None, None)


@pytest.mark.parametrize(
    ("message", "added"),
    [
        ("/data/checkpoints/run/journal.jsonl cannot be written", True),
        ("cannot write checkpoint x: disk full; the last whole checkpoint is y", False),
        ("cannot write checkpoint x: disk full; there is no earlier checkpoint", False),
    ],
)
def test_a_storage_error_names_the_last_checkpoint_once(tmp_path: Path, message: str, added: bool) -> None:
    found = str(checkpoint.named(StorageError(message), tmp_path))
    assert found == (f"{message}; the last whole checkpoint is none" if added else message)


def test_forget_quality_alone_is_a_baseline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The retain model's forget quality is not measured, its truth ratios are; each metric once, in order."""
    asked: list[tuple[str, ...]] = []

    def evaluate(model: Any, tokenizer: Any, benchmark: Any, config: EvaluateConfig, *args: Any, **more: Any) -> Any:
        asked.append(config.metrics)
        before = alive._beats
        model(torch.zeros(1, 1))
        assert alive._beats == before + 1, "a long scoring of the starting model would count as a hang"
        return SimpleNamespace(measurements={})

    monkeypatch.setattr(inputs, "evaluate", evaluate)
    monkeypatch.setattr(inputs, "place_frozen", lambda *args: torch.nn.Linear(1, 1))
    monkeypatch.setattr(inputs.models, "load_tokenizer", lambda *args: None)
    shared: Any = SimpleNamespace(start=lambda config: None, tokenizer=None, benchmark=None)
    for metrics, expected in (
        (("forget_quality",), ("forget_truth_ratio",)),
        (("forget_truth_ratio", "rouge", "forget_quality"), ("forget_truth_ratio", "rouge")),
    ):
        config = replace(RunConfig(retain_model="there"), evaluate=EvaluateConfig(metrics=metrics))
        inputs.measure_baseline(config, shared, Group(), Progress(tmp_path, "these", Group()))
        assert asked == [expected, metrics]
        asked.clear()
