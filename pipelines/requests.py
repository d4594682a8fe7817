"""``gru requests``: several forget sets, each its own run: from the same start (scalability), or one after the other
(sustainability), as MUSE (arXiv 2407.06460, sections 3.5 and 3.6) studies them.

Reads like a script: check everything, run each request in its folder, write what they came to.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gru_core.benchmarks import Benchmark, load_benchmark
from gru_core.benchmarks.read import key
from gru_core.config import RequestsConfig, RunConfig
from gru_core.errors import ConfigError, InputError
from pipelines import (
    inputs,
    journal,
    output,
    prepare,
    provenance,
    requests_files,
    search_checks,
    search_inputs,
    settings,
    stopping,
    tracking,
    unlearn,
    worker,
)
from pipelines.courier import Courier

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """One forget set.

    Attributes:
        number: from 1.
        name: of its folder under ``requests``.
        rows: in its forget set.
    """

    number: int
    name: str
    split: str
    rows: int


@dataclass(frozen=True)
class Study:
    """The requests, and what was found out about them before anything was written.

    Attributes:
        widest: the split that prepared models are made for; None where none are asked for.
        content: names the rows and models by their content.
    """

    requests: tuple[Request, ...]
    widest: str | None
    content: str


def run(config: RunConfig, *, overwrite: bool = False, resume: bool = False, say: Say) -> dict[str, Any]:
    """Checks, requests, table.

    Returns:
        ``{"requests", "sequential", "benchmark", "points", "artifacts", "tracking_uri", "run_id"}``; a point is a
        request with its number, split, forget rows, status, steps and scores.

    Raises:
        InputError: bad input; nothing was written.
        RuntimeError: a request of a sequence met a loss that is not finite, so that it left no model.
        KeyboardInterrupt: stopped before its end; ``resume`` goes on with the request that was under way.
    """
    study = check(config)
    uri = tracking.resolve_uri(config.track)
    tracking.check(uri, say=say)
    public = inputs.without_secrets(config)
    folder = output.examine(Path(config.output.dir), overwrite=overwrite, resume=resume)
    with output.hold(folder):
        if resume:
            unlearn.same_config(public, folder, study.content)
        ready = _ready(public, study, say)
        courier = Courier(uri, config.track.experiment, folder, say=say)  # before claim: it may refuse the experiment
        output.claim(folder, overwrite=overwrite, resume=resume)
        (folder / "request.yaml").write_text(settings.to_yaml(public))
        (folder / "config.yaml").write_text(settings.to_yaml(ready))
        marks = {"gru.kind": "requests", search_checks.FINGERPRINT: study.content, **provenance.tags()}
        with courier, _record(ready, folder, marks) as record:
            points = _all(ready, study, folder, record, replace(ready, track=config.track), say)
            document: dict[str, Any] = {
                "requests": str(folder), "sequential": config.requests.sequential, "benchmark": config.benchmark.name,
                "axes": {"unlearning": config.evaluate.unlearning, "retention": config.evaluate.retention},
                "points": points,
            }  # fmt: skip
            document["artifacts"] = requests_files.write(document, folder)
            for path in document["artifacts"].values():
                record.artifact(Path(path).name)
        return document | {"tracking_uri": tracking.hide(uri), "run_id": courier.run_id}


# ------------------------------------------------------------------------------------------------- checks


def check_settings(config: RunConfig) -> None:
    """What the settings alone tell.

    Raises:
        InputError: no split, or settings under which a request cannot start where the one before ended.
    """
    if not config.requests.splits:
        raise ConfigError("requests.splits", [], "at least one value of benchmark.split")
    if config.output.storage is not None:
        allowed = "null with gru requests, which reads its requests' results from output.dir"
        raise ConfigError("output.storage", config.output.storage, allowed)
    if config.requests.sequential and config.model.lora is not None and not config.output.merged:
        raise ConfigError(
            "output.merged", False, "true with model.lora and requests.sequential: a request starts from a whole model"
        )


def check(config: RunConfig) -> Study:
    """Everything that can be told of all requests without weights; writes nothing.

    Raises:
        InputError: as :func:`check_settings`, or what :func:`pipelines.unlearn.check_inputs` says of a request.
    """
    settings.check(config)
    check_settings(config)
    benchmarks: dict[str, Benchmark] = {}
    names = []
    for number, split in enumerate(config.requests.splits, start=1):
        try:
            benchmarks[split] = load_benchmark(with_split(config, split).benchmark)
            rows = len(benchmarks[split].forget)
            unlearn.check_inputs(with_split(config, split, rows))
        except InputError as error:
            raise InputError(f"requests.splits: {split}: {error}") from None
        names.append(Request(number, f"{number:02}-{split.replace('/', '-')}", split, rows))
    prepared = "prepared" in (config.model.path, config.retain_model)
    contents = [search_inputs.fingerprint(config, benchmark) for benchmark in benchmarks.values()]
    content = hashlib.sha256("".join(contents).encode()).hexdigest()
    return Study(tuple(names), widest(benchmarks) if prepared else None, content)


def with_split(config: RunConfig, split: str, rows: int | None = None) -> RunConfig:
    """The config of a single run on ``split``, with the steps that ``requests.passes`` asks of ``rows`` rows.

    Raises:
        InputError: fewer steps than the warm-up has.
    """
    passes, steps = config.requests.passes, config.unlearn.steps
    if passes is not None and rows is not None:
        steps = math.ceil(rows * passes / config.unlearn.batch_size)
    data, training = replace(config.benchmark, split=split), replace(config.unlearn, steps=steps)
    return replace(config, benchmark=data, unlearn=training, requests=RequestsConfig())


def widest(benchmarks: Mapping[str, Benchmark]) -> str:
    """The split whose forget set contains all others': models prepared for it know, and never saw, all of them.

    Raises:
        InputError: there is none.
    """
    forget = {split: {key(row) for row in benchmark.forget} for split, benchmark in benchmarks.items()}
    everything = set().union(*forget.values())
    for split, rows in forget.items():
        if rows == everything:
            return split
    raise InputError(
        "model.path, retain_model: prepared models fit one split, and no forget set of requests.splits contains all "
        "others; name models that know, or never saw, all of them"
    )


def _ready(config: RunConfig, study: Study, say: Say) -> RunConfig:
    """The config with prepared models as folders and absolute paths."""
    if study.widest is None:
        return prepare.resolve(config, say=say)
    made = prepare.resolve(with_split(config, study.widest), say=say)
    return replace(inputs.absolute(config), model=made.model, retain_model=made.retain_model)


# ----------------------------------------------------------------------------------------------- requests


@contextmanager
def _record(config: RunConfig, folder: Path, marks: Mapping[str, str]) -> Iterator[journal.Journal]:
    """The parent's journal: opened as a study of requests, closed with how it ended."""
    with journal.Journal(folder) as record:
        record.run(folder.name, marks)
        if journal.load(folder).status is not None:
            record.status("running")
        record.params(settings.flat(config))
        record.artifact("config.yaml")
        try:
            yield record
        except BaseException as error:
            with suppress(Exception):  # a full disk must not hide what went wrong first
                record.status("stopped" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed")
            raise
        record.status("finished")


def _all(
    config: RunConfig, study: Study, folder: Path, record: journal.Journal, private: RunConfig, say: Say
) -> list[dict[str, Any]]:
    """Runs every request that has no result yet; a point for each.

    Args:
        private: ``config`` with user and password of the tracking store, which no file gets.
    """
    points, start = [], config.model.path
    for request in study.requests:
        mine = folder / "requests" / request.name
        each = _config(private, request, mine, start)
        if worker.finished(mine) is None:
            say(f"request {request.number}/{len(study.requests)}: {request.split}, {request.rows} rows to forget")
            _one(each, request, mine, say)
        else:
            say(f"request {request.number}/{len(study.requests)}: {request.split} is done already")
        result = worker.finished(mine)
        assert result is not None, "a run that returned has a result"
        if config.requests.sequential:
            if result["status"] == "non_finite":
                raise RuntimeError(f"request {request.number} ({request.split}) left no model: {result['error']}")
            start = str(mine / ("merged" if config.output.merged else "model"))
        points.append(
            {"request": request.number, "split": request.split, "forget_rows": request.rows}
            | {name: result[name] for name in ("status", "steps")}
            | result["scores"]
        )
        record.metrics(request.number, {f"eval/{name}": value for name, value in result["scores"].items()})
        if stopping.asked():  # in the last step of a request, which so had its end
            raise KeyboardInterrupt
    return points


def _config(config: RunConfig, request: Request, folder: Path, start: str) -> RunConfig:
    """The config of one request, which a single run can be made of again."""
    each = with_split(config, request.split, request.rows)
    each = replace(each, output=replace(each.output, dir=str(folder)), model=replace(each.model, path=start))
    if config.requests.sequential and start != config.model.path:
        first = config.evaluate.start or config.model.path
        each = replace(each, evaluate=replace(each.evaluate, start=first))
    return each


def _one(config: RunConfig, request: Request, folder: Path, say: Say) -> None:
    tags = {"gru.kind": "request", "gru.request": str(request.number), "gru.split": request.split}
    begun = output.is_result(folder)
    try:
        unlearn.run(config, resume=begun, say=say, tags=tags, deliver=False)
    except RuntimeError as error:
        result = worker.finished(folder)
        if result is None or result["status"] != "non_finite":
            raise
        say(f"note: {error}")
