"""Follows the log of a Ray job to its end, over dropped connections, and says how it ended."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, cast

from gru_core.errors import InputError
from pipelines.cluster import Cluster, details

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

Say = Callable[[str], None]

LOST_S = 60.0
"""How long a cluster may be out of reach while its log is followed."""
SILENT_S = 30.0
"""Silence of a log after which the cluster is asked whether the job still runs."""
BAD_INPUT = 2
"""Exit code of a command that refused its input."""


class Log:
    """Splits a log that comes in pieces into lines, says them, and keeps the last ones."""

    def __init__(self, say: Say, job: str) -> None:
        self._say = say
        self._entry = f"Running entrypoint for job {job}:"
        self._rest = ""
        self.seen = 0
        self.lines: collections.deque[str] = collections.deque(maxlen=20_000)

    def piece(self, text: str, position: int) -> None:
        """``text`` ends at ``position`` of the log; what was said already is left out."""
        new = text[max(0, len(text) - (position - self.seen)) :] if position > self.seen else ""
        self.seen = max(self.seen, position)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self._line(line)

    def end(self) -> None:
        if self._rest:
            self._line(self._rest)
            self._rest = ""

    def _line(self, line: str) -> None:
        line = line.rstrip("\r").rpartition("\r")[2]
        # Ray's own two lines; the second may come late, for Ray starts the command before it writes it.
        if line.startswith(self._entry) or (not self.lines and "INFO job_manager.py" in line):
            return
        self.lines.append(line)
        self._say(line)

    def document(self) -> Any:
        """The JSON document that the log ends with, or None."""
        lines = list(self.lines)
        for index in range(len(lines) - 1, -1, -1):
            if lines[index].startswith("{"):
                with contextlib.suppress(ValueError):
                    return json.loads("\n".join(lines[index:]))
        return None


async def stream(cluster: Cluster, job: str, log: Log) -> JobDetails:
    """Follows the log until the job has ended, over dropped connections.

    Raises:
        RuntimeError: the cluster was out of reach for ``LOST_S``.
    """
    import aiohttp

    lost: float | None = None
    while True:
        with contextlib.suppress(aiohttp.ClientError, RuntimeError, OSError):
            await _tail(cluster, job, log)
        try:
            found = details(cluster, job)
            lost = None
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
            lost = lost or time.monotonic()
            if time.monotonic() - lost > LOST_S:
                how = f"gru submit status {job} --address {cluster.address}"
                raise RuntimeError(f"lost the cluster; the job may still run: {how}") from error
            await asyncio.sleep(2)
            continue
        if found.status.is_terminal():
            with contextlib.suppress(OSError, RuntimeError):  # what a dropped connection swallowed at the end
                text = cluster.client.get_job_logs(job)
                log.piece(text, len(text))
            log.end()
            return found
        await asyncio.sleep(0.5)


async def _tail(cluster: Cluster, job: str, log: Log) -> None:
    """One connection's worth of log. A peer that has silently gone is noticed by asking for the job's state."""
    position = 0
    stream = cast(AsyncGenerator[str, None], cluster.client.tail_job_logs(job))
    async with contextlib.aclosing(stream) as pieces:
        while True:
            piece = asyncio.ensure_future(anext(pieces, None))
            try:
                while not (await asyncio.wait({piece}, timeout=SILENT_S))[0]:
                    if (await asyncio.to_thread(cluster.client.get_job_status, job)).is_terminal():
                        return
            finally:
                if not piece.done():
                    piece.cancel()
                    await asyncio.wait({piece})
            if (text := piece.result()) is None:
                return
            position += len(text)
            log.piece(text, position)


def finish(found: JobDetails, log: Log) -> None:
    """Passes over a job that succeeded.

    Raises:
        InputError: the job refused its input.
        RuntimeError: it failed or was stopped; the last line of its log says why.
    """
    state, job = found.status.value, found.submission_id
    if state == "SUCCEEDED":
        return
    if state == "STOPPED":
        raise RuntimeError(f"{job} was stopped before it ended")
    said = [line.strip() for line in log.lines if line.strip()] or (found.message or "no message").splitlines()
    last = said[-1].removeprefix("gru: ")
    if found.driver_exit_code == BAD_INPUT:
        raise InputError(f"{job}: {last}")
    code = "" if found.driver_exit_code is None else f" (exit code {found.driver_exit_code})"
    raise RuntimeError(f"{job} failed{code}: {last}")
