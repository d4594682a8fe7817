"""Faults at chosen moments in real worker processes, and what must be true after each of them.

A plan is a list of faults. Each strikes once, in the process of its rank: ``Fault("step", 6, rank=1)`` kills rank 1
in its sixth step, when gradients are computed and no weight is changed. :func:`planned` makes a task for Ray Train
workers that carries a plan out. As a module this is the command line with a plan:
``python -m tests.faults MARKS JSON unlearn -c FILE ...``.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gru_core.parallel import unwrap
from pipelines import journal, ray_start, stopping, worker
from pipelines.tracking import KEY
from tests.study import Study, final_weights

TASK = worker.task
ROOT = Path(__file__).resolve().parents[1]
GO = "go"
STEPS = ("unlearn.steps=12", "unlearn.evaluate_every=6", "train.checkpoint_every=4")


@dataclass(frozen=True)
class Fault:
    """What happens to one rank.

    Attributes:
        where: ``step`` (before the optimizer changes a weight), ``checkpoint`` (files are written, the folder has not
            its name yet), ``evaluation`` (before its first batch).
        step: the step, from 1, in or after which it happens.
        how: ``kill`` (SIGKILL), ``freeze`` (SIGSTOP), ``loop`` (the training thread goes on for ever), ``full`` (the
            disk is), ``ask`` (a request to stop lies in the run folder), ``slow`` (a second goes by), ``hold``
            (it waits until the file ``GO`` is among the marks).
    """

    where: str
    step: int
    rank: int = 0
    how: str = "kill"

    @property
    def name(self) -> str:
        return f"{self.where}-{self.step}-{self.rank}"


def strike(fault: Fault, marks: Path, folder: Path) -> None:
    """Does it, once in all lives of the process."""
    mark = marks / fault.name
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return
    match fault.how:
        case "loop":
            while True:
                time.sleep(0.01)
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "ask":
            (folder / stopping.NAME).touch()
            time.sleep(2 * stopping.POLL_S)
        case "slow":
            time.sleep(1.0)
        case "hold":
            wait((marks / GO).exists)
        case how:
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


class _Arms:
    """The hooks that wait for the moment, in one worker process."""

    def __init__(self, plan: Sequence[Fault], marks: Path, folder: Path, rank: int) -> None:
        self.folder = folder
        self.mine = [fault for fault in plan if fault.rank == rank]
        self.marks, self.step = marks, 0

    def at(self, where: str) -> None:
        for fault in self.mine:
            if (fault.where, fault.step) == (where, self.step):
                strike(fault, self.marks, self.folder)

    def before_optimizer(self, *given: Any) -> None:
        self.at("step")

    def before_sync(self, real: Callable[[int], None], descriptor: int) -> None:
        self.at("checkpoint")
        real(descriptor)

    def before_batch(self, *given: Any) -> None:
        self.at("evaluation")

    def evaluate(self, real: Callable[..., Any], model: Any, *given: Any, **more: Any) -> Any:
        hook = unwrap(model).register_forward_pre_hook(self.before_batch)
        try:
            return real(model, *given, **more)
        finally:
            hook.remove()

    def call(self, real: Any, core_step: Any, number: int, *given: Any) -> Any:
        self.step = number + 1
        with (self.marks / f"executed-{os.getpid()}").open("a") as file:
            file.write(f"{self.step}\n")
        return real(core_step, number, *given)


def task(plan: Sequence[Fault], marks: Path, assignment: worker.Assignment, group: Any, report: Any) -> Any:
    """The worker's task with faults in it; undone afterwards where the process lives on."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from gru_core.step import Step

    arms = _Arms(plan, marks, assignment.folder, group.rank)
    evaluate, sync, call = worker.evaluate, os.fsync, Step.__call__
    hook = register_optimizer_step_pre_hook(arms.before_optimizer)

    def counted(step: Step, number: int, *given: Any) -> Any:
        return arms.call(call, step, number, *given)

    worker.evaluate = functools.partial(arms.evaluate, evaluate)
    os.fsync = functools.partial(arms.before_sync, sync)
    Step.__call__ = counted  # type: ignore[method-assign, assignment]
    try:
        return TASK(assignment, group, report)
    finally:
        hook.remove()
        worker.evaluate, os.fsync = evaluate, sync
        Step.__call__ = call  # type: ignore[method-assign]


def planned(plan: Sequence[Fault], marks: Path) -> Callable[..., Any]:
    """A task that carries out ``plan``; ``marks`` is a folder of its own, which also counts the steps taken."""
    marks.mkdir(parents=True, exist_ok=True)
    return functools.partial(task, tuple(plan), marks)


def executed(marks: Path) -> Counter[int]:
    """How often each step was taken by the processes that lived, over all ranks."""
    return Counter(int(line) for file in marks.glob("executed-*") for line in file.read_text().split())


def struck(marks: Path) -> set[str]:
    return {file.name for file in marks.iterdir() if not file.name.startswith(("executed-", GO))}


# ------------------------------------------------------------------------------------------ what must be true


def same_result(one: Path, other: Path) -> bool:
    """Bit for bit: the weights, and every value that was tracked on the way."""
    a, b = final_weights(one), final_weights(other)
    weights = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return weights and journal.load(one).metrics == journal.load(other).metrics


def distance(one: Path, other: Path, start: Path) -> float:
    """Norm of the difference of two models over that of the update which led to the second."""
    from safetensors.torch import load_file

    a, b, begin = final_weights(one), final_weights(other), load_file(start / "model.safetensors")

    def norm(x: dict[str, Any], y: dict[str, Any]) -> float:
        return float(sum((x[n].double() - y[n].double()).square().sum() for n in x) ** 0.5)

    return norm(a, b) / norm(b, begin)


def each_once(folder: Path, steps: int, evaluations: Sequence[int]) -> None:
    """Every step and every evaluation stands once in the journal of a run that finished."""
    entries = [entry for entry in journal.read(folder)[0] if entry["kind"] == "metrics"]
    seen = Counter((key, entry["step"]) for entry in entries for key in entry["metrics"])
    assert [key for key, count in seen.items() if count > 1] == []
    assert sorted(step for key, step in seen if key == "train/lr") == list(range(1, steps + 1))
    assert sorted(step for key, step in seen if key == "eval/unlearning") == sorted(evaluations)
    assert journal.load(folder).status == "finished"


def tracked(folder: Path, store: str) -> Any:
    """The MLflow run of a folder."""
    from mlflow import MlflowClient

    return MlflowClient(store).get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])


def tracked_once(folder: Path, steps: int, store: str) -> None:
    """The same in MLflow: one run, and all points of its journal, each once and with its value."""
    from mlflow import MlflowClient

    run, client = tracked(folder, store), MlflowClient(store)
    assert run.info.status == "FINISHED"
    written = sorted(journal.load(folder).metrics.items())
    assert [step for step, values in written if "train/lr" in values] == list(range(1, steps + 1))
    assert run.data.metrics.keys() == {key for _, values in written for key in values}
    for key in run.data.metrics:
        history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
        assert history == [(step, values[key]) for step, values in written if key in values], key
    mine = f"tags.`{KEY}` = '{(journal.head(folder) or {})['key']}'"
    assert len(client.search_runs([run.info.experiment_id], mine)) == 1


def store_of(study: Study) -> str:
    return f"sqlite:///{study.folder}/mlflow.db"


# ------------------------------------------------------------------------------------------- processes


def switches(patch: pytest.MonkeyPatch) -> None:
    """Ray's processes get the environment that they have where we start them."""
    for name, value in ray_start.SWITCHES.items():
        patch.setenv(name, value)


def driver(
    arguments: Sequence[str], study: Study, log: Path, plan: Sequence[Fault] = (), **environment: str
) -> subprocess.Popen[bytes]:
    """The command line, with a plan, in a process of its own; its output in ``log``, marks beside it."""
    given = json.dumps([asdict(fault) for fault in plan])
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults", str(log.parent / "marks"), given, *arguments],
            env={**os.environ, **study.environment, **environment}, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
        )  # fmt: skip


def slowly(first: int, last: int) -> list[Fault]:
    """A plan for a run that can be caught: each of these steps takes a second, so that the last are never reached."""
    return [Fault("step", step, how="slow") for step in range(first, last + 1)]


def trial_work(marks: Path, job: Any, report: Any) -> Any:
    """A trial whose steps are counted, in a file for each of its processes, and can be caught."""
    from gru_core.step import Step
    from pipelines import trial

    call = Step.__call__

    def counted(step: Step, number: int, *given: Any) -> Any:
        with (marks / f"{job.name}.{os.getpid()}").open("a") as file:
            file.write(f"{number + 1}\n")
        time.sleep(0.08)
        return call(step, number, *given)

    Step.__call__ = counted  # type: ignore[method-assign, assignment]
    try:
        return trial.work(job, report)
    finally:
        Step.__call__ = call  # type: ignore[method-assign]


def planned_job(real: Callable[..., str], *given: Any) -> str:
    """The entry point of a job that has our own plan: tests of this machine, and the code that was sent."""
    command = real(*given).replace("-m pipelines", f"-m tests.faults {shlex.join(sys.argv[1:3])}", 1)
    return command.replace("exec", f"exec env PYTHONPATH={shlex.quote(str(ROOT))}", 1)


def main(marks: Path, plan: Sequence[Fault], arguments: Sequence[str]) -> None:
    from pipelines import cli, jobs, search

    marks.mkdir(parents=True, exist_ok=True)
    jobs.entrypoint = functools.partial(planned_job, jobs.entrypoint)
    search.run.__kwdefaults__["work"] = functools.partial(trial_work, marks)  # type: ignore[index]
    worker.task = planned(plan, marks)
    cli.main(arguments)


def wait(ready: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, limit: float = 240.0) -> None:
    """Until something is so; a process that ends meanwhile is a failure."""
    until = time.monotonic() + limit
    while not ready():
        assert process is None or process.poll() is None, "the process ended too early"
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def reached(folder: Path, step: int) -> bool:
    return max(journal.load(folder).metrics, default=0) >= step


def damage(file: Path, how: str) -> None:
    """``flip`` one bit in the middle, ``truncate`` to half, or ``remove``."""
    if how == "remove":
        file.unlink()
        return
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    file.write_bytes(bytes(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Fault(**each) for each in json.loads(sys.argv[2])], sys.argv[3:])
