"""One task on N Ray Train workers, or in this process: the only caller of ``TorchTrainer``.

A task is ``task(payload, group, report)``: it runs on every worker with the same payload, calls ``report`` on
every worker at the same moments, and its return value on rank 0 is the result. Checkpoints are the task's own
(a plain directory in its run folder), so a restarted group continues where the last one was written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gru_core.config import TrainConfig
from gru_core.parallel import Group, current_group

R = TypeVar("R")
Report = Callable[[dict[str, Any]], None]
Task = Callable[[Any, Group, Report], R]

QUIET = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # reports are polled this often
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


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
        gpus: GPUs of each worker.
        in_tune: called from a Tune trial's driver function; reports then go to Tune.
        report: where the reports of a task in this process go.

    Raises:
        Exception: what the task raised on a worker, after ``train.max_failures`` restarts.
    """
    if train.workers == 0:
        return _here(task, payload, train, report)
    os.environ.update({k: os.environ.get(k, v) for k, v in QUIET.items()})
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    callbacks: list[Any] = []
    if in_tune:
        from ray.tune.integration.ray_train import TuneReportCallback

        callbacks.append(TuneReportCallback())
    resources = {"CPU": float(train.cpus_per_worker)} | ({"GPU": gpus} if gpus else {})
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={"task": task, "payload": payload, "threads": train.cpus_per_worker},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=train.workers, use_gpu=gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder.absolute() / "ray"),
            failure_config=FailureConfig(max_failures=train.max_failures),
            callbacks=callbacks,
            **_logging(),
        ),
    )
    try:
        result: Any = trainer.fit()
    except Exception as error:
        raise _cause(error) from error
    return result.return_value


def _logging() -> dict[str, Any]:
    """Ray Train's own lines only with ``--verbose``."""
    if os.environ.get("GRU_VERBOSE") == "1":
        return {}
    from ray.train import LoggingConfig

    return {"logging_config": LoggingConfig(log_level="ERROR")}


def _here(task: Task[R], payload: Any, train: TrainConfig, report: Report) -> R:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(train.cpus_per_worker)
    try:
        return task(payload, current_group(), report)
    finally:
        torch.set_num_threads(before)


def _on_worker(settings: dict[str, Any]) -> Any:
    import ray.train
    import ray.train.torch
    import torch

    torch.set_num_threads(settings["threads"])
    group = current_group(ray.train.torch.get_device())
    return settings["task"](settings["payload"], group, ray.train.report)


def _cause(error: BaseException) -> BaseException:
    """The first worker's own exception behind Ray's wrappers; the error itself where there is none."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return error
    inner = failures[min(failures)]
    return getattr(inner, "_base_exc", inner)
