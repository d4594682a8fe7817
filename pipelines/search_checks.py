"""What a search can be told before it starts Ray and before it writes anything, and what it may continue."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from gru_core.config import RunConfig
from gru_core.errors import InputError
from pipelines import journal, mirror, output, prepare, search_inputs, selection, settings, space, tracking
from pipelines.ledger import NAME as LEDGER
from pipelines.space import Family

Say = Callable[[str], None]

_MACHINES = (
    "workers", "min_workers", "micro_batch", "strategy", "activation_checkpointing", "cpu_offload",
    "cpus_per_worker", "gpus_per_worker", "max_failures", "hang_timeout", "grace",
)  # fmt: skip
FREE = ("output.", "track.", "search.concurrent", *(f"train.{name}" for name in _MACHINES))
"""Settings that may differ when a search or a run is resumed: where, and on what, it runs."""
DATA = (
    "benchmark.forget", "benchmark.retain", "benchmark.holdout", "benchmark.data_dir", "evaluate.lm_eval.data.",
    "evaluate.lm_eval.include_path",
)  # fmt: skip
"""Where rows are read from: may differ too, where the rows are the same."""
MODELS = ("model.path", "retain_model", "prepare.base", "model.tokenizer", "evaluate.start")
"""Likewise for models. A submitted search finds its inputs in another folder each time."""
FINGERPRINT = "gru.inputs"
"""Tag of a search: the rows and models it reads, by their content."""


def check(config: RunConfig, overwrite: bool, resume: bool, say: Say) -> tuple[str, Path, list[Family], str]:
    """All that can be told without Ray and without weights; writes nothing.

    Returns:
        Tracking URI, absolute output folder, families, and what names the inputs by their content.
    """
    from gru_core.benchmarks import load_benchmark
    from pipelines import unlearn

    unlearn.check_inputs(config)
    families = space.families(config, say)
    for family in families:
        _check_family(config, family)
    benchmark = load_benchmark(config.benchmark)
    search_inputs.check_retains(config, families, benchmark)
    if "prepared" in (config.model.path, config.retain_model) and not prepare.folders(config, benchmark).cached:
        prepare.check(config)
    uri = tracking.resolve_uri(config.track)
    tracking.check(uri, say=say)
    storage = mirror.of(config.output.storage)
    folder = output.examine(Path(config.output.dir), overwrite=overwrite, resume=resume, storage=storage)
    inputs = search_inputs.fingerprint(config, benchmark)
    if resume:
        with output.hold(folder):
            mirror.Mirror(config.output.storage, folder).resume()
        _same_search(config, folder, inputs)
    return uri, folder, families, inputs


def _check_family(config: RunConfig, family: Family) -> None:
    """Builds rule and objective for every pair of choices (for ranges: ends), to hear what they refuse.

    Pairs are enough: every such rule is about two settings at most.
    """
    from gru_core.objectives import build_objective
    from gru_core.rectify import build_rule

    values = {key: space.extremes(family, key, config) for key in family.space}
    first = {key: choices[0] for key, choices in values.items()}
    checked = [key for key in values if key.startswith(("unlearn.", "rectify."))]
    combinations = [first]
    for one, other in itertools.combinations_with_replacement(checked, 2):
        combinations += [{**first, one: a, other: b} for a, b in itertools.product(values[one], values[other])]
    for chosen in {repr(each): each for each in combinations}.values():
        try:
            tried = space.trial_config(config, {**family.fixed, **chosen}, config.output.dir)
            build_rule(tried.rectify)
            build_objective(tried.unlearn)
        except InputError as error:
            raise InputError(f"search.families.{family.name}: {error}") from None


def _same_search(config: RunConfig, folder: Path, inputs: str) -> None:
    """A resumed search is the search that was started: anything else would be two searches under one name."""
    first = journal.head(folder)
    tags = first.get("tags", {}) if first else {}
    file = folder / "request.yaml"
    if tags.get("gru.kind") != "search" or not file.exists():
        raise InputError(f"--resume: {folder} holds no search")
    free = (*FREE, *DATA, *MODELS) if tags.get(FINGERPRINT) == inputs else FREE
    before, now = settings.flat(settings.load(str(file))), settings.flat(config)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key) and not key.startswith(free)]
    if changed:
        shown = ", ".join(f"{key} (was {before.get(key)!r}, now {now.get(key)!r})" for key in changed[:3])
        raise InputError(f"--resume: the search in {folder} was started with other settings: {shown}")


def complete(folder: Path, families: Sequence[Family]) -> bool:
    """Whether every trial has its result already."""
    entries, _ = journal.read(folder / LEDGER)
    done = [end for end in selection.outcomes(entries).values() if end["status"] in selection.RESULTS]
    return len(done) == sum(family.trials for family in families)
