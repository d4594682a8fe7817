"""One trial of a search, as its Ray process runs it."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gru_core.config import RunConfig, TrainConfig
from gru_core.errors import InputError, StorageError
from pipelines import alive, mirror, selection
from pipelines.launch import Report
from pipelines.space import trial_config
from pipelines.storage import Storage

BASELINE = "baseline.json"
LOCK_S = 120.0
"""Longest wait for a process of an earlier, killed search to leave a trial's folder."""


@dataclass(frozen=True)
class Job:
    """A trial as its work function gets it.

    Attributes:
        config: resolved; ``output.dir`` is the trial's folder.
        shared: Ray object reference to what :func:`pipelines.search_inputs.load` read.
        gpus: GPUs of each worker.
    """

    config: RunConfig
    folder: Path
    name: str
    tags: dict[str, str]
    shared: Any
    gpus: float


Work = Callable[[Job, Report], dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """What all trials of a search have in common."""

    config: RunConfig
    folder: Path
    shared: Any
    gpus: float
    work: Work


def run(spec: dict[str, Any], study: Study) -> dict[str, Any]:
    """One trial: the function that Ray Tune calls. Its return value is its last report: its best candidate.

    What another try would meet again (bad input that only this trial's settings bring out, a full disk) is a failed
    trial at once; any other error is raised, and Tune starts the trial again from its last checkpoint,
    ``train.max_failures`` times. A trial of a search that was asked to stop ends as ``stopped`` and keeps its
    checkpoint.
    """
    from ray import tune

    began = time.monotonic()
    folder = study.folder / "trials" / spec["id"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _ERROR).unlink(missing_ok=True)
    storage = mirror.of(study.config.output.storage)
    storage = storage.under(f"trials/{spec['id']}") if storage else None
    tags = {"gru.kind": "trial", "gru.family": spec["family"], "gru.trial": spec["id"]}
    try:
        config = trial_config(study.config, spec["settings"], str(folder))
        config = replace(config, output=replace(config.output, storage=storage.uri if storage else None))
        job = Job(config, folder, spec["id"], tags, study.shared, study.gpus)
        with alone(folder):
            result = study.work(job, tune.report)
    except (InputError, StorageError) as error:
        return {"id": spec["id"], "status": "failed", "error": _note(folder, error, storage)}
    except Exception as error:
        _note(folder, error, storage)
        raise
    if result["status"] == "stopped":
        return {"id": spec["id"], "status": "stopped"}
    clean(folder)
    if storage is not None:
        storage.delete([*storage.names("checkpoints"), _ERROR])
    best = selection.best(result["points"], study.config.search.metrics)
    extra = {"error": result["error"]} if "error" in result else {}
    seconds = round(time.monotonic() - began, 3)
    return {"id": spec["id"], "status": result["status"], **best, "seconds": seconds, **extra}


def work(job: Job, report: Report) -> dict[str, Any]:
    """The run itself: in this process, or on the Ray Train workers that its config asks for."""
    study = job.folder.parents[1]
    if job.config.train.workers:
        from pipelines import unlearn

        with _baseline(study, job):
            return unlearn.train(
                job.config, job.folder, shared_ref=job.shared, in_tune=True, name=job.name, tags=job.tags,
                keep_model=False, gpus=job.gpus, stop_in=study,
            )  # fmt: skip
    import torch

    from gru_core.parallel import Group, current_group
    from pipelines import search_inputs, worker

    torch.set_num_threads(job.config.train.cpus_per_worker)
    group = current_group() if job.gpus else Group()
    shared = search_inputs.fetch(job.shared)
    with alive.watched(job.folder, 0, job.config.train.hang_timeout):
        return worker.work(
            job.config, job.folder, shared=shared, report=report, name=job.name, tags=job.tags, keep_model=False,
            group=group, stop_in=study,
        )  # fmt: skip


@contextmanager
def _baseline(study: Path, job: Job) -> Iterator[None]:
    """Where a model is too large for one process to score, the first trial's workers do it for all trials."""
    known, own = study / BASELINE, job.folder / BASELINE
    sharded = job.config.train.strategy == "fsdp"
    if sharded and known.exists() and not own.exists():
        shutil.copyfile(known, own)
    yield
    if sharded and own.exists() and not known.exists():
        part = known.with_name(f".{job.name}-{BASELINE}")
        shutil.copyfile(own, part)
        part.rename(known)


def resources(train: TrainConfig, gpus: float) -> dict[str, float]:
    """What Ray Tune reserves for a trial.

    The driver of a trial with workers only waits for them: a CPU of its own would be missing to them, and none at
    all is refused. One byte of memory is a resource that every node of every cluster has.
    """
    if train.workers:
        return {"memory": 1}
    return {"CPU": train.cpus_per_worker, **({"GPU": gpus} if gpus else {})}


# ---------------------------------------------------------------------------------------------- its folder

_ERROR = "error.json"


def _note(folder: Path, error: BaseException, storage: Storage | None) -> str:
    text = f"{type(error).__name__}: {error}" if not isinstance(error, InputError) else str(error)
    line = " ".join(text.split())[:500]
    with suppress(OSError, StorageError):  # a full disk must not hide what went wrong first
        (folder / _ERROR).write_text(json.dumps({"error": line}))
        if storage is not None:
            storage.push(folder, [_ERROR])
    return line


def cause(folder: Path) -> str:
    """What the trial in this folder died of."""
    try:
        return str(json.loads((folder / _ERROR).read_text())["error"])
    except (OSError, ValueError, KeyError):
        return "its process died (killed, or out of memory)"


def clean(folder: Path) -> None:
    """Leaves a finished trial's record and removes what only a running one needs: its checkpoints above all."""
    for name in ("checkpoints", "ray"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (_ERROR, ".lock"):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; waits for one that outlived its killed driver.

    Raises:
        RuntimeError: another process still holds it after ``LOCK_S`` seconds.
    """
    with (folder / ".lock").open("w") as file:
        until = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise RuntimeError(f"another process still works in {folder}") from None
                time.sleep(0.2)
        yield
