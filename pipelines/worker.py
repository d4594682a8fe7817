"""What each worker runs: one unlearning run in its folder, from the start or from its last checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gru_core import checkpoint, models
from gru_core.benchmarks import retain_subset
from gru_core.config import RunConfig
from gru_core.errors import NonFiniteError, StorageError
from gru_core.loop import Hooks, Run
from gru_core.metrics import Baseline, Evaluation, evaluate, trade_off
from gru_core.objectives import build_objective
from gru_core.parallel import Group, current_group, unwrap, wrap
from gru_core.rectify import RULES
from gru_core.step import Rows
from pipelines import inputs, settings
from pipelines.inputs import Shared
from pipelines.journal import Journal, points
from pipelines.launch import Report, silent

Result = dict[str, Any]


@dataclass(frozen=True)
class Assignment:
    """One run, as every worker gets it.

    Attributes:
        config: resolved; ``model.path`` and ``retain_model`` name folders or hub ids.
        folder: the run folder, on storage that all workers see.
        shared: inputs, a Ray object reference to them, or None: each worker reads them itself.
        keep_model: write the final model to ``folder/model``.
    """

    config: RunConfig
    folder: Path
    shared: Any = None
    name: str = "run"
    tags: dict[str, str] | None = None
    keep_model: bool = True


def task(assignment: Assignment, group: Group, report: Report) -> Result:
    """:func:`work` as :func:`pipelines.launch.launch` calls it."""
    shared = assignment.shared
    if shared is not None and not isinstance(shared, Shared):
        import ray

        shared = ray.get(shared)
    a = assignment
    return work(
        a.config, a.folder, shared=shared, report=report, name=a.name, tags=a.tags or {},
        keep_model=a.keep_model, group=group,
    )  # fmt: skip


def finished(folder: Path) -> Result | None:
    """The stored result of a run that ended, or None."""
    file = folder / "scores.json"
    return json.loads(file.read_text()) if file.exists() else None


def work(
    config: RunConfig,
    folder: Path,
    *,
    shared: Shared | None = None,
    report: Report = silent,
    name: str = "run",
    tags: dict[str, str] | None = None,
    keep_model: bool = False,
    group: Group | None = None,
) -> Result:
    """Run, or resume, one unlearning run; called on every rank.

    ``report`` gets ``{"step", "unlearning", "retention"}`` at every evaluation, on every rank.

    Returns:
        ``{"status", "steps", "scores", "points"}``, the same that ``folder/scores.json`` holds. A run that met
        a non-finite value ends with status ``non_finite`` and an ``error`` that says where.

    Raises:
        StorageError: the disk is full; names the last whole checkpoint.
    """
    group = group or current_group()
    done, baseline = _found(folder, group)
    if done is not None:
        return done
    shared = shared or inputs.load(config)
    baseline = shared.baseline or baseline
    if baseline is None:
        baseline = inputs.measure_baseline(config, shared, group)
    try:
        return _Work(config, folder, shared, baseline, report, group).go(name, tags or {}, keep_model)
    except StorageError as error:
        raise _with_checkpoint(error, folder / "checkpoints") from error
    except OSError as error:
        raise _with_checkpoint(StorageError(f"{folder} cannot be written: {error}"), folder / "checkpoints") from error


def _found(folder: Path, group: Group) -> tuple[Result | None, Baseline | None]:
    """Result and baseline that stand in the folder, as rank 0 sees them: a network file system may show a file to
    one node before another, and ranks that disagree would wait for each other for ever."""
    mine = (finished(folder), inputs.read_baseline(folder / "baseline.json")) if group.rank == 0 else (None, None)
    return group.gather(mine)[0]


def _with_checkpoint(error: StorageError, folder: Path) -> StorageError:
    """The error, naming the last whole checkpoint; one from writing a checkpoint does that already."""
    if "last whole checkpoint" in str(error) or "no earlier checkpoint" in str(error):
        return error
    last = checkpoint.latest(folder)
    return StorageError(f"{error}; the last whole checkpoint is {last.folder if last else 'none'}")


class _Work:
    """The hooks of one run, and what they share."""

    def __init__(
        self, config: RunConfig, folder: Path, shared: Shared, baseline: Baseline, report: Report, group: Group
    ) -> None:
        self.config, self.folder, self.shared = inputs.without_secrets(config), folder, shared
        self.baseline, self.report, self.group = baseline, report, group
        self.lead = group.rank == 0
        self.scores: dict[str, float] = {}
        self.model: nn.Module = wrap(shared.model(config.model).to(group.device), group)
        self.journal: Journal | None = None

    def go(self, name: str, tags: dict[str, str], keep_model: bool) -> Result:
        if self.lead:
            self._open(name, tags)
        self.group.barrier()
        config, shared = self.config, self.shared
        subset = retain_subset(shared.benchmark, config.retain, config.train.seed)
        run = Run(
            self.model,
            config,
            build_objective(config.unlearn),
            Rows(shared.forget),
            Rows([shared.retain[i] for i in subset]),
            self.group,
            Hooks(log=self._log, evaluate=self._evaluate),
            self.folder / "checkpoints",
        )
        try:
            outcome = run()
            status, steps, error = str(outcome.status), outcome.steps, None
        except NonFiniteError as caught:  # the same on every rank: losses are reduced, gradients averaged
            status, steps, error = "non_finite", caught.step - 1, str(caught)
        if error or not self.scores:  # also after a restart behind the last evaluation
            self._evaluate(steps)
        return self._close(status, steps, error, keep_model)

    def _open(self, name: str, tags: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(settings.to_yaml(self.config))
        inputs.store_baseline(self.baseline, self.folder / "baseline.json")
        self.journal = Journal(self.folder)
        scored = {"gru.include_scored": str(self.config.retain.include_scored).lower()}
        self.journal.run(name, {"gru.benchmark": self.shared.benchmark.name} | scored | tags)
        self.journal.params(self._params())
        self.journal.artifact("config.yaml")

    def _params(self) -> dict[str, Any]:
        """The config, flat, less the settings of ``rectify`` that the chosen rule does not read."""
        read = {"rule", *RULES[self.config.rectify.rule](self.config.rectify).uses}
        flat = settings.flat(self.config)
        return {k: v for k, v in flat.items() if not k.startswith("rectify.") or k.split(".")[1] in read}

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if self.journal:
            self.journal.metrics(step, {f"train/{key}": value for key, value in metrics.items()})

    def _measure(self, step: int) -> Evaluation:
        if step == 0:
            return self.baseline.start
        reference = self.baseline.retain.measurements if self.baseline.retain else None
        config, shared = self.config, self.shared
        return evaluate(
            self.model, shared.tokenizer, shared.benchmark, config.evaluate, config.model,
            group=self.group, reference=reference,
        )  # fmt: skip

    def _evaluate(self, step: int) -> None:
        found = self._measure(step)
        ends = trade_off(found.scores, self.baseline, self.config.evaluate)
        self.scores = {**found.scores, **ends}
        if self.journal:
            folder = self.folder / "evaluations"
            folder.mkdir(exist_ok=True)
            file = folder / f"step-{step:08d}.json"
            file.write_text(json.dumps(found.to_json() | {"trade_off": ends}))
            self.journal.metrics(step, {f"eval/{key}": value for key, value in self.scores.items()})
            self.journal.artifact(file.relative_to(self.folder))
        self.report({"step": step, **ends})

    def _close(self, status: str, steps: int, error: str | None, keep_model: bool) -> Result:
        result: Result = {"status": status, "steps": steps, "scores": self.scores, "points": []}
        if error:
            result["error"] = error
        if self.journal:
            if keep_model and not error:
                self._save_model()
            result["points"] = points(self.folder)
            self.journal.tags({"gru.status": status})
            self.journal.status(status)
            part = self.folder / ".scores.json"
            part.write_text(json.dumps(result, indent=1))
            part.rename(self.folder / "scores.json")  # its presence is what makes a run finished
            self.journal.artifact("scores.json")
            self.journal.close()
        self.group.barrier()
        return result if self.lead else {}

    def _save_model(self) -> None:
        part, target = self.folder / ".model", self.folder / "model"
        shutil.rmtree(part, ignore_errors=True)
        models.save_model(unwrap(self.model), self.shared.tokenizer, part)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
