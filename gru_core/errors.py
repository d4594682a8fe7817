"""Errors that people read. Each is one line that names what was wrong, what was given, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user: one clear line. The command line exits with 2 on it."""


class ConfigError(InputError):
    """A config field with a value that is not allowed.

    Args:
        field: dotted name, such as ``rectify.strength``.
        value: what was given.
        allowed: what is allowed, in words.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}: got {value!r}, allowed: {allowed}")
        self.field, self.value, self.allowed = field, value, allowed

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:  # crosses process borders under Ray
        return type(self), (self.field, self.value, self.allowed)


class NonFiniteError(RuntimeError):
    """A loss or Gram entry that is not finite; raised before the optimizer touches a weight."""

    def __init__(self, step: int, stream: str, value: float) -> None:
        super().__init__(f"step {step}: the {stream} is {value}; no weight was changed in this step")
        self.step, self.stream, self.value = step, stream, value

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.step, self.stream, self.value)


class StorageError(RuntimeError):
    """A write failed (disk full, folder gone). The message names the last valid checkpoint."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> InputError:
    """An InputError for a name that is not in a registry: lists the valid names, nearest match first."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {kind} {name!r}{hint} (valid: {', '.join(names)})")
