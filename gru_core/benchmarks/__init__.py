"""Benchmarks by name. Adding one: a file with a loader, its line in ``BENCHMARKS`` and in ``_OPTIONS``, a test."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields, replace

from gru_core.benchmarks.authors import load_authors
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.benchmarks.jsonl import load_jsonl
from gru_core.benchmarks.muse import load_muse
from gru_core.benchmarks.read import check_apart, key, positions
from gru_core.benchmarks.tofu import load_tofu
from gru_core.benchmarks.wmdp import load_wmdp
from gru_core.config import BenchmarkConfig, RetainConfig
from gru_core.errors import ConfigError, InputError, unknown

__all__ = ["BENCHMARKS", "Benchmark", "EvalRow", "load_benchmark", "retain_subset"]

BENCHMARKS: dict[str, Callable[[BenchmarkConfig], Benchmark]] = {
    "authors": load_authors,
    "tofu": load_tofu,
    "muse": load_muse,
    "jsonl": load_jsonl,
    "wmdp": load_wmdp,
}

_OPTIONS = {
    "authors": {"split", "seed"},
    "tofu": {"split", "data_dir"},
    "muse": {"split", "data_dir"},
    "jsonl": {"forget", "retain", "holdout"},
    "wmdp": {"split", "data_dir"},
}
"""The fields of ``BenchmarkConfig`` that each benchmark reads, besides ``name`` and ``retain_rows``."""


def load_benchmark(config: BenchmarkConfig) -> Benchmark:
    """Loads the benchmark that ``config`` names, cut to its first ``retain_rows`` retain rows.

    Raises:
        ConfigError: an option of another benchmark is set, or more retain rows are asked for than exist.
        InputError: unknown benchmark or split, bad data, an empty set, or rows both to forget and to keep.
    """
    if config.name not in BENCHMARKS:
        raise unknown("benchmark", config.name, BENCHMARKS)
    _check_options(config)
    benchmark = BENCHMARKS[config.name](config)
    check_apart(benchmark)
    if config.retain_rows is not None:
        benchmark = _first_retain_rows(benchmark, config.retain_rows)
    sizes = {"forget": len(benchmark.forget), "retain": len(benchmark.retain)}
    sizes |= {f"scored {name}": len(rows) for name, rows in benchmark.scored.items()}
    for name, size in sizes.items():
        if not size:
            raise InputError(f"benchmark {benchmark.name}: the {name} set is empty")
    return benchmark


def _check_options(config: BenchmarkConfig) -> None:
    for option in fields(config):
        value = getattr(config, option.name)
        if option.name in {"name", "retain_rows"} | _OPTIONS[config.name] or value == option.default:
            continue
        users = ", ".join(name for name, options in _OPTIONS.items() if option.name in options)
        allowed = f"{option.default!r} with benchmark {config.name} (only {users} uses it)"
        raise ConfigError(f"benchmark.{option.name}", value, allowed)


def _first_retain_rows(benchmark: Benchmark, count: int) -> Benchmark:
    """The benchmark with its first ``count`` retain rows. Scored rows beyond them are dropped too: a model
    that never trained on a row cannot show that it kept it."""
    if count > len(benchmark.retain):
        allowed = f"null, or 1 to {len(benchmark.retain)} (the retain rows that exist)"
        raise ConfigError("benchmark.retain_rows", count, allowed)
    retain = benchmark.retain[:count]
    kept = {key(row) for row in retain}
    scored = tuple(row for row in benchmark.scored["retain"] if key(row) in kept)
    return replace(
        benchmark,
        name=f"{benchmark.name}/retain-first-{count}",
        retain=retain,
        scored={**benchmark.scored, "retain": scored},
        retain_scored=positions(retain, scored),
    )


def retain_subset(benchmark: Benchmark, config: RetainConfig, seed: int) -> list[int]:
    """Positions in ``benchmark.retain`` of the rows that train.

    A prefix of one permutation, which ``seed`` alone draws: a subset of 100 rows is the first half of one of
    200, so that size is the only thing that changes. Rows that score retention are left out, unless
    ``config.include_scored``.

    Raises:
        ConfigError: more rows than there are, or none are left.
    """
    places = range(len(benchmark.retain))
    available = [i for i in places if config.include_scored or i not in benchmark.retain_scored]
    scoring = len(benchmark.retain) - len(available)
    exist = f"{len(available)} retain rows may train"
    if scoring:
        exist += f" ({scoring} more score retention: retain.include_scored lets them in)"
    if not available:
        raise ConfigError("retain.size", config.size, f"nothing: {exist}")
    size = max(1, round(config.size * len(available))) if isinstance(config.size, float) else config.size
    if size > len(available):
        raise ConfigError("retain.size", size, f"1 to {len(available)}: {exist}")
    random.Random(f"retain subset {seed}").shuffle(available)  # of text: the same in every process and Python
    return available[:size]
