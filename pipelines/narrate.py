"""Tells the user what other processes write into their journals, as it appears."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def watching(tell: Callable[[], None], every: float = 0.5) -> Iterator[None]:
    """Call ``tell`` every so many seconds in a thread while the block runs, and once more at its end."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(every):
            tell()

    thread = threading.Thread(target=watch, name="narrator", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        tell()
