"""How a section of the config refuses a bad value."""

from __future__ import annotations

import math

from gru_core.errors import ConfigError

# Read by pydantic (when it validates YAML) and by nothing else: unknown keys and silent casts are refused.
STRICT = {"extra": "forbid", "strict": True}


def check(ok: bool, name: str, value: object, allowed: str) -> None:
    """ConfigError where ``ok`` is false."""
    if not ok:
        raise ConfigError(name, value, allowed)


def finite(value: float) -> bool:
    """A finite number (and no bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
