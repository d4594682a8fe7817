"""Steps with callbacks: log, evaluate, save, stop. What a run does, without where it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from gru_core import checkpoint
from gru_core.config import RunConfig
from gru_core.errors import StorageError
from gru_core.losses import Frozen, Losses, Rows, reference_losses
from gru_core.models import set_dropout
from gru_core.objectives import Objective
from gru_core.parallel import Group, unwrap
from gru_core.step import Step

Status = Literal["finished", "collapsed", "stopped"]


@dataclass(frozen=True)
class Hooks:
    """What the surroundings do with a run. All are called on every rank, at the same steps.

    Attributes:
        log: ``(step, metrics)`` after every step, counted from 1.
        evaluate: ``(step, last)``: measure the model as it stands; must leave training state alone. ``last``: the run
            ends here.
        stop: whether to end after the step at hand, with a checkpoint; asked on every rank, one is enough.
        saved: ``(folder)``: all ranks have written a checkpoint there.
    """

    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    evaluate: Callable[[int, bool], None] = lambda step, last: None
    stop: Callable[[], bool] = lambda: False
    saved: Callable[[Path], None] = lambda folder: None


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its status and the number of steps taken."""

    status: Status
    steps: int


class Run:
    """One unlearning run: build, resume, go.

    Args:
        model: plain, DDP-wrapped or sharded, on the group's device, with the starting weights.
        folder: where checkpoints live; None: none are written.
        frozen: the starting model, where the retain loss compares with it.

    Attributes:
        damaged: rank 0: a line for each checkpoint that was passed over.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        objective: Objective,
        forget: Rows,
        retain: Rows,
        group: Group,
        hooks: Hooks,
        folder: Path | None = None,
        frozen: Frozen | None = None,
    ) -> None:
        self.config, self.group, self.hooks, self.folder = config, group, hooks, folder
        self.damaged: list[str] = []
        found = self._found()
        set_dropout(unwrap(model), False)  # the reference is the model itself, not a draw of it
        if objective.needs_reference and found is None:
            losses = Losses(model, config.model, group, config.train.micro_batch)
            forget = Rows(forget.rows, reference_losses(losses, forget, group))
        set_dropout(unwrap(model), config.unlearn.dropout)
        self.step = Step(model, config, objective, forget, retain, group, frozen)
        self.start = 0
        self._ended = False
        self._probe_start: float | None = None
        if found is not None:
            self._resume(found)

    def _found(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint as rank 0 sees it: on shared storage others may still see an older one."""
        if self.folder is None:
            return None
        mine = checkpoint.latest(self.folder, self.damaged) if self.group.rank == 0 else None
        name = self.group.gather(mine.folder.name if mine else None)[0]
        if name is None:
            return None
        found = checkpoint.read(self.folder / name, verify=False)
        if not all(self.group.gather(found is not None)):  # else this rank would begin at 0, and the others go on
            raise StorageError(f"checkpoint {self.folder / name} is not seen whole by every worker: do they share it?")
        return found

    def _resume(self, found: checkpoint.Checkpoint) -> None:
        step = self.step
        momentum, reference = checkpoint.load(found, step.model, step.optimizer, self.group)
        step.restore(found.state, momentum)
        step.forget = Rows(step.forget.rows, reference)
        self.start = found.step
        self._probe_start = found.state["probe_start"]
        self._ended = found.state["collapsed"]

    def __call__(self) -> Outcome:
        """Run to the end, from the last checkpoint where there is one.

        Raises:
            NonFiniteError: a loss or Gram matrix was not finite.
            StorageError: a checkpoint could not be written.
        """
        settings = self.config.unlearn
        if self._ended:  # killed between its last checkpoint and its result
            return Outcome("collapsed", self.start)
        if self.start == 0:
            self.hooks.evaluate(0, False)
            self._probe_start = self._probe()
        for number in range(self.start, settings.steps):
            done = number + 1
            metrics = self.step(number, self.hooks.stop())
            due = done % settings.evaluate_every == 0
            if due and not self.step.reads_retain and self.step.retain.rows:
                metrics["retain_loss"] = self._probe() or 0.0
            collapsed = self._collapsed(metrics)
            self.hooks.log(done, metrics)
            last = collapsed or done == settings.steps
            if last or due:
                self.hooks.evaluate(done, last)
            if last or self.step.stop or done % self.config.train.checkpoint_every == 0:
                self._save(done, collapsed)
            if collapsed:
                return Outcome("collapsed", done)
            if self.step.stop and not last:
                return Outcome("stopped", done)
        return Outcome("finished", settings.steps)

    def _probe(self) -> float | None:
        if self.step.reads_retain or not self.step.retain.rows:
            return None
        model = unwrap(self.step.model)
        set_dropout(model, False)
        loss = self.step.probe()
        set_dropout(model, self.config.unlearn.dropout)
        return loss

    def _collapsed(self, metrics: dict[str, float]) -> bool:
        """Whether the retain loss has left a multiple of its start (of 1 nat, where it started below)."""
        start = self.step.drift.start if self.step.reads_retain else self._probe_start
        loss = metrics.get("retain_loss")
        if start is None or loss is None:
            return False
        return loss > self.config.unlearn.collapse * max(1.0, start)

    def _save(self, done: int, collapsed: bool) -> None:
        if self.folder is None:
            return
        step = self.step
        state = step.state() | {"probe_start": self._probe_start, "collapsed": collapsed}
        reference = step.forget.reference
        saved = checkpoint.save(
            self.folder, done, step.model, step.optimizer, step.momentum, state, reference, self.group
        )
        self.hooks.saved(saved)
