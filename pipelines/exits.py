"""Every failure is one line on standard error and an exit code: 1 failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from gru_core.errors import InputError, NonFiniteError, StorageError, unknown
from pipelines import console

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def guarded(work: Callable[[], object]) -> NoReturn:
    """Does ``work`` and exits: with the code it returns, or with one line on standard error and a code."""
    try:
        code = work()
        if code == INTERRUPTED:  # typer turns Ctrl-C into a code
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except SystemExit:
        raise
    except BaseException as error:  # every failure becomes one line and an exit code
        from pipelines.stores import hide  # here: `gru --help` does without it

        code, line = explain(error)
        if code == FAILED and console.verbose():
            traceback.print_exc()
        print(f"gru: {hide(' '.join(line.split()))}", file=sys.stderr, flush=True)
        sys.exit(code)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for an error; bad input found inside a Ray task is still bad input."""
    for inner in _chain(error):
        if isinstance(inner, InputError):
            return BAD_INPUT, str(inner)
        if isinstance(inner, StorageError | NonFiniteError):
            return FAILED, str(inner)
        if isinstance(inner, KeyboardInterrupt) or type(inner).__name__ == "Abort":
            return INTERRUPTED, "interrupted"
    if hasattr(error, "format_message"):  # an option that typer refused
        return BAD_INPUT, _usage(error)
    lines = str(error).strip().splitlines() or ["no message"]
    line = lines[-1] if any("Traceback" in line for line in lines) else lines[0]
    kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
    return FAILED, f"{kind}{line}{'' if console.verbose() else ' (--verbose shows where)'}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it. Ray wraps an error in a copy of its class: what it wraps comes in its place."""
    inner: BaseException | None = error
    seen: set[int] = set()
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        wrapped = getattr(inner, "cause", None)
        if not isinstance(wrapped, BaseException):
            yield inner
        inner = wrapped if isinstance(wrapped, BaseException) else inner.__cause__


def _usage(error: Any) -> str:
    """What typer refused, with the valid options where one was unknown."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    if type(error).__name__ == "NoSuchOption" and command is not None:
        options = [opt for param in command.params for opt in param.opts if opt.startswith("--")]
        return str(unknown(f"option of {error.ctx.command_path}", error.option_name, [*options, "--help"]))
    return str(error.format_message()).rstrip(".")
