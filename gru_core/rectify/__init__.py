"""Rules that turn a forget gradient and a retain gradient into one update."""

from __future__ import annotations

from collections.abc import Callable

from gru_core.config import RectifyConfig
from gru_core.errors import unknown
from gru_core.rectify.combine import combine
from gru_core.rectify.gradient_difference import GradientDifference
from gru_core.rectify.gram import Gram, gram, squared_norm
from gru_core.rectify.gru import Gru
from gru_core.rectify.plain import Plain
from gru_core.rectify.rules import Rule

RULES: dict[str, Callable[[RectifyConfig], Rule]] = {
    "none": Plain,
    "sum": GradientDifference,
    "gru": Gru,
}


def build_rule(config: RectifyConfig) -> Rule:
    """The rule that ``config.rule`` names.

    Raises:
        InputError: no such rule.
        ConfigError: a setting that the rule refuses.
    """
    if config.rule not in RULES:
        raise unknown("rule", config.rule, RULES)
    return RULES[config.rule](config)


__all__ = ["RULES", "Gram", "Rule", "build_rule", "combine", "gram", "squared_norm"]
