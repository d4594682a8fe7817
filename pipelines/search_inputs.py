"""What all trials of a search share: read once, as a Ray task, and kept in Ray's object store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gru_core.benchmarks.base import Benchmark
from gru_core.config import RetainConfig, RunConfig
from gru_core.errors import InputError
from gru_core.metrics import Progress
from gru_core.parallel import Group
from pipelines import identity, space
from pipelines.prepare import cache_folder
from pipelines.space import Family
from pipelines.storage import EVALUATING

Say = Callable[[str], None]
Retain = tuple[RetainConfig, int]
"""A retain set: its settings and its seed."""
Load = Callable[[RunConfig, Sequence[Retain], float], tuple[Any, list[int]]]


def put(config: RunConfig, families: Sequence[Family], gpus: float, load: Load, say: Say) -> Any:
    """Runs ``load`` in a task that has one trial's resources: a head without GPU stays one, the driver light.

    Returns:
        Ray object reference to the inputs; they never pass through this process.

    Raises:
        InputError: as ``load``.
    """
    import ray

    say("loading model and data, and scoring the model as it is")
    ends = retains(config, families)
    task = ray.remote(load).options(num_returns=2, num_cpus=config.train.cpus_per_worker, num_gpus=gpus, max_retries=1)
    references: Any = task.remote(config, [each for each, _ in ends], gpus)
    try:
        sizes = ray.get(references[1])
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, InputError) else error from None
    warn_size(sizes, [reads for _, reads in ends], say)
    return references[0]


def load(config: RunConfig, retains: Sequence[Retain], gpus: float) -> tuple[Any, list[int]]:
    """Model, data and baseline.

    Args:
        retains: retain sets at the ends of what is searched.
        gpus: GPUs of this task; without one it stays on the CPU.

    Returns:
        The inputs (with strategy ``fsdp`` without a baseline), and the number of rows in each of those retain sets.

    Raises:
        InputError: something cannot be read, a retain set is larger than what exists, or there is nothing to
            forget or to keep.
    """
    import torch

    from gru_core.benchmarks import load_benchmark, retain_subset
    from gru_core.metrics import trade_off
    from gru_core.parallel import current_group
    from pipelines import inputs

    torch.set_num_threads(config.train.cpus_per_worker)
    benchmark = load_benchmark(config.benchmark)  # before the model: data problems are told at once
    rows = [len(retain_subset(benchmark, retain, seed)) for retain, seed in retains]
    shared = inputs.load(config)
    if shared.packed is None:
        return shared, rows  # no process holds the whole model: each trial's workers score it together
    group = current_group() if gpus else Group()
    baseline = inputs.measure_baseline(config, shared, group, kept(config, benchmark, group))
    trade_off(baseline.start.scores, baseline, config.evaluate)
    return shared.with_baseline(baseline), rows


_fetched: dict[str, Any] = {}


def fetch(reference: Any) -> Any:
    """The object behind a reference, unpickled once in this process: the next trial in it finds it ready."""
    key = reference.hex()
    if key not in _fetched:
        import ray

        _fetched.clear()
        _fetched[key] = ray.get(reference)
    return _fetched[key]


def retains(config: RunConfig, families: Sequence[Family]) -> list[tuple[Retain, int]]:
    """Retain sets at both ends of what families search, each with the rows that a trial there reads at most.

    Families that read no retain rows are left out.
    """
    found: list[tuple[Retain, int]] = []
    for family in families:
        if not space.reads_retain(config, family):
            continue
        reads = max(space.extremes(family, "unlearn.steps", config))
        reads *= max(space.extremes(family, "unlearn.batch_size", config))
        for size in space.extremes(family, "retain.size", config):
            for scored in space.extremes(family, "retain.include_scored", config):
                found.append(((RetainConfig(config.retain.loss, size, scored), config.train.seed), reads))
    return found


def check_retains(config: RunConfig, families: Sequence[Family], benchmark: Benchmark) -> None:
    """Whether the benchmark has the rows that every family may ask for.

    Raises:
        InputError: a retain set larger than what may train, and the family that asks for it.
    """
    from gru_core.benchmarks import retain_subset

    for family in families:
        for (retain, seed), _ in retains(config, [family]):
            try:
                retain_subset(benchmark, retain, seed)
            except InputError as error:
                scored = f" with retain.include_scored {str(retain.include_scored).lower()}"
                raise InputError(f"search.families.{family.name}{scored}: {error}") from None


def fingerprint(config: RunConfig, benchmark: Benchmark) -> str:
    """Names rows and models by their content: the same wherever the files lie."""
    paths = [config.model.path, config.retain_model, config.prepare.base]
    paths += [path for path in (config.model.tokenizer, config.evaluate.start) if path is not None]
    models = [path if path == "prepared" else identity.of_model(path) for path in paths]
    scored = [
        (name, [(row.prompt, row.answer, row.paraphrase, row.perturbed) for row in rows])
        for name, rows in sorted(benchmark.scored.items())
    ]
    asked = [(task, _digest(Path(file))) for task, file in sorted(config.evaluate.lm_eval.data.items())]
    folder = config.evaluate.lm_eval.include_path
    files = sorted(Path(folder).expanduser().rglob("*.yaml")) if folder else ()
    asked += [(file.name, _digest(file)) for file in files if file.is_file()]
    text = json.dumps([benchmark.fingerprint(), scored, models, *([asked] if asked else [])])
    return hashlib.sha256(text.encode()).hexdigest()


def kept(config: RunConfig, benchmark: Benchmark, group: Group, folder: Path | None = None) -> Progress:
    """Where the end points of these inputs are kept while they are measured.

    Args:
        folder: of the run; None: there is none yet, and they are kept in the cache.
    """
    content = group.gather(fingerprint(config, benchmark)[:16] if group.rank == 0 else "")[0]
    where = cache_folder() / "evaluating" / content if folder is None else folder / EVALUATING / content
    return Progress(where, content, group)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.expanduser().read_bytes()).hexdigest()


def warn_size(sizes: Sequence[int], reads: Sequence[int], say: Say) -> None:
    """Says where a run ends before it has read its retain set: a larger one is then the same to it."""
    above = [(rows, read) for rows, read in zip(sizes, reads, strict=True) if rows > read]
    if above:
        rows, read = max(above)
        say(
            f"note: retain sets of up to {rows} rows, but a run reads at most {read} (steps x batch_size): sizes "
            "above that cannot matter"
        )
