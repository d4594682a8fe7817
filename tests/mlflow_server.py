"""MLflow stores for tests: a real server on a free local port, and SQLite files. Ends only what it started."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path


def free_port() -> int:
    """A local port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@functools.cache
def _template() -> bytes:
    """An empty MLflow database: making one takes seconds, copying it none."""
    from pipelines.tracking import Mlflow

    with tempfile.TemporaryDirectory() as folder:
        Mlflow(f"sqlite:///{folder}/empty.db").client.search_experiments()
        return (Path(folder) / "empty.db").read_bytes()


def empty_store(file: Path) -> str:
    """The URI of a new, empty SQLite store at ``file``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_template())
    return f"sqlite:///{file}"


class Server:
    """``mlflow server`` over a SQLite file in ``folder``; start, kill and start again on the same port."""

    def __init__(self, folder: Path, store: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = store or f"sqlite:///{folder / 'server.db'}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return self
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    self.kill()
                    raise RuntimeError((self.folder / "server.log").read_text()[-2000:]) from None
                time.sleep(0.3)

    def kill(self) -> None:
        """SIGKILL to the server and its workers, which share a session of their own."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.kill()
