"""``gru ui``: refuses what it cannot serve, serves what is there, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from gru_core.errors import InputError
from pipelines import ui

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_store_that_does_not_exist_says_what_to_do_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing is recorded yet.*mlflow\.db.*gru demo.*--tracking-uri"):
        ui.run(say=print)
    assert list(tmp_path.iterdir()) == []


def test_a_server_is_opened_in_the_browser_and_not_served_again() -> None:
    with pytest.raises(InputError, match="a tracking server already"):
        ui.run(tracking_uri="http://127.0.0.1:5000", say=print)


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"SQLite format 3\0")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} on 127\.0\.0\.1 cannot be used .*--port"):
            ui.run(port=port, say=print)
    with pytest.raises(InputError, match="--host: got 'no such host'"):
        ui.run(host="no such host", say=print)


def children(parent: int) -> list[int]:
    """Process ids of everything below ``parent``."""
    table = [stat.read_text().rsplit(")", 1)[1].split()[1] + " " + stat.parent.name
             for stat in Path("/proc").glob("[0-9]*/stat") if stat.exists()]  # fmt: skip
    pairs = [tuple(map(int, row.split())) for row in table]
    found: list[int] = []
    level = [parent]
    while level:
        level = [child for above, child in pairs if above in level]
        found += level
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_the_runs_on_this_machine_and_ends_with_all_its_children(tmp_path: Path, how: signal.Signals) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    client.create_experiment("mine", artifact_location=(tmp_path / "mlartifacts").as_uri())
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "ui", "--port", str(port)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        start = time.monotonic()
        line = ""
        while f"http://127.0.0.1:{port}" not in line:
            line = process.stdout.readline()
            assert line, "it ended before it served"
            assert time.monotonic() - start < 60
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search",
            data=json.dumps({"max_results": 10}).encode(), headers={"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=20) as reply:
            names = {each["name"] for each in json.load(reply)["experiments"]}
        assert "mine" in names
        below = children(process.pid)
        assert below
        process.send_signal(how)
        assert process.wait(timeout=30) == 130
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
    alive = [pid for pid in below if Path(f"/proc/{pid}").exists()]
    assert alive == []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
