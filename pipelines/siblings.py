"""Processes of ours that work side by side under one lock: when one fails, the others end at once."""

from __future__ import annotations

import fcntl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from gru_core.errors import InputError

BAD_INPUT = 2
"""Exit code of a process whose last line is what was wrong with its input."""


@contextmanager
def locked(file: Path, waiting: Callable[[], None]) -> Iterator[int]:
    """Holds ``file`` and gives its descriptor; calls ``waiting`` once where another process holds it, and waits.

    The file stays when the lock is gone: one that was removed could be held twice.
    """
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def run(commands: Mapping[str, Sequence[str]], lock: int) -> None:
    """Runs every command in a process of its own and waits for all.

    Args:
        commands: name, as an error tells it, to the words of the command.
        lock: descriptor of a lock that all inherit: should this process be killed, nobody else gets the lock
            before they have ended too.

    Raises:
        InputError: one ended with ``BAD_INPUT``; its last line.
        RuntimeError: one failed; its last line.
    """
    with ExitStack() as stack:
        running: dict[str, subprocess.Popen[bytes]] = {}
        stack.callback(_end, running)
        printed = {name: stack.enter_context(tempfile.TemporaryFile()) for name in commands}
        for name, command in commands.items():
            running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=printed[name], stderr=subprocess.STDOUT, pass_fds=(lock,)
            )
        while running:
            for name, process in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[name]
                if code:
                    raise _failure(name, code, printed[name])
            time.sleep(0.05)


def _end(running: Mapping[str, subprocess.Popen[bytes]]) -> None:
    for process in running.values():
        process.kill()
        process.wait()


def _failure(name: str, code: int, output: IO[bytes]) -> Exception:
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else f"it ended with code {code}"
    return InputError(last) if code == BAD_INPUT else RuntimeError(f"{name} failed: {last}")
