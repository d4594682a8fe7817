"""Tells the user what other processes write into their journals, as it appears."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def watching(tell: Callable[[], None], every: float = 0.5, before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Call ``tell`` every so many seconds in a thread while the block runs, and once more at its end.

    Args:
        before: called each time before ``tell``: brings here what there is to tell.
    """
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(every):
            before()
            tell()

    thread = threading.Thread(target=watch, name="narrator", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        before()
        tell()
