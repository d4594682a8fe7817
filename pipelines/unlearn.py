"""The driver of one unlearning run: checks, models, workers, tracking, result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from gru_core import models
from gru_core.benchmarks import load_benchmark, retain_subset
from gru_core.config import RunConfig
from gru_core.errors import InputError, StorageError
from gru_core.metrics import check_metrics, lm_eval_tasks, trade_off
from gru_core.objectives import build_objective
from gru_core.parallel import Group, current_group
from gru_core.rectify import build_rule
from pipelines import (
    inputs,
    journal,
    mirror,
    output,
    prepare,
    provenance,
    ray_start,
    search_checks,
    search_inputs,
    settings,
    stopping,
    tracking,
    worker,
)
from pipelines.courier import Courier
from pipelines.launch import Report, launch
from pipelines.narrate import watching

Say = Callable[[str], None]


def check_inputs(config: RunConfig) -> int:
    """Everything that can be wrong with a run and can be told without weights; writes nothing.

    Returns:
        The number of retain rows that train.

    Raises:
        InputError: the first thing that is wrong.
    """
    settings.check(config)
    ray_start.check_gpus(config.train)
    build_objective(config.unlearn)
    build_rule(config.rectify)
    named = {
        "model.path": config.model.path,
        "retain_model": config.retain_model,
        "evaluate.start": config.evaluate.start,
    }
    for what, path in named.items():
        if path is not None and path != "prepared":
            models.check_model(path, what, config.model.tokenizer)
    benchmark = load_benchmark(config.benchmark)
    check_metrics(config.evaluate, config.retain_model is not None, benchmark)
    return len(retain_subset(benchmark, config.retain, config.train.seed))


def ignored(config: RunConfig) -> list[str]:
    """Settings of ``rectify`` that differ from their default and have no effect with the chosen rule."""
    uses = build_rule(config.rectify).uses
    default = type(config.rectify)()
    fields = ("strength", "ema", "cosine_clip", "retain_weight", "retain_weight_at", "repair")
    return [
        f"rectify.{name} has no effect with rule {config.rectify.rule!r}"
        for name in fields
        if name not in uses and getattr(config.rectify, name) != getattr(default, name)
    ]


def _scale(config: RunConfig) -> list[str]:
    """What the unlearning score means where nothing marks its end."""
    if config.retain_model is not None:
        return []
    name = config.evaluate.unlearning
    end = "what guessing scores (0 where there are no choices)" if name.startswith(lm_eval_tasks.PREFIX) else "0"
    return [f"no retain model: unlearning 1 means that {name} has fallen to {end}"]


def train(
    config: RunConfig,
    folder: Path,
    *,
    shared_ref: Any = None,
    in_tune: bool = False,
    name: str = "run",
    tags: dict[str, str] | None = None,
    keep_model: bool = True,
    gpus: float = 0.0,
    stop_in: Path | None = None,
) -> worker.Result:
    """One run on ``train.workers`` workers, in its folder; resumes where the folder holds a checkpoint.

    Args:
        shared_ref: inputs, a Ray object reference to them, or None: each worker reads them itself.
        gpus: GPUs of each worker; 0: the CPU.

    Returns:
        As :func:`pipelines.worker.work`.
    """
    assignment = worker.Assignment(config, folder, shared_ref, name, tags, keep_model, stop_in)
    return launch(worker.task, assignment, config.train, folder, name=folder.name, gpus=gpus, in_tune=in_tune)


def run(
    config: RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    say: Say,
    tags: Mapping[str, str] | None = None,
    deliver: bool = True,
) -> dict[str, Any]:
    """``gru unlearn``: check, prepare where needed, run, deliver.

    Args:
        tags: what else the run is marked with.
        deliver: carry the journal to MLflow; False where the folder's parent does that.

    Returns:
        ``{"run", "status", "steps", "scores", "points", "model", "tracking_uri", "run_id"}``.

    Raises:
        InputError: bad input; nothing was written.
        RuntimeError: the run met a loss that is not finite; its folder holds what was measured before.
        KeyboardInterrupt: stopped before its end, by Ctrl-C at once or by SIGTERM with a checkpoint; ``resume``
            goes on.
    """
    rows = check_inputs(config)
    uri = tracking.resolve_uri(config.track)
    tracking.check(uri, say=say)
    config = inputs.without_secrets(config)  # all that is written, or sent to workers, comes from here on
    storage = mirror.of(config.output.storage)
    folder = output.examine(Path(config.output.dir), overwrite=overwrite, resume=resume, storage=storage)
    with output.hold(folder):
        return _held(config, rows, folder, uri if deliver else None, overwrite, resume, say, tags or {})


def _held(
    config: RunConfig, rows: int, folder: Path, uri: str | None, overwrite: bool, resume: bool, say: Say,
    marks: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """The run, once its folder belongs to this process alone; ``uri`` None: its parent delivers it."""
    copy = mirror.Mirror(config.output.storage, folder, say=say)
    content = search_inputs.fingerprint(config, load_benchmark(config.benchmark))
    if resume:
        copy.resume()
        same_config(config, folder, content)
    gpus = ray_start.connect(config.train, say) if config.train.workers else ray_start.local_gpus(config.train)
    for line in (*ignored(config), *_scale(config)):
        say(f"note: {line}")
    ready = prepare.resolve(config, say=say)
    shared = _inputs(ready, folder if resume else None, gpus, say)
    # before claim: it may refuse the experiment
    deliver = Courier(uri, config.track.experiment, folder, say=say, before=copy.poll) if uri else nullcontext()
    folder = output.claim(Path(config.output.dir), overwrite=overwrite, resume=resume, storage=copy.storage)
    (folder / "request.yaml").write_text(settings.to_yaml(config))
    copy.push("request.yaml")
    step = copy.step()
    begun = f", from step {step} on" if step else ""
    what = f"{config.unlearn.objective}, rule {config.rectify.rule}, {config.unlearn.steps} steps"
    kept = f", kept in {copy.storage}" if copy.storage else ""
    say(f"unlearning in {folder}{kept}: {what}, {rows} retain rows{begun}")
    tags = {"gru.kind": "run", search_checks.FINGERPRINT: content, **provenance.tags(), **marks}
    with (
        deliver as courier,
        watching(_teller(folder, config, say), before=copy.poll),
        stopping.listening(folder, config.train.grace, say, copy.storage),
    ):
        try:
            result = train(ready, folder, shared_ref=shared, name=folder.name, tags=tags, gpus=gpus)
            copy.pull()
        except BaseException as error:
            _mark(copy, error)
            raise
    copy.model()
    if result["status"] == "stopped":
        say(f"stopped at step {result['steps']} of {config.unlearn.steps}; --resume goes on")
        raise KeyboardInterrupt
    if result["status"] == "non_finite":
        raise RuntimeError(f"{result['error']}; {folder} holds what was measured before")
    model = folder / "model"
    return {
        "run": str(folder), **result, "model": str(model) if model.exists() else None,
        "tracking_uri": tracking.hide(uri) if uri else None, "run_id": courier.run_id if courier else None,
    }  # fmt: skip


def _inputs(config: RunConfig, resumed: Path | None, gpus: float, say: Say) -> Any:
    """Model, data and end points, before anything is written: nothing to forget is bad input, too.

    Args:
        resumed: the folder of the run that goes on, whose end points stand; None: they are measured.

    Returns:
        The inputs; for runs on Ray workers, which may see other files than this process does, a Ray object
        reference to them.
    """
    known = inputs.read_baseline(resumed / "baseline.json") if resumed else None

    def read(config: RunConfig, group: Group) -> inputs.Shared:
        shared = inputs.load(config)
        if known is None and shared.packed is None:
            return shared  # no process holds the whole model: the workers score it together
        kept = search_inputs.kept(config, shared.benchmark, group)
        baseline = known or inputs.measure_baseline(config, shared, group, kept)
        trade_off(baseline.start.scores, baseline, config.evaluate)
        return shared.with_baseline(baseline)

    def here(config: RunConfig, group: Group, report: Report) -> inputs.Shared:
        return read(config, group)

    def there(config: RunConfig, retains: Sequence[search_inputs.Retain], gpus: float) -> tuple[Any, list[int]]:
        import torch

        torch.set_num_threads(config.train.cpus_per_worker)
        return read(config, current_group() if gpus else Group()), []

    if config.train.workers:
        return search_inputs.put(config, (), gpus, there, say)
    return launch(here, config, config.train, Path(config.output.dir), name="inputs", gpus=gpus)


def same_config(config: RunConfig, folder: Path, content: str) -> None:
    """A resumed run is the run that was started: anything else would be two runs under one name.

    Args:
        content: names rows and models by their content; where they are the same, they may lie elsewhere.
    """
    file = folder / "request.yaml"
    if not file.exists():
        return
    before, now = settings.flat(settings.load(str(file))), settings.flat(config)
    started = (journal.head(folder) or {}).get("tags", {}).get(search_checks.FINGERPRINT)
    free = search_checks.FREE + ((*search_checks.DATA, *search_checks.MODELS) if started == content else ())
    changed = [k for k in now if before.get(k) != now[k] and not k.startswith(free)]
    if changed:
        shown = ", ".join(f"{k} (was {before.get(k)!r}, now {now[k]!r})" for k in changed[:3])
        raise InputError(f"--resume: the run in {folder} was started with other settings: {shown}")


def _mark(copy: mirror.Mirror, error: BaseException) -> None:
    """The journal's last word on a run that could not give it one; never an error of its own."""
    with suppress(Exception), copy.writing(journal.NAME):  # a full disk must not hide what went wrong first
        if (copy.folder / journal.NAME).exists() and worker.finished(copy.folder) is None:
            with journal.Journal(copy.folder) as record:
                record.status("stopped" if isinstance(error, KeyboardInterrupt) else "failed")


def _teller(folder: Path, config: RunConfig, say: Say) -> Callable[[], None]:
    """Says each evaluation once, whichever process measured it, and each note of this start."""
    told: set[int] = set()
    notes = 0
    with suppress(StorageError):
        notes = len(journal.load(folder).notes)

    def tell() -> None:
        nonlocal notes
        record = journal.Record()
        with suppress(StorageError):  # a broken journal is told by whoever needs it
            record = journal.load(folder)
        for note in record.notes[notes:]:
            say(f"note: {note}")
        notes = max(notes, len(record.notes))
        for point in journal.evaluated(record.metrics):
            if point["step"] not in told:
                told.add(point["step"])
                say(
                    f"step {point['step']:>4}/{config.unlearn.steps}  unlearning {point['unlearning']:.3f}"
                    f"  retention {point['retention']:.3f}"
                )

    return tell
