"""``gru search``: many runs under Ray Tune, and the frontier between forgetting and retention.

Reads like a script: check everything, start Ray, load the inputs once, run the trials, draw the frontier.
"""

from __future__ import annotations

import fcntl
import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gru_core.config import RunConfig
from gru_core.errors import InputError
from pipelines import (
    capacity,
    journal,
    output,
    prepare,
    provenance,
    search_inputs,
    selection,
    settings,
    space,
    tracking,
    trial,
)
from pipelines.console import verbose
from pipelines.courier import Courier
from pipelines.ledger import NAME as LEDGER
from pipelines.ledger import Entry, Ledger
from pipelines.space import Family

Say = Callable[[str], None]

FREE = ("output.", "track.", "train.max_failures", "search.concurrent")
"""Settings that may differ when a search is resumed: they change no result."""


def run(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    say: Say,
    work: trial.Work = trial.work,
    load: search_inputs.Load = search_inputs.load,
) -> dict[str, Any]:
    """Checks, trials, frontier.

    Args:
        work: what a trial does; runs in the trial's process.
        load: reads what trials share; runs once, as a Ray task.

    Returns:
        The document of :func:`pipelines.frontier.build`, with ``trials`` (how many ended how) and ``seconds``.

    Raises:
        InputError: bad input, or more than the cluster has; nothing was written.
        RuntimeError: every trial failed.
        KeyboardInterrupt: stopped before its end; ``resume`` goes on.
    """
    began = time.monotonic()
    uri, families = _check(config, overwrite, resume, say)
    threading.Thread(target=importlib.import_module, args=("mlflow",), daemon=True).start()  # while Ray starts
    folder = Path(config.output.dir)
    if not (resume and _complete(folder, families)):
        with _ray(config, say) as gpus:
            ready = prepare.resolve(config, say=say)
            shared = search_inputs.put(ready, families, gpus, load, say)
            folder = output.claim(folder, overwrite=overwrite, resume=resume)
            study = trial.Study(ready, folder, shared, gpus, work)
            with _alone(folder), _record(config, ready, folder), Courier(uri, config.track.experiment, folder, say=say):
                _trials(study, families, say)
    return _document(folder, families, began, say)


# ------------------------------------------------------------------------------------------------- checks


def _check(config: RunConfig, overwrite: bool, resume: bool, say: Say) -> tuple[str, list[Family]]:
    """All that can be told without Ray and without weights; writes nothing."""
    from pipelines import unlearn

    unlearn.check_inputs(config)
    families = space.families(config, say)
    for family in families:
        _check_family(config, family)
    uri = tracking.resolve_uri(config.track)
    tracking.check(uri)
    folder = output.examine(Path(config.output.dir), overwrite=overwrite, resume=resume)
    if resume:
        _same_config(config, folder)
    return uri, families


def _check_family(config: RunConfig, family: Family) -> None:
    """Builds a family's rule and objective, to hear what they refuse."""
    from gru_core.objectives import build_objective
    from gru_core.rectify import build_rule

    first = {key: space.extremes(family, key, config)[0] for key in family.space}
    try:
        one = space.trial_config(config, {**family.fixed, **first}, config.output.dir)
        build_rule(one.rectify)
        build_objective(one.unlearn)
    except InputError as error:
        raise InputError(f"search.families.{family.name}: {error}") from None


def _same_config(config: RunConfig, folder: Path) -> None:
    """A resumed search is the search that was started: anything else would be two searches under one name."""
    file = folder / "request.yaml"
    if not file.exists():
        raise InputError(f"--resume: {folder} holds no search (no request.yaml)")
    before, now = settings.flat(settings.load(str(file))), settings.flat(config)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key) and not key.startswith(FREE)]
    if changed:
        shown = ", ".join(f"{key} (was {before.get(key)!r}, now {now.get(key)!r})" for key in changed[:3])
        raise InputError(f"--resume: the search in {folder} was started with other settings: {shown}")


def _complete(folder: Path, families: Sequence[Family]) -> bool:
    """Whether every trial has its result already."""
    entries, _ = journal.read(folder / LEDGER)
    done = [end for end in selection.outcomes(entries).values() if end["status"] in selection.RESULTS]
    return len(done) == sum(family.trials for family in families)


# ---------------------------------------------------------------------------------------------------- Ray


@contextmanager
def _ray(config: RunConfig, say: Say) -> Iterator[float]:
    """Ray with room for one trial at least; gives the GPUs of each worker. Ends what it started."""
    import ray

    from pipelines import ray_start

    if not verbose():  # after the import, which sets levels of its own
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # "Trials did not complete": we say which
    ours = not ray.is_initialized()
    try:
        gpus = ray_start.connect(config.train, say)
        yield gpus
    finally:
        if ours:
            ray.shutdown()


# ------------------------------------------------------------------------------------------------- trials


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the search folder: two drivers on one search would write over each other."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is running the search in {folder}") from None
        yield


@contextmanager
def _record(config: RunConfig, ready: RunConfig, folder: Path) -> Iterator[None]:
    """The parent's files and journal: opened as a search, closed with how it ended."""
    (folder / "request.yaml").write_text(settings.to_yaml(config))
    (folder / "config.yaml").write_text(settings.to_yaml(ready))
    with journal.Journal(folder) as record:
        record.run(folder.name, {"gru.kind": "search", **provenance.tags()})
        record.params(settings.flat(ready))
        record.artifact("config.yaml")
        try:
            yield
        except BaseException as error:
            with suppress(Exception):  # a full disk must not hide what went wrong first
                record.status("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        record.status("finished")


def _trials(study: trial.Study, families: Sequence[Family], say: Say) -> None:
    """Runs every trial that has no result yet.

    Raises:
        RuntimeError: all failed.
        KeyboardInterrupt: interrupted before the last one.
    """
    from pipelines.families import Families, Sampler

    config, train = study.config, study.config.train
    ledger = Ledger(study.folder)
    search = config.search
    samplers = {f.name: Sampler(f, search.sampler, train.seed, search.metrics) for f in families}
    total = sum(family.trials for family in families)
    searcher = Families(
        families, samplers, ledger,
        ended=lambda entry: _ended(study, entry, ledger, total, say),
        cause=lambda name: trial.cause(study.folder / "trials" / name),
    )  # fmt: skip
    at_a_time = min(capacity.concurrency(train, study.gpus, search.concurrent, capacity.nodes()), searcher.left)
    shares = ", ".join(f"{family.trials} {family.name}" for family in families)
    say(f"search in {study.folder}: {total} trials ({shares}), {searcher.left} to run, {at_a_time} at a time")
    _tune(study, searcher, at_a_time)
    ends = selection.outcomes(ledger.entries)
    if searcher.left or len(ends) < total:
        say(f"stopped with {len(ends)} of {total} trials done; --resume goes on")
        for name in selection.unfinished(ledger.entries):
            if name not in ends:
                _mark(study.folder / "trials" / name, name, "stopped")
        raise KeyboardInterrupt
    if all(end["status"] == "failed" for end in ends.values()):
        raise RuntimeError(f"all {total} trials failed; the first: {selection.first_failure(ends.values())}")


def _tune(study: trial.Study, searcher: Any, at_a_time: int) -> None:
    from ray import tune

    train = study.config.train
    trainable = tune.with_parameters(trial.run, study=study)
    tuner = tune.Tuner(
        tune.with_resources(trainable, trial.resources(train, study.gpus)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=searcher.left,
            max_concurrent_trials=at_a_time,
            reuse_actors=train.workers == 0,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(study.folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=train.max_failures),
        ),
    )
    tuner.fit()


def _trial_name(tuned: Any) -> str:
    return str(tuned.config["id"])


def _ended(study: trial.Study, entry: Entry, ledger: Ledger, total: int, say: Say) -> None:
    """A trial is over: say so, and let the journal of one that died say it too."""
    say(f"[{len(selection.outcomes(ledger.entries))}/{total}] {selection.line(entry)}")
    if entry["status"] == "failed":
        _mark(study.folder / "trials" / entry["id"], entry["id"], "failed")


def _mark(folder: Path, name: str, status: str) -> None:
    """The last word in the journal of a trial whose process could not give it."""
    with journal.Journal(folder) as record:
        family = name.rpartition("-")[0]
        record.run(name, {"gru.kind": "trial", "gru.family": family, "gru.trial": name})
        record.status(status)


# ---------------------------------------------------------------------------------------------------- end


def _document(folder: Path, families: Sequence[Family], began: float, say: Say) -> dict[str, Any]:
    from pipelines import frontier

    entries, _ = journal.read(folder / LEDGER)
    ends: Mapping[str, Any] = selection.outcomes(entries)
    numbers = selection.counts(ends.values())
    if numbers["failed"]:
        say(
            f"{numbers['failed']} trial(s) failed (--resume tries them again): {selection.first_failure(ends.values())}"
        )
    document = frontier.build(str(folder), say=say)
    return {**document, "trials": numbers, "seconds": round(time.monotonic() - began, 1)}
