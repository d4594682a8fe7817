"""``gru evaluate``: a model's scores on a benchmark, or those of a published log, as files and as a tracked run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gru_core import metrics, models
from gru_core.benchmarks import load_benchmark
from gru_core.benchmarks.base import Benchmark
from gru_core.config import EvaluateConfig, RunConfig
from gru_core.metrics import METRICS, Evaluation, published, relearn
from gru_core.parallel import Group
from gru_core.placing import place_frozen
from pipelines import alive, identity, output, prepare, provenance, ray_start, search_inputs, settings, tracking
from pipelines.courier import Courier
from pipelines.inputs import absolute, without_secrets
from pipelines.journal import Journal
from pipelines.launch import Report, launch
from pipelines.storage import EVALUATING

Say = Callable[[str], None]
SUMMARY, ROWS, RETAIN_ROWS = "summary.json", "rows.jsonl", "retain_rows.jsonl"


@dataclass(frozen=True)
class Job:
    """What every worker gets.

    Attributes:
        texts: whether generated texts are kept.
        folder: where what is measured is kept until all is.
    """

    config: RunConfig
    texts: bool
    folder: Path


def run(
    config: RunConfig, names: Sequence[str] | None, *, with_text: bool, track: bool, overwrite: bool = False,
    resume: bool = False, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Score ``config.model.path``, and ``config.retain_model`` where there is one, on ``config.benchmark``.

    Args:
        names: metrics; None: all that the benchmark has the rows for, the others said.
        with_text: prompts, answers and generations go into the row files.
        track: record a run in MLflow, in ``config.track.experiment``.
        resume: go on with the rows that an interrupted evaluation left.

    Returns:
        ``{"model", "benchmark", "scores", "retain_scores", "notes", "rows", "folder"}``, as ``summary.json``.

    Raises:
        InputError: bad input; nothing was written.
    """
    settings.check(config)
    for path, what in ((config.model.path, "MODEL"), (config.retain_model, "--retain-model")):
        if path is not None and path != "prepared":
            models.check_model(path, what, config.model.tokenizer)
    benchmark = load_benchmark(config.benchmark)
    chosen, notes = _metrics(config, names, benchmark)
    config = replace(absolute(config), evaluate=chosen)
    with _folder(config, track, overwrite, resume, say) as (folder, tracked):
        config = prepare.resolve(config, say=say)
        gpus = ray_start.connect(config.train, say) if config.train.workers else ray_start.local_gpus(config.train)
        say(f"evaluating {config.model.path} on {benchmark.name}: {len(chosen.metrics)} metrics")
        found, retain = launch(
            _task, Job(config, with_text, folder / EVALUATING), config.train, folder, name="evaluate", gpus=gpus
        )
        summary = {
            "model": config.model.path, "retain_model": config.retain_model, "benchmark": benchmark.name,
            "scores": _kept(found, names), "retain_scores": _kept(retain, names) if retain else None,
            "notes": [*notes, *found.notes],
            "rows": {name: len(rows) for name, rows in found.measurements.sets.items()},
            "settings": asdict(chosen), "versions": provenance.tags(),
        }  # fmt: skip
        texts = benchmark if with_text else None
        _write_rows(folder / ROWS, found, texts)
        if retain:
            _write_rows(folder / RETAIN_ROWS, retain, texts)
        closed = _close(folder, summary, config, tracked)
        shutil.rmtree(folder / EVALUATING, ignore_errors=True)
        return closed


def from_log(
    log: str, retain_log: str | None, start_log: str | None, config: RunConfig, *, track: bool, overwrite: bool,
    say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Every aggregate of a published per-sample log, computed again from its rows.

    Args:
        retain_log: of the model trained without the forget set.
        start_log: of the model before unlearning: the scores then include ``unlearning`` and ``retention``.

    Returns:
        ``{"log", "source", "scores", "notes", "rows", "folder"}``.

    Raises:
        InputError: a log that cannot be read, or that does not belong to the others.
    """
    found = published.read(log)
    retain = published.read(retain_log) if retain_log else None
    scores, notes = published.aggregates(found, retain)
    if start_log is not None:
        start, _ = published.aggregates(published.read(start_log), retain)
        end = published.aggregates(retain)[0] if retain else None
        scores |= _trade_off(scores, start, end, config.evaluate)
    with _folder(config, track, overwrite, False, say) as (folder, tracked):
        summary = {
            "log": log, "source": found.source, "scores": scores, "notes": notes,
            "rows": {name: len(rows) for name, rows in found.sets.items()}, "versions": provenance.tags(),
        }  # fmt: skip
        return _close(folder, summary, config, tracked)


def _trade_off(
    scores: Mapping[str, float], start: Mapping[str, float], retain: Mapping[str, float] | None, config: EvaluateConfig
) -> dict[str, float]:
    nothing = metrics.Measurements({})
    end = Evaluation(dict(retain), nothing) if retain else None
    return metrics.trade_off(scores, metrics.Baseline(Evaluation(dict(start), nothing), end), config)


# ------------------------------------------------------------------------------------------------ measuring


def _metrics(
    config: RunConfig, names: Sequence[str] | None, benchmark: Benchmark
) -> tuple[EvaluateConfig, tuple[str, ...]]:
    """What is evaluated, and what is left out and why."""
    has_retain, asked = config.retain_model is not None, config.evaluate
    able, left = metrics.available(benchmark, has_retain, asked)
    if names is None:  # metrics that work on the model itself only where the config names them
        of_model = [n for n in metrics.requested(asked) if isinstance(metrics.find(n), metrics.ModelMetric)]
        able = tuple(dict.fromkeys((*able, *of_model)))
    else:
        able, left = tuple(names), ()
    for name in able:
        metrics.check_metric(name, asked, has_retain, benchmark)
    if config.train.strategy == "fsdp" and names is None and "mia_gradnorm" in able:
        able = tuple(name for name in able if name != "mia_gradnorm")
        left = (*left, "mia_gradnorm: left out, it needs whole gradients (train.strategy ddp)")
    if not any(name in metrics.MODEL_METRICS for name in able):  # which look at the two of the trade-off
        # they are not asked for otherwise; these are measured wherever there are rows at all
        asked = replace(asked, unlearning="forget_probability", retention="retain_probability")
    return replace(asked, metrics=able, final=()), left


def _kept(found: Evaluation, names: Sequence[str] | None) -> dict[str, float]:
    """The scores that were asked for, with what is derived from them."""
    if names is None:
        return found.scores
    extra = {e for name in names if name in METRICS for e in METRICS[name].derived}
    return {n: score for n, score in found.scores.items() if n in {*names, *extra} or n.split("/")[0] in names}


def _task(job: Job, group: Group, report: Report) -> tuple[Evaluation, Evaluation | None]:
    """On every worker: the retain model first, the model beside its measurements."""
    config = job.config
    benchmark = load_benchmark(config.benchmark)
    retain: Evaluation | None = None
    if config.retain_model is not None:
        retain = _score(config.retain_model, "--retain-model", job, benchmark, None, group)
    reference = retain.measurements if retain else None
    found = _score(config.model.path, "MODEL", job, benchmark, reference, group)
    if job.texts and not (job.folder.parent / "config.yaml").exists():  # a machine that does not share the folder
        shutil.rmtree(job.folder, ignore_errors=True)
    return found, retain


def _score(
    path: str, what: str, job: Job, benchmark: Benchmark, reference: metrics.Measurements | None, group: Group
) -> Evaluation:
    config = job.config
    model = place_frozen(path, config.model, config.train, group, what)
    alive.follow(model)
    tokenizer = models.tokenizer_of(path, config.model, what)
    name = "model" if what == "MODEL" else "retain"
    content = search_inputs.fingerprint(config, benchmark) if group.rank == 0 else ""
    key = str(group.gather(f"{identity.of_model(path)} {content[:16]}")[0])
    return metrics.evaluate(
        model, tokenizer, benchmark, config.evaluate, config.model, group=group, reference=reference, texts=job.texts,
        progress=metrics.Progress(job.folder / name, key, group),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ results


@contextmanager
def _folder(
    config: RunConfig, track: bool, overwrite: bool, resume: bool, say: Say
) -> Iterator[tuple[Path, Courier | None]]:
    """The output folder, ready, and what delivers its journal.

    A resumed evaluation need not be the one that was begun: what it measured of the same rows with the same model
    counts, and nothing else.
    """
    uri = tracking.resolve_uri(config.track) if track else None
    if uri is not None:
        tracking.check(uri, say=say)
    folder = output.examine(Path(config.output.dir), overwrite=overwrite, resume=resume)
    with output.hold(folder):
        courier = Courier(uri, config.track.experiment, folder, say=say) if uri is not None else None
        folder = output.claim(folder, overwrite=overwrite, resume=resume)
        (folder / "config.yaml").write_text(settings.to_yaml(without_secrets(config)))
        yield folder, courier


def _close(folder: Path, summary: dict[str, Any], config: RunConfig, courier: Courier | None) -> dict[str, Any]:
    """Writes the summary, last, and has it delivered."""
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    run_id = None
    if courier is not None:
        with courier:
            tags = {"gru.kind": "evaluation", "gru.evaluated": str(summary.get("model") or summary["log"])}
            with Journal(folder) as record:
                record.run(folder.name, tags | provenance.tags())
                record.metrics(0, {f"eval/{name}": value for name, value in summary["scores"].items()})
                for step, values in relearn.curves(summary["scores"]).items():
                    record.metrics(step, values)
                record.artifact(SUMMARY)
                record.status("finished")
        run_id = courier.run_id
    return summary | {"folder": str(folder), "run_id": run_id}


def _write_rows(file: Path, found: Evaluation, texts: Benchmark | None) -> None:
    """One JSON object a row and line: set, id, numbers; texts of the row only where they were asked for."""
    with file.open("w", encoding="utf-8") as out:
        for name, rows in found.measurements.sets.items():
            for i, row in enumerate(rows):
                line: dict[str, Any] = {"set": name, **row.to_json()}
                if texts is not None:
                    source = texts.scored[name][i]
                    line["text"] = {"prompt": source.prompt, "answer": source.answer}
                    if row.generation is not None:
                        line["text"]["generation"] = row.generation
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
