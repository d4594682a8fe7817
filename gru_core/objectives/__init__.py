"""Forget objectives, one a file, by the name that their paper gives them."""

from __future__ import annotations

from collections.abc import Callable

from gru_core.config import UnlearnConfig
from gru_core.errors import ConfigError, unknown
from gru_core.objectives.base import AnswerLosses, Objective
from gru_core.objectives.ga import GradientAscent
from gru_core.objectives.npo import NegativePreference
from gru_core.objectives.simnpo import SimpleNegativePreference
from gru_core.objectives.wga import WeightedGradientAscent

OBJECTIVES: dict[str, Callable[[UnlearnConfig], Objective]] = {
    "ga": GradientAscent,
    "wga": WeightedGradientAscent,
    "npo": NegativePreference,
    "simnpo": SimpleNegativePreference,
}


def build_objective(config: UnlearnConfig) -> Objective:
    """The objective that ``config.objective`` names.

    Raises:
        InputError: no such objective.
        ConfigError: a beta or delta that the objective would ignore.
    """
    if config.objective not in OBJECTIVES:
        raise unknown("objective", config.objective, OBJECTIVES)
    objective = OBJECTIVES[config.objective](config)
    if config.beta is not None and objective.default_beta is None:
        raise ConfigError("unlearn.beta", config.beta, f"null with objective {config.objective!r}, which has none")
    if config.delta != 0 and config.objective != "simnpo":
        raise ConfigError("unlearn.delta", config.delta, f"0 with objective {config.objective!r}, which has none")
    return objective


__all__ = ["OBJECTIVES", "AnswerLosses", "Objective", "build_objective"]
