"""Target model and retain model of a benchmark, fine-tuned once and cached by data, model and settings.

The target learns forget and retain rows; the retain model learns the retain rows alone, from the same start
and with the same number of steps. Rows of ``background`` (what a pretrained model would know) go to both,
where the model starts from random weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from gru_core import models, saving
from gru_core.batch import Row
from gru_core.benchmarks import load_benchmark
from gru_core.benchmarks.base import Benchmark
from gru_core.config import RectifyConfig, RunConfig, UnlearnConfig
from gru_core.errors import ConfigError, InputError
from gru_core.loop import Hooks, Run
from gru_core.losses import Rows
from gru_core.objectives.learn import Learn
from gru_core.parallel import Group, unwrap
from gru_core.placing import place
from pipelines import identity, journal, ray_start, settings, siblings
from pipelines.inputs import absolute, flat, tokenise
from pipelines.launch import Report, launch
from pipelines.narrate import watching
from pipelines.stores import hide

Say = Callable[[str], None]
_VERSION = 1
"""Raise it when preparation changes what it makes: older cache entries are then left alone."""


@dataclass(frozen=True)
class Prepared:
    """Folders of the two models; ``cached`` tells that nothing had to be trained."""

    target: Path
    retain: Path
    cached: bool


@dataclass(frozen=True)
class _Order:
    """One model to train, as every worker gets it."""

    config: RunConfig
    which: str
    folder: Path


def cache_folder() -> Path:
    """``GRU_CACHE``, else ``~/.cache/gru``."""
    return Path(os.environ.get("GRU_CACHE") or "~/.cache/gru").expanduser().absolute()


def key(config: RunConfig, benchmark: Benchmark) -> str:
    """Names data, model and settings: two configs with one key prepare the same two models."""
    scored = hashlib.sha256()
    if config.prepare.base is None:  # its tokenizer is trained on these texts too
        for name in sorted(benchmark.scored):
            for row in benchmark.scored[name]:
                scored.update(repr((row.prompt, row.answer, row.paraphrase, row.perturbed)).encode())
    what = {
        "version": _VERSION,
        "data": benchmark.fingerprint(),
        "scored": scored.hexdigest(),
        "prepare": asdict(config.prepare) | {"base": identity.of_model(config.prepare.base)},
        "model": [config.model.dtype, config.model.system_prompt, config.model.chat_date],
        "seed": config.train.seed,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def folders(config: RunConfig, benchmark: Benchmark | None = None) -> Prepared:
    """Where the two models are, or would be.

    Args:
        benchmark: that of ``config``, where it is loaded already.
    """
    config = absolute(config)
    folder = cache_folder() / "models" / key(config, benchmark or load_benchmark(config.benchmark))
    target, retain = folder / "target", folder / "retain"
    return Prepared(target, retain, target.is_dir() and retain.is_dir())


def check(config: RunConfig) -> None:
    """What can be told before anything is made.

    Raises:
        InputError: no such base model, fewer rows a step than workers, or a type that a small model cannot have.
    """
    recipe, workers = config.prepare, config.train.workers
    if recipe.batch_size < workers:
        raise ConfigError("prepare.batch_size", recipe.batch_size, f"at least train.workers ({workers})")
    if recipe.base is not None:
        models.check_model_folder(recipe.base, "prepare.base")
        models.check_tokenizer_folder(recipe.base, "prepare.base")
    elif config.model.dtype == "pure_bfloat16":
        raise InputError("model.dtype: got 'pure_bfloat16', allowed for a model from scratch: float32, bfloat16")


def run(config: RunConfig, *, say: Say) -> Prepared:
    """Train whichever of the two models is not in the cache yet; waits where another process does that already.

    Raises:
        InputError: benchmark or base model cannot be read; more workers than the cluster has.
    """
    config = absolute(config)
    bare, output = replace(config.model, lora=None), replace(config.output, merged=False)
    config = replace(config, model=bare, output=output)  # adapters are for what comes after
    where = folders(config)
    if not _missing(where):
        return _cached(where, say)
    check(config)
    gpus = ray_start.connect(config.train, say) if config.train.workers else ray_start.local_gpus(config.train)
    where.target.parent.mkdir(parents=True, exist_ok=True)
    lock_file = where.target.parent / ".lock"
    with siblings.locked(lock_file, lambda: say("waiting for another process that prepares these models")) as lock:
        missing = _missing(where)
        if not missing:  # made while we waited
            return _cached(where, say)
        orders = [_Order(config, name, getattr(where, name)) for name in missing]
        say(f"training {' and '.join(missing)} model, {config.prepare.steps} steps each, into {where.target.parent}")
        with watching(_teller(orders, say), every=2.0):
            if config.train.workers == 0 and len(orders) > 1 and gpus == 0 and _spare_cpus(config):
                _side_by_side(orders, lock)
            else:
                for order in orders:
                    launch(_train, order, config.train, _work_folder(order), name=f"prepare-{order.which}", gpus=gpus)
    return replace(where, cached=False)


def _missing(where: Prepared) -> list[str]:
    return [name for name in ("target", "retain") if not getattr(where, name).is_dir()]


def _cached(where: Prepared, say: Say) -> Prepared:
    say(f"target and retain model: cached in {where.target.parent}")
    return replace(where, cached=True)


def resolve(config: RunConfig, *, say: Say) -> RunConfig:
    """The config with ``prepared`` replaced by folders, and every input path absolute; trains what is missing."""
    config = absolute(config)
    if "prepared" not in (config.model.path, config.retain_model):
        return config
    where = run(config, say=say)
    if config.model.path == "prepared":
        config = replace(config, model=replace(config.model, path=str(where.target)))
    if config.retain_model == "prepared":
        config = replace(config, retain_model=str(where.retain))
    return config


def _spare_cpus(config: RunConfig) -> bool:
    return (os.cpu_count() or 1) >= 2 * config.train.cpus_per_worker


def _side_by_side(orders: list[_Order], lock: int) -> None:
    """Two small models in two processes: faster than two threads on one after the other."""
    commands = {}
    for order in orders:
        request = _work_folder(order) / "request.yaml"
        request.parent.mkdir(parents=True, exist_ok=True)
        track = order.config.track
        public = replace(order.config, track=replace(track, uri=hide(track.uri) if track.uri else None))
        request.write_text(settings.to_yaml(public))
        name = f"training the {order.which} model"
        commands[name] = [sys.executable, "-m", "pipelines.prepare", str(request), order.which]
    siblings.run(commands, lock)


def _alone(request: str, which: str) -> int:
    """One model in a process of its own."""
    config = settings.load(request)
    order = _Order(config, which, getattr(folders(config), which))
    try:
        launch(_train, order, config.train, _work_folder(order), name=f"prepare-{which}")
    except InputError as error:
        print(error)
        return siblings.BAD_INPUT
    return 0


def _teller(orders: list[_Order], say: Say) -> Callable[[], None]:
    """Says the loss of each model every 50 steps or so."""
    told = {order.which: 0 for order in orders}

    def tell() -> None:
        for order in orders:
            steps = journal.load(_work_folder(order)).metrics
            last = max(steps, default=0)
            if last >= told[order.which] + 50:
                told[order.which] = last
                loss = steps[last]["train/loss"]
                say(f"{order.which} model: step {last}/{order.config.prepare.steps}, loss {loss:.3f}")

    return tell


def _work_folder(order: _Order) -> Path:
    return order.folder.with_name(f".{order.which}-work")


def training_rows(benchmark: Benchmark, which: str, from_scratch: bool) -> tuple[Row, ...]:
    """Rows that ``which`` (``target`` or ``retain``) learns."""
    rows = benchmark.retain + (benchmark.background if from_scratch else ())
    return rows + benchmark.forget if which == "target" else rows


def _texts(benchmark: Benchmark) -> list[str]:
    """Every text that the small model's tokenizer must know."""
    rows = benchmark.forget + benchmark.retain + benchmark.background
    texts = [text for row in rows for text in (f"Question: {row.prompt}\nAnswer: {row.answer}", row.answer)]
    for scored in benchmark.scored.values():
        for item in scored:
            texts += [item.prompt, item.answer, *([item.paraphrase] if item.paraphrase else []), *item.perturbed]
    return texts


def _start(config: RunConfig, benchmark: Benchmark, group: Group) -> tuple[Any, nn.Module]:
    """Tokenizer and model before training; a small model from scratch is not worth spreading over the workers."""
    recipe = config.prepare
    if recipe.base is not None:
        tokenizer = models.load_tokenizer(recipe.base, "prepare.base")
        return tokenizer, place(recipe.base, config.model, config.train, group, "prepare.base")
    tokenizer = models.build_tokenizer(_texts(benchmark), recipe)
    whole = replace(config.train, strategy="ddp", cpu_offload=False)
    return tokenizer, place(
        lambda: models.build_small(tokenizer, recipe, config.train.seed), config.model, whole, group
    )


def _train(order: _Order, group: Group, report: Report) -> str:
    """Train one model to its end, or from its last checkpoint; rank 0 puts it in its place."""
    config, recipe = order.config, order.config.prepare
    benchmark = load_benchmark(config.benchmark)
    tokenizer, model = _start(config, benchmark, group)
    texts = training_rows(benchmark, order.which, recipe.base is None)
    rows = flat(tokenise(tokenizer, texts, models.max_length(unwrap(model)), config.model))
    training = replace(
        config,
        unlearn=UnlearnConfig(
            objective="ga", steps=recipe.steps, batch_size=recipe.batch_size, lr=recipe.lr,
            schedule=recipe.schedule, warmup=recipe.warmup, weight_decay=recipe.weight_decay,
            evaluate_every=recipe.steps,
        ),
        rectify=RectifyConfig(rule="none"),
        train=replace(config.train, checkpoint_every=max(config.train.checkpoint_every, recipe.steps // 4)),
    )  # fmt: skip
    work = _work_folder(order)
    record = journal.Journal(work) if group.rank == 0 else None

    def log(step: int, metrics: dict[str, float]) -> None:
        if record and (step % 25 == 0 or step == recipe.steps):
            record.metrics(step, {"train/loss": metrics["forget_loss"]})

    Run(model, training, Learn(training.unlearn), Rows(rows), Rows([]), group, Hooks(log=log), work / "checkpoints")()
    done = work / "model"
    saving.save(model, tokenizer, recipe.base or "", done, group)
    if record:
        record.close()
        shutil.rmtree(order.folder, ignore_errors=True)
        done.rename(order.folder)
        shutil.rmtree(work, ignore_errors=True)
    group.barrier()
    report({"step": recipe.steps})
    return str(order.folder)


if __name__ == "__main__":
    sys.exit(_alone(*sys.argv[1:3]))
