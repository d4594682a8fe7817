"""``gru search``: many runs under Ray Tune, and the frontier between forgetting and retention.

Reads like a script: check everything, start Ray, load the inputs once, run the trials, draw the frontier.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gru_core.config import RunConfig
from gru_core.errors import InputError
from pipelines import (
    capacity,
    journal,
    mirror,
    output,
    prepare,
    provenance,
    search_checks,
    search_inputs,
    selection,
    settings,
    stopping,
    trial,
)
from pipelines.console import verbose
from pipelines.courier import Courier
from pipelines.ledger import NAME as LEDGER
from pipelines.ledger import Entry, Ledger
from pipelines.space import Family
from pipelines.stores import hide

Say = Callable[[str], None]


def run(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    say: Say,
    tags: Mapping[str, str] | None = None,
    work: trial.Work = trial.work,
    load: search_inputs.Load = search_inputs.load,
) -> dict[str, Any]:
    """Checks, trials, frontier.

    Args:
        tags: what else the search's run is marked with.
        work: what a trial does; runs in the trial's process.
        load: reads what trials share; runs once, as a Ray task.

    Returns:
        The document of :func:`pipelines.frontier.build`, with ``trials`` (how many ended how) and ``seconds``.

    Raises:
        InputError: bad input, or more than the cluster has; nothing was written.
        RuntimeError: every trial failed.
        KeyboardInterrupt: stopped before its end, by Ctrl-C at once or by SIGTERM with checkpoints; ``resume``
            goes on.
    """
    began = time.monotonic()
    uri, folder, families, inputs = search_checks.check(config, overwrite, resume, say)
    threading.Thread(target=importlib.import_module, args=("mlflow",), daemon=True).start()  # while Ray starts
    copy = mirror.Mirror(config.output.storage, folder, owned=True, say=say)
    with output.hold(folder):
        if not (resume and search_checks.complete(folder, families)):
            with _ray(config, say) as gpus:
                ready = prepare.resolve(config, say=say)
                shared = search_inputs.put(ready, families, gpus, load, say)
                output.claim(folder, overwrite=overwrite, resume=resume, storage=copy.storage)
                study = trial.Study(_public(ready), folder, shared, gpus, work)
                marks = {"gru.kind": "search", search_checks.FINGERPRINT: inputs, **provenance.tags(), **(tags or {})}
                courier = Courier(uri, config.track.experiment, folder, say=say, before=copy.poll)
                with courier, _record(config, study, marks, copy):
                    _trials(study, families, copy, say)
        document = _document(folder, families, uri, began, say)
        copy.push(journal.NAME, *(f"frontier.{kind}" for kind in document["artifacts"]))
        return document


def _public(config: RunConfig) -> RunConfig:
    """The config as it may be stored: without user name and password of the tracking store."""
    uri = config.track.uri
    return replace(config, track=replace(config.track, uri=hide(uri) if uri else uri))


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
def _record(config: RunConfig, study: trial.Study, marks: Mapping[str, str], copy: mirror.Mirror) -> Iterator[None]:
    """The parent's files and journal: opened as a search, closed with how it ended."""
    folder = study.folder
    with journal.Journal(folder) as record:  # first of all: it marks the folder as a search
        record.run(folder.name, marks)
        if journal.load(folder).status is not None:
            record.status("running")
        (folder / "request.yaml").write_text(settings.to_yaml(_public(config)))
        (folder / "config.yaml").write_text(settings.to_yaml(study.config))
        record.params(settings.flat(study.config))
        record.artifact("config.yaml")
        copy.push("request.yaml", "config.yaml", journal.NAME)
        try:
            yield
        except BaseException as error:
            with suppress(Exception):  # a full disk must not hide what went wrong first
                record.status("stopped" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed")
                copy.push(journal.NAME)
            raise
        copy.pull()  # the last records of the last trials
        record.status("finished")
        copy.push(journal.NAME)


def _trials(study: trial.Study, families: Sequence[Family], copy: mirror.Mirror, say: Say) -> None:
    """Runs every trial that has no result yet.

    Raises:
        RuntimeError: all failed.
        KeyboardInterrupt: interrupted before the last one.
    """
    from pipelines.families import Families, Sampler

    config, train = study.config, study.config.train
    ledger = Ledger(study.folder, stored=lambda: copy.push(LEDGER))
    search = config.search
    samplers = {f.name: Sampler(f, search.sampler, train.seed, search.metrics) for f in families}
    total = sum(family.trials for family in families)
    searcher = Families(
        families, samplers, ledger,
        ended=lambda entry: _ended(copy, entry, ledger, total, say),
        cause=lambda name: _cause(copy, name),
        stop=stopping.asked,
    )  # fmt: skip
    at_a_time = min(capacity.concurrency(train, study.gpus, search.concurrent, capacity.nodes()), searcher.left)
    shares = ", ".join(f"{family.trials} {family.name}" for family in families)
    kept = f", kept in {copy.storage}" if copy.storage else ""
    say(f"search in {study.folder}{kept}: {total} trials ({shares}), {searcher.left} to run, {at_a_time} at a time")
    try:
        with stopping.listening(study.folder, train.grace, say, copy.storage):
            _tune(study, searcher, at_a_time)
    finally:
        _mark_stopped(copy, ledger)
    ends = selection.outcomes(ledger.entries)
    if searcher.left or len(ends) < total:
        say(f"stopped with {len(ends)} of {total} trials done; --resume goes on")
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
            # a trial with workers restarts them itself: here once more would multiply the number
            failure_config=tune.FailureConfig(max_failures=0 if train.workers else train.max_failures),
        ),
    )
    tuner.fit()


def _trial_name(tuned: Any) -> str:
    return str(tuned.config["id"])


def _cause(copy: mirror.Mirror, name: str) -> str:
    copy.poll(0.0)
    return trial.cause(copy.folder / "trials" / name)


def _ended(copy: mirror.Mirror, entry: Entry, ledger: Ledger, total: int, say: Say) -> None:
    """A trial is over: say so, and let the journal of one that died say it too."""
    say(f"[{len(selection.outcomes(ledger.entries))}/{total}] {selection.line(entry)}")
    if entry["status"] == "failed":
        _mark(copy, entry["id"], "failed")


def _mark(copy: mirror.Mirror, name: str, status: str) -> None:
    """The last word in the journal of a trial whose process could not give it."""
    mine = f"trials/{name}"
    with copy.writing(f"{mine}/{journal.NAME}"), journal.Journal(copy.folder / mine) as record:
        family = name.rpartition("-")[0]
        record.run(name, {"gru.kind": "trial", "gru.family": family, "gru.trial": name})
        record.status(status)


def _mark_stopped(copy: mirror.Mirror, ledger: Ledger) -> None:
    """The same for trials that began and have no end: an interrupted search leaves none that seems to run."""
    copy.poll(0.0)
    for name in selection.unfinished(ledger.entries):
        mine = copy.folder / "trials" / name
        with suppress(Exception):  # a full disk must not hide what went wrong first
            kinds = ("run", "metrics", "status")
            lines = [entry for entry in journal.read(mine / journal.NAME)[0] if entry["kind"] in kinds]
            if lines and lines[-1]["kind"] != "status":
                _mark(copy, name, "stopped")


# ---------------------------------------------------------------------------------------------------- end


def _document(folder: Path, families: Sequence[Family], uri: str, began: float, say: Say) -> dict[str, Any]:
    entries, _ = journal.read(folder / LEDGER)
    ends: Mapping[str, Any] = selection.outcomes(entries)
    numbers = selection.counts(ends.values())
    if numbers["failed"]:
        failure = selection.first_failure(ends.values())
        say(f"{numbers['failed']} trial(s) failed (--resume tries them again): {failure}")
    return {**_frontier(folder, uri, say), "trials": numbers, "seconds": round(time.monotonic() - began, 1)}


def _frontier(folder: Path, uri: str, say: Say) -> dict[str, Any]:
    from pipelines import frontier

    if hide(uri) != uri:  # user and password stand in no file: they are given here
        with suppress(InputError):  # the store has gone away: the journals have it all
            return frontier.build(str(folder), tracking_uri=uri, say=say)
    return frontier.build(str(folder), say=say)
