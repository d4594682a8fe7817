"""What each family of a search varies: ``search.space`` as dimensions, distributions and grids."""

from __future__ import annotations

import itertools
import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gru_core.config import FamilyConfig, RunConfig
from gru_core.errors import ConfigError, InputError, unknown
from gru_core.rectify import RULES

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Dimension = dict[str, Any] | list[Any]
Say = Callable[[str], None]

DEFAULT_FAMILIES = {
    "plain": FamilyConfig({"rectify.rule": "none"}),
    "sum": FamilyConfig(
        {"rectify.rule": "sum", "rectify.ema": 1.0},
        {"rectify.retain_weight": {"low": 0.25, "high": 8.0, "log": True}},
    ),
    "rectified": FamilyConfig({"rectify.rule": "gru"}, {"rectify.strength": {"low": 0.0, "high": 5.0}}),
}
"""Plain unlearning (strength 0), gradient difference as its rival, GRU; each with its own weight searched."""
SEARCHED = ("unlearn", "rectify", "retain")
"""Sections that a search may vary; and ``train.seed``, ``train.micro_batch``. All trials share the rest."""


@dataclass(frozen=True)
class Family:
    """One family of a search.

    Attributes:
        fixed: dotted keys that it sets.
        space: dotted keys that it searches, to their dimensions.
        trials: how many trials it gets.
        grid: all its combinations, where they are run in full; None where a sampler draws.
    """

    name: str
    fixed: dict[str, Any]
    space: dict[str, Dimension]
    trials: int
    grid: tuple[dict[str, Any], ...] | None = None


def families(config: RunConfig, say: Say) -> list[Family]:
    """The families of ``config.search``, each with what it searches and how often.

    Every family gets the same number of trials. One whose combinations are no more than that runs each once.

    Raises:
        InputError: a key that trials cannot differ in or that has no effect, or a grid larger than the budget.
    """
    search = config.search
    given = search.families or DEFAULT_FAMILIES
    if search.sampler != "grid" and search.trials % len(given):
        raise ConfigError("search.trials", search.trials, f"a multiple of {len(given)}, the number of families")
    share = search.trials // len(given)
    found = []
    for name, family in given.items():
        _check_name(name)
        space = _space(config, name, family, say)
        found.append(_family(name, family.fixed, space, share, config))
    if not any(_is_plain(config, family) for family in given.values()):
        say("note: no family of this search is plain unlearning (rectify.rule none): there is no such base line")
    numbers = {family.name: family.trials for family in found}
    if len(set(numbers.values())) > 1:
        shown = ", ".join(f"{name} {number}" for name, number in numbers.items())
        say(f"note: families of different size ({shown} trials): hypervolume grows with the number of trials")
    return found


def _check_name(name: str) -> None:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError("search.families", name, "names of letters, digits, - and _")


def _is_plain(config: RunConfig, family: FamilyConfig) -> bool:
    return family.fixed.get("rectify.rule", config.rectify.rule) == "none"


def _space(config: RunConfig, name: str, family: FamilyConfig, say: Say) -> dict[str, Dimension]:
    """Shared and own dimensions; shared ones without effect in this family are left out, and that is said."""
    own, shared = family.space, config.search.space
    for key in (*family.fixed, *own, *shared):
        check_key("search", key)
    merged = {**shared, **own} if config.search.families else {**own, **shared}
    idle = _idle(config, family.fixed, merged)
    dropped = [key for key in merged if key in family.fixed or key in idle]
    for key in own:
        if key in idle and config.search.families:
            raise InputError(f"search.families.{name}.space: {key!r} has no effect in this family")
    told = [key for key in dropped if key in shared]
    if told:
        say(f"note: {', '.join(told)} not searched in family {name}: fixed, or without effect there")
    return {key: dimension for key, dimension in merged.items() if key not in dropped}


def check_key(where: str, key: str) -> None:
    """A config field in which trials may differ.

    Raises:
        InputError: no such field, or one that all trials share.
    """
    from pipelines.settings import keys

    varying = ("train.seed", "train.micro_batch")
    valid = [name for name in keys() if name.split(".")[0] in SEARCHED or name in varying]
    if key in valid:
        return
    if key not in keys():
        raise unknown(f"key in {where}", key, valid)
    raise InputError(
        f"{where}: {key!r} cannot differ between trials, which share model, data, evaluation and resources "
        f"(allowed: keys of {', '.join(SEARCHED)}, and {', '.join(varying)})"
    )


def _idle(config: RunConfig, fixed: Mapping[str, Any], searched: Mapping[str, Dimension]) -> set[str]:
    """Keys without effect under the family's rule; none where the rule itself is searched."""
    if "rectify.rule" in searched:
        return set()
    rule = fixed.get("rectify.rule", config.rectify.rule)
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    uses: frozenset[str] = RULES[rule].uses  # type: ignore[attr-defined]  # every rule declares it
    fields = [f"rectify.{name}" for name in vars(config.rectify)]
    idle = {key for key in fields if key.removeprefix("rectify.") not in (*uses, "rule")}
    if "ema" not in uses:  # no retain gradient is taken at all
        idle |= {"retain.size", "retain.loss", "retain.include_scored"}
    return idle


def reads_retain(config: RunConfig, family: Family) -> bool:
    """Whether trials of the family take gradients on the retain set."""
    return "retain.size" not in _idle(config, family.fixed, family.space)


def _family(name: str, fixed: dict[str, Any], space: dict[str, Dimension], share: int, config: RunConfig) -> Family:
    if config.search.sampler == "grid":
        points = grid(space)
        if len(points) > share:
            raise InputError(
                f"search.trials: got {config.search.trials}, {share} for each family; the grid of family {name} has "
                f"{len(points)} combinations"
            )
        return Family(name, fixed, space, len(points), points)
    size = combinations(space)
    if size <= share:
        return Family(name, fixed, space, int(size), grid(space))
    return Family(name, fixed, space, share)


# --------------------------------------------------------------------------------------------- dimensions


def _whole(key: str, low: Any, high: Any) -> bool:
    """Whether a range runs over whole numbers: its field can hold them as such, and both ends are."""
    section, _, name = key.partition(".")
    hints = typing.get_type_hints(type(getattr(RunConfig(), section)))
    kinds = typing.get_args(hints[name]) or (hints[name],)
    return int in kinds and isinstance(low, int) and isinstance(high, int)


def _values(key: str, dimension: Dimension) -> list[Any] | None:
    """All values of a finite dimension, None for a range without steps."""
    if isinstance(dimension, list):
        return dimension
    low, high = dimension["low"], dimension["high"]
    whole = _whole(key, low, high)
    step = dimension.get("step", 1 if whole and not dimension.get("log") else None)
    if step is None:
        return None
    number = math.floor((high - low) / step + 1e-9) + 1
    return [low + k * step if whole else float(low + k * step) for k in range(number)]


def combinations(space: Mapping[str, Dimension]) -> float:
    """How many different settings a space has; infinite with a continuous dimension."""
    sizes = [_values(key, dimension) for key, dimension in space.items()]
    return math.prod(math.inf if values is None else len(values) for values in sizes)


def grid(space: Mapping[str, Dimension]) -> tuple[dict[str, Any], ...]:
    """Every combination, the last dimension changing fastest.

    Raises:
        ConfigError: a range without steps.
    """
    axes = []
    for key, dimension in space.items():
        values = _values(key, dimension)
        if values is None:
            allowed = "a list of choices, or a range with a step, where search.sampler is grid"
            raise ConfigError(f"search.space.{key}", dimension, allowed)
        axes.append(values)
    return tuple(dict(zip(space, values, strict=True)) for values in itertools.product(*axes))


def distributions(space: Mapping[str, Dimension]) -> dict[str, BaseDistribution]:
    """The space in Optuna's terms; a choice is drawn by its place in the list, so that it may be any value."""
    return {key: _distribution(key, dimension) for key, dimension in space.items()}


def _distribution(key: str, dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, list):
        return CategoricalDistribution(list(range(len(dimension))))
    low, high, log, step = dimension["low"], dimension["high"], dimension.get("log", False), dimension.get("step")
    if step is not None:  # Optuna wants the last step to meet the end
        high = low + math.floor((high - low) / step + 1e-9) * step
    if _whole(key, low, high):
        return IntDistribution(low, high, log=log, step=step or 1)
    return FloatDistribution(float(low), float(high), log=log, step=step)


def decode(space: Mapping[str, Dimension], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What a sampler drew, as config values."""
    return {key: d[drawn[key]] if isinstance(d, list) else drawn[key] for key, d in space.items()}


def encode(space: Mapping[str, Dimension], params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`decode`."""
    found = {}
    for key, dimension in space.items():
        value = params[key]
        if isinstance(dimension, list):  # by spelling: 1, 1.0 and true are equal to Python and different here
            value = [json.dumps(choice) for choice in dimension].index(json.dumps(value))
        found[key] = value
    return found


# -------------------------------------------------------------------------------------------------- trials


def trial_config(config: RunConfig, settings: Mapping[str, Any], folder: str) -> RunConfig:
    """The config of one trial: the study's, with the family's and the sampler's values; a valid input itself."""
    from pipelines.settings import with_values

    base = replace(config, search=type(config.search)())
    return with_values(base, {**settings, "output.dir": folder})


def extremes(family: Family, key: str, config: RunConfig) -> list[Any]:
    """Smallest and largest value that ``key`` takes in a family (all of them, for choices)."""
    if key in family.space:
        dimension = family.space[key]
        if isinstance(dimension, list):
            return dimension
        low, high = dimension["low"], dimension["high"]
        return [low, high] if _whole(key, low, high) else [float(low), float(high)]
    section, _, name = key.partition(".")
    return [family.fixed.get(key, getattr(getattr(config, section), name))]
