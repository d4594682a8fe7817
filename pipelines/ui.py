"""``gru ui``: MLflow's own pages over a tracking store, on this machine only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gru_core.config import TrackConfig
from gru_core.errors import InputError
from pipelines.authentication import is_local
from pipelines.console import Say, verbose
from pipelines.stores import check, hide, resolve_uri, sqlite_file

START_S = 90.0
"""Longest wait for the server's first answer."""
END_S = 5.0
"""Grace between asking the server to end and ending it."""


def run(*, tracking_uri: str | None = None, host: str = "127.0.0.1", port: int = 5000, say: Say) -> None:
    """Serves the store until Ctrl-C (or SIGTERM), which ends the server and all it started.

    Args:
        tracking_uri: the store; None: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working folder.
        host: address to listen on. MLflow asks nobody for a password: leave it on this machine.

    Raises:
        InputError: no store there yet, a store that is a server already, or a port that is taken.
        RuntimeError: the server ended by itself.
    """
    uri = resolve_uri(TrackConfig(uri=tracking_uri))
    _check_store(uri)
    _check_port(host, port)
    signal.signal(signal.SIGTERM, _interrupt)
    if not is_local(host):
        say(
            f"warning: MLflow on {host} asks nobody for a password: everybody on the network can read, change and "
            "delete what is recorded"
        )
    say(f"starting MLflow over {hide(uri)} ...")
    server = subprocess.Popen(_command(uri, host, port), start_new_session=True, env=_environment(), stdout=_sink(),
                              stderr=_sink())  # fmt: skip
    try:
        _wait(server, host, port)
        say(f"MLflow: http://{host}:{port}  (Ctrl-C ends it)")
        server.wait()
        raise RuntimeError(f"the MLflow server ended by itself (exit code {server.returncode}); --verbose shows why")
    finally:
        _end(server)


def _check_store(uri: str) -> None:
    if uri.startswith(("http://", "https://")) or uri.startswith("databricks"):
        raise InputError(f"{hide(uri)} is a tracking server already: open it in the browser")
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise InputError(
            f"nothing is recorded yet: {file} does not exist; run something first (gru demo), or name a store "
            "with --tracking-uri"
        )
    check(uri)


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        raise InputError(f"--host: got {host!r}, allowed: an address of this machine") from None
    except OSError as error:
        raise InputError(
            f"port {port} on {host} cannot be used ({error.strerror}); choose another with --port"
        ) from None


def _command(uri: str, host: str, port: int) -> list[str]:
    file = sqlite_file(uri)
    artifacts = ((file.parent if file else Path.cwd()) / "mlartifacts").as_uri()
    return [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", host, "--port", str(port),
        "--default-artifact-root", artifacts, "--workers", "1",
    ]  # fmt: skip


def _environment() -> dict[str, str]:
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {**os.environ, **quiet}


def _sink() -> int | None:
    return None if verbose() else subprocess.DEVNULL


def _wait(server: subprocess.Popen[bytes], host: str, port: int) -> None:
    """Returns once the server answers."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{shown}]:{port}/health" if ":" in shown else f"http://{shown}:{port}/health"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business here
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the MLflow server did not start (exit code {server.returncode}); --verbose shows why")
        try:
            with direct.open(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the MLflow server did not answer within {START_S:.0f} s; --verbose shows why")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends the server's whole process group: workers outlive a parent that is killed alone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        end = time.monotonic() + END_S
        while time.monotonic() < end and _alive(server):
            time.sleep(0.05)
    server.wait()


def _alive(server: subprocess.Popen[bytes]) -> bool:
    server.poll()
    try:
        os.killpg(server.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
