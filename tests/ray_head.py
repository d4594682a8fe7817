"""A real ``ray start --head`` for tests, on ports and in a folder of its own, gone afterwards.

Import the fixture where it is used: ``from tests.ray_head import ray_head  # noqa: F401``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

START_S, STOP_S = 90, 8


@dataclass(frozen=True)
class Head:
    """A running head node.

    Attributes:
        address: URL of its dashboard, for ``--address``.
        gcs: ``host:port`` that further nodes join.
        env: environment of a client of it (without a token, unless one was given to :func:`start_head`).
    """

    address: str
    gcs: str
    env: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def client_env(**extra: str) -> dict[str, str]:
    """This environment without anything that names another cluster or a token."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return {name: value for name, value in os.environ.items() if name not in names} | extra


@contextlib.contextmanager
def start_head(
    *,
    token: str | None = None,
    cpus: int = 2,
    env: Mapping[str, str] | None = None,
    hide: Path | None = None,
) -> Iterator[Head]:
    """Starts a head node and ends it, and everything it started, by its process session.

    Args:
        token: token that clients must show; None: an open cluster.
        env: more environment of the cluster's processes.
        hide: folder over which the cluster sees an empty file system of its own (needs root and ``unshare``).
    """
    folder = Path(tempfile.mkdtemp(prefix="gruray"))  # short: Ray's sockets stand in it
    gcs, dashboard = free_port(), free_port()
    home = folder / "home"
    home.mkdir()
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    # A PATH without our environment: a cluster need not have been started from an activated one.
    paths = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(home)}
    whole = client_env(RAY_USAGE_STATS_ENABLED="0", **paths, **secret) | dict(env or {})
    whole.pop("PYTHONPATH", None)
    ray = str(Path(sys.executable).with_name("ray"))
    command = [
        ray, "start", "--head", "--block", "--port", str(gcs), "--num-cpus", str(cpus), "--num-gpus", "0",
        "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--include-dashboard", "true",
        "--ray-client-server-port", str(free_port()), "--dashboard-agent-listen-port", "0",
        "--object-store-memory", "200000000", "--temp-dir", str(folder / "ray"), "--disable-usage-stats",
    ]  # fmt: skip
    log = folder / "head.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            _hidden(command, hide), env=whole, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder
        )
    try:
        _wait(process, dashboard, log)
        yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", client_env())
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def start_node(head: Head, *, cpus: int = 1, hide: Path | None = None) -> Iterator[None]:
    """A further node of an open cluster, on this machine; ``hide`` as in :func:`start_head`."""
    folder = Path(tempfile.mkdtemp(prefix="gruray"))
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--block", "--address", head.gcs, "--num-cpus", str(cpus),
        "--num-gpus", "0", "--object-store-memory", "100000000", "--disable-usage-stats",
        "--dashboard-agent-listen-port", "0",
    ]  # fmt: skip
    log = folder / "node.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            _hidden(command, hide), env=client_env(RAY_AUTH_MODE="disabled", HOME=str(folder)),
            stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while b"This command will now block" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the node did not start: {log.read_text()[-2000:]}")
            time.sleep(0.3)
        yield
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _hidden(command: list[str], hide: Path | None) -> list[str]:
    if hide is None:
        return command
    return ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(hide), *command]


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"ray start ended with {process.returncode}: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=1).close()
                return
            except urllib.error.HTTPError as error:
                if error.code == 401:  # up, and asks for a token
                    return
        time.sleep(0.3)
    raise RuntimeError(f"the dashboard did not answer within {START_S} s: {log.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the head, which ends its children; then SIGKILL to what is left of its session."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    for pid in _session(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _session(leader: int) -> list[int]:
    """Processes of the session that ``leader`` opened; Ray gives its workers groups of their own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ProcessLookupError):
                if os.getsid(int(entry.name)) == leader:
                    found.append(int(entry.name))
    return found


def can_hide() -> bool:
    """Whether :func:`start_head` can give the cluster a file system of its own."""
    test = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(test, capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """An open cluster of one node with two CPUs and an empty model cache, shared by the tests of a session."""
    with start_head(env={"GRU_CACHE": str(tmp_path_factory.mktemp("cache"))}) as head:
        yield head
