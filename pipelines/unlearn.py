"""The driver of one unlearning run: checks, models, workers, tracking, result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gru_core import models
from gru_core.benchmarks import load_benchmark, retain_subset
from gru_core.config import RunConfig
from gru_core.errors import InputError
from gru_core.metrics import Baseline, check_metrics, trade_off
from gru_core.objectives import build_objective
from gru_core.parallel import Group
from gru_core.rectify import build_rule
from pipelines import inputs, journal, output, prepare, provenance, settings, tracking, worker
from pipelines.courier import Courier
from pipelines.launch import Report, launch
from pipelines.narrate import watching

Say = Callable[[str], None]


def check_inputs(config: RunConfig) -> None:
    """Everything that can be wrong with a run and can be told without weights; writes nothing.

    Raises:
        InputError: the first thing that is wrong.
    """
    settings.check(config)
    build_objective(config.unlearn)
    build_rule(config.rectify)
    for path, what in ((config.model.path, "model.path"), (config.retain_model, "retain_model")):
        if path is not None and path != "prepared":
            models.check_model_folder(path, what)
    benchmark = load_benchmark(config.benchmark)
    check_metrics(config.evaluate, config.retain_model is not None, benchmark)
    retain_subset(benchmark, config.retain, config.train.seed)


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
) -> worker.Result:
    """One run on ``train.workers`` workers, in its folder; resumes where the folder holds a checkpoint.

    Returns:
        As :func:`pipelines.worker.work`.
    """
    assignment = worker.Assignment(config, folder, shared_ref, name, tags, keep_model)
    return launch(worker.task, assignment, config.train, folder, name=folder.name, gpus=gpus, in_tune=in_tune)


def run(config: RunConfig, *, overwrite: bool = False, resume: bool = False, say: Say) -> dict[str, Any]:
    """``gru unlearn``: check, prepare where needed, run, deliver.

    Returns:
        ``{"run", "status", "steps", "scores", "points", "model", "tracking_uri", "run_id"}``.

    Raises:
        InputError: bad input; nothing was written.
        NonFiniteError: the run met a loss that is not finite; its folder holds what was measured before.
    """
    check_inputs(config)
    uri = tracking.resolve_uri(config.track)
    tracking.check(uri)
    folder = output.examine(Path(config.output.dir), overwrite=overwrite, resume=resume)
    if resume:
        _same_config(config, folder)
    gpus = _start_ray(config, say)
    for line in ignored(config):
        say(f"note: {line}")
    ready = prepare.resolve(config, say=say)
    shared = _inputs(ready, folder) if config.train.workers == 0 else None
    folder = output.claim(Path(config.output.dir), overwrite=overwrite, resume=resume)
    (folder / "request.yaml").write_text(settings.to_yaml(config))
    say(f"unlearning in {folder}: {config.unlearn.objective}, rule {config.rectify.rule}, {config.unlearn.steps} steps")
    tags = {"gru.kind": "run", **provenance.tags()}
    with Courier(uri, config.track.experiment, folder, say=say) as courier, watching(_teller(folder, config, say)):
        try:
            result = train(ready, folder, shared_ref=shared, name=folder.name, tags=tags, gpus=gpus)
        except InputError:
            if not resume:  # told only by the workers: what they began is taken back
                shutil.rmtree(folder, ignore_errors=True)
            raise
        except BaseException:
            _mark_failed(folder)
            raise
    if result["status"] == "non_finite":
        raise RuntimeError(f"{result['error']}; {folder} holds what was measured before")
    model = folder / "model"
    return {
        "run": str(folder), **result, "model": str(model) if model.exists() else None,
        "tracking_uri": tracking.hide(uri), "run_id": courier.run_id,
    }  # fmt: skip


def _inputs(config: RunConfig, folder: Path) -> inputs.Shared:
    """Model, data and end points, before anything is written: nothing to forget is bad input, too."""
    shared = inputs.load(config)
    baseline = inputs.read_baseline(folder / "baseline.json")
    baseline = baseline or launch(_baseline, (config, shared), config.train, folder, name="baseline")
    trade_off(baseline.start.scores, baseline, config.evaluate)
    return shared.with_baseline(baseline)


def _baseline(payload: tuple[RunConfig, inputs.Shared], group: Group, report: Report) -> Baseline:
    return inputs.measure_baseline(*payload, group)


def _same_config(config: RunConfig, folder: Path) -> None:
    """A resumed run is the run that was started: anything else would be two runs under one name."""
    file = folder / "request.yaml"
    if not file.exists():
        return
    before, now = settings.flat(settings.load(str(file))), settings.flat(config)
    free = ("output.", "track.", "train.max_failures")
    changed = [k for k in now if before.get(k) != now[k] and not k.startswith(free)]
    if changed:
        shown = ", ".join(f"{k} (was {before.get(k)!r}, now {now[k]!r})" for k in changed[:3])
        raise InputError(f"--resume: the run in {folder} was started with other settings: {shown}")


def _start_ray(config: RunConfig, say: Say) -> float:
    """Ray, where the run needs it; GPUs of each worker."""
    if config.train.workers == 0:
        return 0.0
    from pipelines import ray_start

    return ray_start.connect(config.train, say)


def _mark_failed(folder: Path) -> None:
    """The journal's last word on a run whose workers could not give it one."""
    if journal.load(folder).status is None and (folder / journal.NAME).exists():
        with journal.Journal(folder) as record:
            record.status("failed")


def _teller(folder: Path, config: RunConfig, say: Say) -> Callable[[], None]:
    """Says each evaluation once, whichever process measured it."""
    told: set[int] = set()

    def tell() -> None:
        for point in journal.points(folder):
            if point["step"] not in told:
                told.add(point["step"])
                say(
                    f"step {point['step']:>4}/{config.unlearn.steps}  unlearning {point['unlearning']:.3f}"
                    f"  retention {point['retention']:.3f}"
                )

    return tell
