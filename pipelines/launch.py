"""One task on N Ray Train workers, or in this process: the only caller of ``TorchTrainer``.

A task is ``task(payload, group, report)``: it runs on every worker with the same payload, calls ``report`` on
every worker at the same moments, and its return value on rank 0 is the result. Checkpoints are the task's own
(a plain directory in its run folder), so a restarted group continues where the last one was written.

Workers that die, or make no progress (:mod:`pipelines.alive`), are started again: as many as before, or as many
as can be had from ``train.min_workers`` on.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from gru_core.config import TrainConfig
from gru_core.errors import InputError, StorageError
from gru_core.parallel import Group, current_group
from pipelines import alive

R = TypeVar("R")
Report = Callable[[dict[str, Any]], None]
Task = Callable[[Any, Group, Report], R]

QUIET = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # reports are polled this often
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # then it counts again what there is; it waits for ever
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # a worker that hangs does not answer that call either
}

HEALTH = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
"""Ray Train: seconds after which a worker process that does not answer is taken for dead."""

REFUSAL_S = 10.0
"""Longest wait for the other workers to meet the same bad input."""


@dataclass(frozen=True)
class _Refused:
    """What every worker met and would meet again (bad input, a full disk): a value, since Ray Train would start
    the workers again on an error."""

    error: InputError | StorageError


def silent(metrics: dict[str, Any]) -> None:
    """The reporter of a task that nobody listens to."""


def launch(
    task: Task[R],
    payload: Any,
    train: TrainConfig,
    folder: Path,
    *,
    name: str,
    gpus: float = 0.0,
    in_tune: bool = False,
    report: Report = silent,
) -> R:
    """Run ``task`` on ``train.workers`` workers (0: here) and return rank 0's result.

    Args:
        payload: picklable; large parts travel as Ray object references.
        folder: the run folder; Ray keeps its own state in ``folder/ray``.
        name: stable name of the Ray Train run.
        gpus: GPUs of each worker; 0 stays on the CPU, wherever the task runs.
        in_tune: called from a Tune trial's driver function; reports then go to Tune.
        report: where the reports of a task in this process go.

    Raises:
        InputError, StorageError: what the task raised on every worker; not tried again.
        Exception: what the task raised on a worker, after ``train.max_failures`` restarts.
        KeyboardInterrupt: Ctrl-C; the workers are gone.
    """
    if train.workers == 0:
        return _here(task, payload, train, gpus, report)
    _switches(train)
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    watch = {"folder": folder.absolute(), "hang_timeout": train.hang_timeout}
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={"task": task, "payload": payload, "threads": train.cpus_per_worker, "gpus": gpus, **watch},
        torch_config=_torch(train, gpus),
        scaling_config=_scaling(train, gpus),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder.absolute() / "ray"),
            failure_config=FailureConfig(max_failures=train.max_failures),
            callbacks=_tune_callbacks() if in_tune else [],
            **_logging(),
        ),
    )
    value = _fit(trainer)
    if isinstance(value, _Refused):
        raise value.error
    return value


def _switches(train: TrainConfig) -> None:
    """What Ray Train reads from the environment, in this process and in its controller."""
    os.environ.update({k: os.environ.get(k, v) for k, v in QUIET.items()})
    os.environ[HEALTH] = str(train.hang_timeout)


def _scaling(train: TrainConfig, gpus: float) -> Any:
    """How many workers, and what each of them takes."""
    from ray.train import ScalingConfig

    resources = {"CPU": float(train.cpus_per_worker)} | ({"GPU": gpus} if gpus else {})
    fewest = train.min_workers or train.workers
    number: Any = train.workers if fewest == train.workers else (fewest, train.workers)
    return ScalingConfig(num_workers=number, use_gpu=gpus > 0, resources_per_worker=resources)


def _torch(train: TrainConfig, gpus: float) -> Any:
    """Collectives wait longer than a hang takes to be noticed: one rank may write while the others wait."""
    from ray.train.torch import TorchConfig

    return TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=math.ceil(max(1800, 2 * train.hang_timeout)))


def _tune_callbacks() -> list[Any]:
    """What carries workers' reports on to the Tune trial that this process is."""
    from ray.tune.integration.ray_train import TuneReportCallback

    return [TuneReportCallback()]


def _fit(trainer: Any) -> Any:
    """The return value of the workers' rank 0."""
    with _interrupts():
        try:
            return trainer.fit().return_value
        except SystemExit:  # how Ray Train's own handler of Ctrl-C ends this process
            raise KeyboardInterrupt from None
        except Exception as error:
            cause = _cause(error)
            if cause is error:
                raise
            raise cause from error


@contextmanager
def _interrupts() -> Iterator[None]:
    """Gives Ctrl-C back to whoever had it: Ray Train takes it, and keeps it, in the main thread."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGINT, before)


def _logging() -> dict[str, Any]:
    """Ray Train's own lines only with ``--verbose``."""
    if os.environ.get("GRU_VERBOSE") == "1":
        return {}
    from ray.train import LoggingConfig

    return {"logging_config": LoggingConfig(log_level="ERROR")}


def _here(task: Task[R], payload: Any, train: TrainConfig, gpus: float, report: Report) -> R:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(train.cpus_per_worker)
    try:
        return task(payload, current_group() if gpus else Group(), report)
    finally:
        torch.set_num_threads(before)


def _on_worker(settings: dict[str, Any]) -> Any:
    import ray.train
    import ray.train.torch
    import torch

    torch.set_num_threads(settings["threads"])
    # Where no GPU was asked for, Ray still names the first one that it sees.
    group = current_group(ray.train.torch.get_device() if settings["gpus"] else torch.device("cpu"))
    meeting = _meeting(group)
    try:
        with alive.watched(settings["folder"], group.rank, settings["hang_timeout"]):
            return settings["task"](settings["payload"], group, ray.train.report)
    except (InputError, StorageError) as error:
        if not _all_refuse(group, meeting):
            raise
        return _Refused(error)


def _meeting(group: Group) -> Any:
    """A process group of its own for refusals: the task's may have unfinished business."""
    if group.size == 1:
        return None
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=timedelta(seconds=REFUSAL_S))


def _all_refuse(group: Group, meeting: Any) -> bool:
    """Whether every rank comes here: one that goes on alone would wait for this one until it times out."""
    if group.size == 1:
        return True
    import torch.distributed as dist

    try:
        dist.monitored_barrier(meeting, timedelta(seconds=REFUSAL_S))
    except RuntimeError:
        return False
    return True


def _cause(error: BaseException) -> BaseException:
    """The exception behind Ray's wrappers: the first worker's, or the controller's; else the error itself."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        inner = getattr(error, "controller_failure", None)
        return inner if isinstance(inner, BaseException) else error
    inner = failures[min(failures)]
    return getattr(inner, "_base_exc", inner)
