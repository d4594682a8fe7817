"""Every failure is one line on standard error and an exit code: 1 failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from gru_core.errors import InputError, unknown
from pipelines import console


def guarded(work: Callable[[], object]) -> NoReturn:
    """Does ``work`` and exits: with the code it returns, or with one line on standard error and a code."""
    try:
        code = work()
        sys.exit(code if isinstance(code, int) else 0)
    except SystemExit:
        raise
    except BaseException as error:  # every failure becomes one line and an exit code
        code, line = explain(error)
        if code == 1 and console.verbose():
            traceback.print_exc()
        print(f"gru: {' '.join(line.split())}", file=sys.stderr, flush=True)
        sys.exit(code)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for an error; bad input found inside a Ray task is still bad input."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, InputError) and not hasattr(inner, "cause"):
            return 2, str(inner)
        if isinstance(inner, KeyboardInterrupt) or type(inner).__name__ == "Abort":
            return 130, "interrupted"
        inner = getattr(inner, "cause", None) or inner.__cause__
    if hasattr(error, "format_message"):  # an option that typer refused
        return 2, _usage(error)
    text = str(error).strip()
    hint = "" if console.verbose() else " (--verbose shows where)"
    return 1, f"{type(error).__name__}: {text.splitlines()[-1] if text else 'no message'}{hint}"


def _usage(error: Any) -> str:
    """What typer refused, with the valid options where one was unknown."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    if type(error).__name__ == "NoSuchOption" and command is not None:
        options = [opt for param in command.params for opt in param.opts if opt.startswith("--")]
        return str(unknown(f"option of {error.ctx.command_path}", error.option_name, [*options, "--help"]))
    return str(error.format_message()).rstrip(".")
