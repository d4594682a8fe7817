"""What a config's types cannot say: names that must stand in a registry, and a search that must make sense.

``pipelines.settings.check`` is the public name of :func:`check`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gru_core.config import RunConfig
from gru_core.errors import ConfigError, InputError, unknown


def check(config: RunConfig) -> None:
    """Checks every name against its registry, the metrics, and the search space; loads no data and no model.

    Raises:
        InputError: a name that is not registered (with the nearest match), metrics that cannot be computed,
            a storage that cannot be one, or a search over something that is no config field or leaves its range.
    """
    _check_names(config)
    from gru_core.metrics import check_metrics
    from pipelines import mirror

    mirror.of(config.output.storage)

    check_metrics(config.evaluate, has_retain_model=config.retain_model is not None, benchmark=None)
    _check_search(config)


def _check_names(config: RunConfig) -> None:
    from gru_core.benchmarks import BENCHMARKS
    from gru_core.objectives import OBJECTIVES
    from gru_core.rectify import RULES
    from gru_core.retain import RETAIN_LOSSES

    if config.unlearn.objective not in OBJECTIVES:
        raise unknown("objective", config.unlearn.objective, OBJECTIVES)
    if config.rectify.rule not in RULES:
        raise unknown("rule", config.rectify.rule, RULES)
    if config.retain.loss not in RETAIN_LOSSES:
        raise unknown("retain loss", config.retain.loss, RETAIN_LOSSES)
    if config.benchmark.name not in BENCHMARKS:
        raise unknown("benchmark", config.benchmark.name, BENCHMARKS)


def _check_search(config: RunConfig) -> None:
    search = config.search
    from pipelines.space import DEFAULT_FAMILIES, check_key

    families = len(search.families or DEFAULT_FAMILIES)
    if search.sampler != "grid" and search.trials % families:
        raise ConfigError("search.trials", search.trials, f"a multiple of {families}, the number of families")
    for key, dimension in search.space.items():
        _check_dimension(config, "search.space", key, dimension)
    for name, family in search.families.items():
        where = f"search.families.{name}"
        for key in family.fixed:
            check_key(f"{where}.fixed", key)
            if key in family.space:
                raise InputError(f"{where}: {key!r} stands in both fixed and space (allowed: one of them)")
        base = _with(config, f"{where}.fixed", family.fixed)
        _check_names(base)
        for key, dimension in family.space.items():
            _check_dimension(base, f"{where}.space", key, dimension)


def _check_dimension(config: RunConfig, where: str, key: str, dimension: Any) -> None:
    """A dimension is ``{low, high, log?, step?}`` or a list of choices; each value must suit ``key``."""
    from pipelines.space import check_key

    check_key(where, key)
    field = f"{where}.{key}"
    for value in _values(field, dimension):
        _check_names(_with(config, field, {key: value}))


def _with(config: RunConfig, where: str, values: Mapping[str, Any]) -> RunConfig:
    """``config`` with ``values``; an error about one of them says where in the search it stands."""
    from pipelines.settings import with_values

    try:
        return with_values(config, values)
    except InputError as error:
        shown = json.dumps(dict(values))
        raise InputError(f"{where}: {shown} is no valid setting: {error}") from None


def _values(field: str, dimension: Any) -> list[Any]:
    """Choices, or both ends of a range; floats where one end is a float, as a sampler draws them."""
    if isinstance(dimension, list):
        if not dimension:
            raise ConfigError(field, dimension, "at least one choice")
        return dimension
    if not isinstance(dimension, dict):
        raise ConfigError(field, dimension, "{low, high, log (optional), step (optional)} or a list of choices")
    for name in dimension:
        if name not in ("low", "high", "log", "step"):
            raise unknown(f"key in {field}", str(name), ("low", "high", "log", "step"))
    low, high = (_number(f"{field}.{name}", dimension.get(name)) for name in ("low", "high"))
    if not low < high:
        raise ConfigError(f"{field}.high", high, f"above low ({low})")
    log = dimension.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{field}.log", log, "true or false")
    if log and not low > 0:
        raise ConfigError(f"{field}.low", low, "above 0 where log is true")
    if "step" in dimension:
        step = _number(f"{field}.step", dimension["step"])
        if step <= 0 or log:
            raise ConfigError(f"{field}.step", step, "a number above 0, and none where log is true")
    whole = isinstance(low, int) and isinstance(high, int)
    return [low, high] if whole else [float(low), float(high)]


def _number(field: str, value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(field, value, "a number")
    return value
