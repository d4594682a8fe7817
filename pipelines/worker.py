"""What each worker runs: one unlearning run in its folder, from the start or from its last checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gru_core import checkpoint, saving
from gru_core.benchmarks import retain_subset
from gru_core.config import RunConfig
from gru_core.errors import NonFiniteError, StorageError
from gru_core.loop import Hooks, Run
from gru_core.losses import Rows
from gru_core.metrics import Baseline, Evaluation, Progress, evaluate, relearn, trade_off
from gru_core.objectives import build_objective
from gru_core.parallel import Group, current_group, unwrap
from gru_core.placing import frozen, place
from gru_core.retain import build_retain_loss
from pipelines import alive, best, inputs, journal, provenance, search_inputs, settings, stopping
from pipelines.inputs import Shared
from pipelines.journal import Journal, points
from pipelines.keeper import Keeper
from pipelines.launch import Report, silent
from pipelines.storage import EVALUATING, Storage

Result = dict[str, Any]


@dataclass(frozen=True)
class Assignment:
    """One run, as every worker gets it.

    Attributes:
        config: resolved; ``model.path`` and ``retain_model`` name folders or hub ids.
        folder: the run folder, on storage that all workers see, or, with ``output.storage``, of each machine.
        shared: inputs, a Ray object reference to them, or None: each worker reads them itself.
        keep_model: write the final model to ``folder/model``.
        stop_in: a further folder whose stop file counts (the search's, for a trial).
    """

    config: RunConfig
    folder: Path
    shared: Any = None
    name: str = "run"
    tags: dict[str, str] | None = None
    keep_model: bool = True
    stop_in: Path | None = None


def task(assignment: Assignment, group: Group, report: Report) -> Result:
    """:func:`work` as :func:`pipelines.launch.launch` calls it."""
    shared = assignment.shared
    if shared is not None and not isinstance(shared, Shared):
        import ray

        shared = ray.get(shared)
    a = assignment
    return work(
        a.config, a.folder, shared=shared, report=report, name=a.name, tags=a.tags or {},
        keep_model=a.keep_model, group=group, stop_in=a.stop_in,
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
    stop_in: Path | None = None,
) -> Result:
    """Run, or resume, one unlearning run; called on every rank.

    ``report`` gets ``{"step", "unlearning", "retention"}`` at every evaluation, on every rank.

    Returns:
        ``{"status", "steps", "scores", "points"}``, the same that ``folder/scores.json`` holds. A run that met
        a non-finite value ends with status ``non_finite`` and an ``error`` that says where. One that was asked to
        stop has status ``stopped``, a checkpoint and no ``scores.json``.

    Raises:
        StorageError: the disk is full, or shared storage is away; names the last whole checkpoint.
    """
    group = group or current_group()
    keeper = Keeper(config.output.storage, folder, group)
    keeper.fetch()
    folder = keeper.folder
    done, baseline = _found(folder, group)
    if done is not None:
        keeper.close()
        return done
    shared = shared or inputs.load(config)
    baseline = shared.baseline or baseline
    if baseline is None:
        kept = search_inputs.kept(config, shared.benchmark, group, folder)
        baseline = inputs.measure_baseline(config, shared, group, kept)
        trade_off(baseline.start.scores, baseline, config.evaluate)  # nothing to forget is bad input, too
    try:
        stop = stopping.polled(folder, stop_in, storage=_stop_storage(config, name, stop_in, group))
        return _Work(config, keeper, shared, baseline, report, group).go(name, tags or {}, keep_model, stop)
    except StorageError as error:
        raise checkpoint.named(error, folder / "checkpoints") from error
    except OSError as error:
        raise checkpoint.named(StorageError(f"{folder} cannot be written: {error}"), folder / "checkpoints") from error


def _stop_storage(config: RunConfig, name: str, stop_in: Path | None, group: Group) -> Storage | None:
    """Where rank 0 looks for a request to stop, too: the machines share no folder. A trial looks in its search's."""
    uri = config.output.storage
    if uri is None or group.rank:
        return None
    return Storage(uri if stop_in is None else uri.replace(f"/trials/{name}", "", 1))


def _found(folder: Path, group: Group) -> tuple[Result | None, Baseline | None]:
    """Result and baseline that stand in the folder, as rank 0 sees them: a network file system may show a file to
    one node before another, and ranks that disagree would wait for each other for ever."""
    mine = (finished(folder), inputs.read_baseline(folder / "baseline.json")) if group.rank == 0 else (None, None)
    return group.gather(mine)[0]


class _Work:
    """The hooks of one run, and what they share."""

    def __init__(
        self, config: RunConfig, keeper: Keeper, shared: Shared, baseline: Baseline, report: Report, group: Group
    ) -> None:
        self.config, self.folder, self.shared = inputs.without_secrets(config), keeper.folder, shared
        self.keeper = keeper
        self.baseline, self.report, self.group = baseline, report, group
        self.lead = group.rank == 0
        self.scores: dict[str, float] = {}
        self.best = best.Best(config.evaluate.best, self.folder, group)
        start = shared.start(config.model)
        self.model: nn.Module = place(start, config.model, config.train, group)
        compares = build_retain_loss(config.retain.loss).needs_frozen
        self.frozen = frozen(self.model, start, config.model, config.train, group) if compares else None
        alive.follow(unwrap(self.model))
        self.journal: Journal | None = None

    def go(self, name: str, tags: dict[str, str], keep_model: bool, stop: Callable[[], bool]) -> Result:
        if self.lead:
            self._open(name, tags)
        self.mark = str(self.group.gather((journal.head(self.folder) or {}).get("key") if self.lead else None)[0])
        self.group.barrier()
        config, shared = self.config, self.shared
        subset = retain_subset(shared.benchmark, config.retain, config.train.seed)
        run = Run(
            self.model,
            config,
            build_objective(config.unlearn),
            Rows(inputs.flat(shared.forget)),
            Rows(inputs.flat(shared.retain[i] for i in subset)),
            self.group,
            Hooks(log=self._log, evaluate=self._evaluate, stop=stop, saved=self.keeper.saved),
            self.folder / "checkpoints",
            self.frozen,
        )
        self._tell(run)
        try:
            outcome = run()
            status, steps, error = str(outcome.status), outcome.steps, None
        except NonFiniteError as caught:  # the same on every rank: losses are reduced, gradients averaged
            status, steps, error = "non_finite", caught.step - 1, str(caught)
        if status == "stopped":
            return self._stopped(steps)
        if error or not self.scores:  # also after a restart behind the last evaluation
            self._evaluate(steps, True)
        return self._close(status, steps, error, keep_model)

    def _open(self, name: str, tags: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(settings.to_yaml(self.config))
        inputs.store_baseline(self.baseline, self.folder / "baseline.json")
        self.journal = Journal(self.folder)
        scored = {"gru.include_scored": str(self.config.retain.include_scored).lower()}
        about = provenance.inputs(unwrap(self.model), self.shared.benchmark, self.config)
        self.journal.run(name, {"gru.benchmark": self.shared.benchmark.name} | scored | about | tags)
        self.journal.params(provenance.params(self.config))
        self.journal.artifact("config.yaml")
        for line in self.keeper.notes:
            self.journal.note(line)
        self.keeper.store("config.yaml", "baseline.json")

    def _tell(self, run: Run) -> None:
        """Notes what happened before this start, where the run had begun already."""
        if self.journal is None:
            return
        for line in run.damaged:
            self.journal.note(line)
        for rank in alive.hung(self.keeper.home):
            self.journal.note(f"worker {rank} made no progress for {self.config.train.hang_timeout:g} s and was ended")
        if self.journal.continued:
            workers = f" with {self.group.size} workers" if self.group.size > 1 else ""
            self.journal.note(f"started again{workers}, from step {run.start} on")

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if self.journal:
            self.journal.metrics(step, {f"train/{key}": value for key, value in metrics.items()})
            self.keeper.tick()

    def _measure(self, progress: Progress, last: bool) -> Evaluation:
        reference = self.baseline.retain.measurements if self.baseline.retain else None
        config, shared = self.config, self.shared
        return evaluate(
            self.model, shared.tokenizer, shared.benchmark, config.evaluate, config.model,
            group=self.group, reference=reference, final=last, progress=progress,
        )  # fmt: skip

    def _evaluate(self, step: int, last: bool) -> None:
        # a step is the same model whenever it is reached, but for rounding on GPUs or with other workers
        progress = Progress(self.folder / EVALUATING, f"{self.mark} step {step}", self.group)
        begins = step == 0 and self.config.evaluate.start is None
        found = self.baseline.start if begins else self._measure(progress, last)
        ends = trade_off(found.scores, self.baseline, self.config.evaluate)
        self.scores = {**found.scores, **ends}
        if self.journal:
            folder = self.folder / "evaluations"
            folder.mkdir(exist_ok=True)
            file = folder / f"step-{step:08d}.json"
            file.write_text(json.dumps(found.to_json() | {"trade_off": ends}))
            self.journal.metrics(step, {f"eval/{key}": value for key, value in self.scores.items()})
            if last:  # one curve a run, over steps of relearning
                for after, values in relearn.curves(found.scores).items():
                    self.journal.metrics(after, values)
            self.journal.artifact(file.relative_to(self.folder))
            if step == 0 and self.baseline.retain:
                self.journal.metrics(0, {f"retain_model/{k}": v for k, v in self.baseline.retain.scores.items()})
            self.keeper.store(file.relative_to(self.folder).as_posix())
        progress.drop()
        if self.best.takes(step, ends):
            self._save(best.MODEL)
            if self.lead:
                self.best.store()
                self.keeper.store(best.NAME)
        self.report({"step": step, **ends})

    def _stopped(self, steps: int) -> Result:
        """Leaves the run as one that goes on."""
        if self.journal:
            self.journal.status("stopped")
            self.keeper.store()
            self.journal.close()
        self.group.barrier()
        self.keeper.close()
        return {"status": "stopped", "steps": steps, "scores": self.scores, "points": []} if self.lead else {}

    def _close(self, status: str, steps: int, error: str | None, keep_model: bool) -> Result:
        result: Result = {"status": status, "steps": steps, "scores": self.scores, "points": []}
        if self.best.rule is not None:
            result["best"] = self.best.found
        if error:
            result["error"] = error
        if keep_model and not error:
            self._save_model()
        if self.journal:
            result["points"] = points(self.folder)
            self.journal.tags({"gru.status": status} | self.best.tags())
            self.journal.status(status)
            self.keeper.store()
            part = self.folder / ".scores.json"
            part.write_text(json.dumps(result, indent=1))
            part.rename(self.folder / "scores.json")  # its presence is what makes a run finished
            self.journal.artifact("scores.json")
            self.keeper.store("scores.json")
            self.journal.close()
        self.group.barrier()
        self.keeper.close()
        return result if self.lead else {}

    def _save(self, name: str) -> Path:
        """The model as it stands, as a folder: whole, or the adapter."""
        saving.save(self.model, self.shared.tokenizer, self.config.model.path, self.folder / name, self.group)
        if self.lead:
            self.keeper.store_folder(name)
        return self.folder / name

    def _save_model(self) -> None:
        """The final model and, where asked for, what its adapter is merged into."""
        config, target = self.config, self._save("model")
        if self.lead and config.output.merged:
            saving.save_merged(target, self.shared.tokenizer, config.model, self.folder / "merged")
            self.keeper.store_folder("merged")
