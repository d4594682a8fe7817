"""What the user sees while work is done: our lines, a heartbeat when they pause, and none of the libraries' noise."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TextIO

Say = Callable[[str], None]

_VERBOSE = "GRU_VERBOSE"
_ALWAYS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",  # forked workers would warn, and the texts are short
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # logs an error in local use
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints every line twice
}
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",  # a line for each retry
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns about its own future
}


def quiet(show: bool = False) -> None:
    """Silences the libraries of this process and of those it starts; a variable that is set already is kept.

    Call it before they are imported.

    Args:
        show: let their lines through (``--verbose``); :func:`verbose` tells it to the rest of the program.
    """
    os.environ[_VERBOSE] = "1" if show else "0"
    for name, value in {**_ALWAYS, **({} if show else _QUIET)}.items():
        os.environ.setdefault(name, value)
    if not show:
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)


def verbose() -> bool:
    """Whether ``--verbose`` was given, here or in the process that started this one."""
    return os.environ.get(_VERBOSE) == "1"


class Progress:
    """Prints lines, and a sign of life when none has come for a while. Safe to call from several threads.

    A stream that cannot be written any more (a closed pipe, a full disk) never ends the work itself.

    Args:
        stream: where lines go; standard output by default.
        first: seconds until the first sign of life where nothing has been said yet.
        every: seconds of silence after which one follows. On a terminal it is a line that replaces itself.

    Example:
        >>> with Progress() as say:
        ...     say("training the target model")
    """

    def __init__(self, stream: TextIO | None = None, *, first: float = 4.0, every: float = 10.0) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._terminal = self._stream.isatty()
        self._first, self._every = first, every
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._said = self._shown = time.monotonic()
        self._activity = ""
        self._replaceable = False

    def __call__(self, text: str) -> None:
        """Prints ``text`` at once; its last line is what a sign of life refers to."""
        with self._lock:
            self._write(text + "\n")
            self._said = self._shown = time.monotonic()
            self._activity = (text.strip().splitlines() or [""])[-1][:100].rstrip(" .:")
            self._replaceable = False

    def __enter__(self) -> Progress:
        self._said = self._shown = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with self._lock:
            if self._replaceable:
                self._write("")

    def _beat(self) -> None:
        while not self._stop.wait(min(0.5, self._first / 4, self._every / 4)):
            with self._lock:
                now = time.monotonic()
                pause = self._every if self._activity else self._first
                if self._replaceable:
                    pause = 1.0
                if now - self._shown >= pause:
                    self._sign_of_life(now)

    def _sign_of_life(self, now: float) -> None:
        what = f"still at: {self._activity}" if self._activity else "starting"
        line = f"... {what} ({now - self._said:.0f} s)"
        self._write(line if self._terminal else line + "\n")
        self._shown = now
        self._replaceable = self._terminal
        self._activity = self._activity or "starting"

    def _write(self, text: str) -> None:
        if self._replaceable:
            text = "\r\x1b[K" + text
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Sends whatever this process or its children print to standard error, so that a document stays whole."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def run(
    as_json: bool, work: Callable[[Say], dict[str, Any]], show: Callable[[dict[str, Any]], Iterable[str]]
) -> dict[str, Any]:
    """Does ``work`` under a heartbeat and prints what it returns; libraries print to stderr meanwhile."""
    if as_json:
        with stdout_to_stderr(), Progress(sys.stderr) as say:
            result = work(say)
        print(json.dumps(plain(result)), flush=True)
    else:
        with Progress(sys.stdout) as say:
            result = work(say)
            for line in show(result):
                say(line)
    return result


def plain(value: Any) -> Any:
    """``value`` in JSON's own types: paths and other objects as text, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
