"""Delivers the journals of a run folder, and of its trials, to MLflow while they are written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from gru_core.errors import StorageError
from pipelines import journal
from pipelines.delivery import Delivery
from pipelines.stores import hide
from pipelines.tracking import Mlflow, reason

REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"}
"""MLflow error codes that concern one run; any other error is taken as a store that is away."""


def folders(folder: Path) -> list[Path]:
    """A run folder, then those of its trials or requests."""
    parts = [path for kind in ("trials", "requests") for path in sorted((folder / kind).glob("*"))]
    return [folder, *(path for path in parts if (path / journal.NAME).exists())]


def deliver_all(delivery: Delivery, folder: Path) -> tuple[int, list[str]]:
    """Delivers what is new in the folder and its trials.

    Returns:
        The number of journal lines delivered, and a line for each run that the store refused and each artifact
        that it did not take.

    Raises:
        Exception: the store is away, or failed; what was not delivered is delivered by the next call.
    """
    parent = delivery.open_run(folder)
    if parent is None:
        return 0, []
    count, refused = 0, []
    for each in folders(folder):
        try:
            count += delivery.deliver(each, None if each == folder else parent)
        except StorageError as error:
            refused.append(f"{each.name}: {error}")
        except Exception as error:
            if getattr(error, "error_code", None) not in REFUSED:
                raise
            refused.append(f"{each.name}: {reason(error)}")
        refused += delivery.unsent(each)
    return count, refused


class Courier:
    """A background thread of the driver that keeps MLflow up to date.

    A store that goes away costs the run nothing: one line is said, everything stays in the journals, and
    delivery is tried again, at longer and longer intervals (60 s at most) and once more at the end.

    Args:
        uri: from ``tracking.resolve_uri``, checked at the start.
        experiment: name of the experiment, created where missing (an InputError if that fails).
        folder: the run folder; ``trials/*`` and ``requests/*`` under it become children.
        say: prints a line to the user.
        every: seconds between deliveries.
        before: called before each delivery; must not raise.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        folder: Path,
        *,
        say: Callable[[str], None],
        every: float = 2.0,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.uri, self.folder, self._say, self._every, self._before = uri, folder, say, every, before
        self._delivery = Delivery(Mlflow(uri), experiment)
        self._stop = threading.Event()
        self._busy = threading.Lock()
        self._away: str | None = None
        self._warned = False
        self._refused: list[str] = []
        self._thread = threading.Thread(target=self._work, name="mlflow-courier", daemon=True)

    @property
    def run_id(self) -> str | None:
        """The MLflow run of the folder, once it exists."""
        return self._delivery.run_id(self.folder)

    def start(self) -> Courier:
        """Begins to deliver."""
        self._thread.start()
        return self

    __enter__ = start

    def __exit__(self, *error: object) -> None:
        self.close()

    def flush(self) -> bool:
        """Delivers now, in this thread; True where nothing is left. Never raises."""
        with self._busy:
            self._before()
            try:
                _, self._refused = deliver_all(self._delivery, self.folder)
                self._away = None
            except Exception as error:
                self._away = reason(error)
                if not self._warned:
                    self._warned = True
                    self._say(
                        f"MLflow at {hide(self.uri)} is away ({self._away[:120]}); the run goes on, "
                        f"is recorded in {self.folder}, and is delivered as soon as MLflow answers"
                    )
        return self._away is None and not self._refused

    def _work(self) -> None:
        wait = self._every
        while not self._stop.wait(wait):
            self.flush()
            wait = self._every if self._away is None else min(2 * wait, 60.0)

    def close(self, timeout: float = 30.0) -> bool:
        """Ends the thread after a last delivery, and says what is not delivered, if anything.

        Returns:
            Whether everything is in MLflow.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        done = False
        for attempt in range(3):  # a server that is just restarting
            if self._thread.is_alive() or done or (attempt and self._away is None):
                break
            time.sleep(attempt)
            self._delivery.retry()
            done = self.flush()
        for line in (*dict.fromkeys(self._delivery.notes), *self._refused):
            self._say(f"MLflow: {line}")
        if done and self._warned:
            self._say(f"MLflow at {hide(self.uri)} answers again: everything is delivered")
        if not done:
            left = sum(self._delivery.pending(each) for each in folders(self.folder))
            self._say(
                f"MLflow at {hide(self.uri)}: {left} run(s) are not delivered in full and stand in {self.folder}; "
                f"`gru frontier {self.folder} --sync` delivers them"
            )
        return done
