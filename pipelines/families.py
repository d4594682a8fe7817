"""A Ray Tune searcher that asks one sampler per family, in turn.

An adaptive sampler shared by all families would chase whichever leads; with one each, and the same number of
trials, families can be compared. Every draw has a random stream of its own, made from seed, family and number:
what a sampler suggests depends on the results it was told and on nothing else, so that a search continued from
its ledger goes on as the one that was cut off would have.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.tune.search import Searcher

from pipelines import selection
from pipelines.ledger import Entry, Ledger
from pipelines.space import Family, decode, distributions, encode

End = Callable[[Entry], None]
TRIES = 20
"""Draws before a setting that the family has had already is taken all the same."""


class Sampler:
    """One family's settings, one after the other.

    Args:
        kind: ``optuna`` (TPE, for one or two objectives), ``random`` or ``grid``.
        metrics: scores that are maximised.
    """

    def __init__(self, family: Family, kind: str, seed: int, metrics: Sequence[str]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.family, self.kind, self.seed, self.metrics = family, kind, seed, tuple(metrics)
        self._study = optuna.create_study(directions=["maximize"] * len(self.metrics))
        self._space = distributions(family.space)
        self._trials: list[Any] = []
        self._had: set[str] = set()

    @property
    def asked(self) -> int:
        """How many settings were drawn."""
        return len(self._trials)

    def ask(self) -> dict[str, Any]:
        """The next setting: dotted keys to values."""
        if self.family.grid is not None:
            return self.adopt(self.family.grid[self.asked])
        import optuna

        for attempt in range(TRIES):
            self._study.sampler = self._sampler(attempt)
            trial = self._study.ask(self._space)
            params = decode(self.family.space, trial.params)
            if _spelling(params) not in self._had or attempt == TRIES - 1:
                break
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return self._keep(trial, params)

    def adopt(self, params: dict[str, Any]) -> dict[str, Any]:
        """Takes a setting as if it had just been drawn: from a grid, or from a ledger."""
        self._study.enqueue_trial(encode(self.family.space, params))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a float that a step does not reach exactly is what was run
            return self._keep(self._study.ask(self._space), params)

    def _keep(self, trial: Any, params: dict[str, Any]) -> dict[str, Any]:
        self._had.add(_spelling(params))
        self._trials.append(trial)
        return params

    def tell(self, number: int, result: Mapping[str, Any] | None) -> None:
        """What became of the setting with this number, from 0; None: it failed."""
        import optuna

        if result is None:
            self._study.tell(self._trials[number], state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(self._trials[number], [float(result[name]) for name in self.metrics])

    def _sampler(self, attempt: int) -> Any:
        import numpy as np
        import optuna

        key = [self.seed, zlib.crc32(self.family.name.encode()), self.asked, attempt]
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        if self.kind == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        # Optuna's own ten random draws would be most of a small family's share.
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(4, self.family.trials // 3)))


def _spelling(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


class Families(Searcher):
    """Suggests ``{"id", "family", "settings"}``; keeps the ledger; continues what stands in it.

    A trial of the ledger that has no result yet comes first, under its old id and with its old settings.

    Args:
        ended: called with the ledger's entry whenever a trial is over.
        cause: what a failed trial died of, by its id.
        stop: whether no further trial is to start.
    """

    def __init__(
        self,
        families: Sequence[Family],
        samplers: Mapping[str, Sampler],
        ledger: Ledger,
        *,
        ended: End = lambda entry: None,
        cause: Callable[[str], str] = lambda name: "unknown",
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self._stop = stop
        self._families = {family.name: family for family in families}
        self._samplers, self._ledger, self._ended, self._cause = samplers, ledger, ended, cause
        self._params: dict[str, dict[str, Any]] = {}
        self._names: dict[str, str] = {}
        order = selection.order({family.name: family.trials for family in families})
        self._again, asked = _replay(ledger.entries, samplers, self._params)
        self._next = order[asked:]

    @property
    def left(self) -> int:
        """Trials that are still to be suggested."""
        return len(self._again) + len(self._next)

    def suggest(self, trial_id: str) -> Any:
        if self._stop():
            return Searcher.FINISHED
        if self._again:
            name = self._again.pop(0)
            family = family_of(name)
        elif self._next:
            family = self._next.pop(0)
            sampler = self._samplers[family]
            name = f"{family}-{sampler.asked:03d}"
            self._params[name] = sampler.ask()
            self._ledger.ask(name, family, self._params[name])
        else:
            return Searcher.FINISHED
        self._names[trial_id] = name
        params = self._params[name]
        return {"id": name, "family": family, "params": params, "settings": {**self._families[family].fixed, **params}}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        name = self._names[trial_id]
        done = result if result and not error and result.get("status") in selection.RESULTS else None
        if done is not None:
            numbers = {key: done[key] for key in ("step", "unlearning", "retention", "seconds")}
            extra = {"error": done["error"]} if "error" in done else {}
            entry = self._ledger.end(name, done["status"], **numbers, **extra)
        elif error or (result and result.get("status") == "failed"):
            reason = (result or {}).get("error") or self._cause(name)
            entry = self._ledger.end(name, "failed", error=reason)
        else:
            return  # stopped before its end: a resumed search takes it up again
        self._samplers[family_of(name)].tell(number_of(name), done)
        self._ended(entry | {"params": self._params[name]})

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its arguments for a restore of its own, which is never used

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is continued from its ledger, by building the searcher again")


def family_of(name: str) -> str:
    """The family of a trial's id."""
    return name.rpartition("-")[0]


def number_of(name: str) -> int:
    """A trial's number within its family, from 0."""
    return int(name.rpartition("-")[2])


def _replay(
    entries: Sequence[Entry], samplers: Mapping[str, Sampler], params: dict[str, dict[str, Any]]
) -> tuple[list[str], int]:
    """Tells the samplers all that a ledger holds, in its order.

    Returns:
        Trials to run (again), and how many were asked for.
    """
    for entry in entries:
        name = entry["id"]
        if entry["kind"] == "ask":
            params[name] = samplers[entry["family"]].adopt(entry["params"])
        elif entry["status"] in selection.RESULTS:
            samplers[family_of(name)].tell(number_of(name), entry)
    return selection.unfinished(entries), len(params)
