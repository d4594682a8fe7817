"""``gru submit`` on real clusters: open, with a token, with another file system, with two nodes."""

# ruff: noqa: F811 (a fixture that is imported has the name of the argument that asks for it)

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gru_core.errors import InputError
from pipelines import cluster as clusters
from pipelines import joblog, jobs, package, provenance, request, settings
from tests.job_study import ROOT, contents, expected_code, model_folder, no_cluster_in_environment, study, tiny, told  # noqa: F401
from tests.ray_head import Head, can_hide, free_port, ray_head, start_head, start_node  # noqa: F401


@pytest.fixture
def short(ray_head: Head, tmp_path: Path) -> Callable[..., tuple[clusters.Cluster, str]]:
    """Submits a shell command the way that commands are submitted."""

    def run(entrypoint: str, address: str | None = None) -> tuple[clusters.Cluster, str]:
        cluster = clusters.connect(address or ray_head.address)
        folder = tmp_path / "job"
        folder.mkdir(exist_ok=True)
        (folder / "data").write_text("x")
        return cluster, jobs.start(cluster, entrypoint, folder, {"gru.command": "test"}, name="test")

    return run


def follow(cluster: clusters.Cluster, job: str, say: Callable[[str], None]) -> dict[str, Any]:
    asked = request.Request("prepare", settings.from_dict({}), False, ())
    return jobs._follow(cluster, job, say, asked)


@pytest.mark.slow
def test_a_job_is_followed_line_by_line_to_its_end(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cret")
    lines, say = told()
    cluster, job = short("echo one; sleep 1; echo two; env")
    found = follow(cluster, job, say)
    assert lines[:2] == ["one", "two"]
    assert {f"{name}={value}" for name, value in jobs.ENVIRONMENT.items()} <= set(lines)
    assert any(line.startswith("RAY_ADDRESS=") for line in lines)
    assert not any("s3cret" in line for line in lines)
    assert (found["status"], found["exit_code"], found["command"]) == ("SUCCEEDED", 0, "test")
    assert found["start"] <= found["end"]


@pytest.mark.slow
def test_how_a_job_ended_is_how_its_command_ends(short: Any) -> None:
    cluster, job = short("echo gru: disk full; exit 1")
    with pytest.raises(RuntimeError, match=rf"{job} failed \(exit code 1\): disk full"):
        follow(cluster, job, lambda line: None)
    cluster, job = short("echo gru: rectify.strength: got -1; exit 2")
    with pytest.raises(InputError, match=rf"{job}: rectify\.strength: got -1"):
        follow(cluster, job, lambda line: None)


@pytest.mark.slow
def test_a_job_is_stopped_and_stays_stopped(short: Any, tmp_path: Path) -> None:
    cluster, job = short(f"echo $$ > {tmp_path}/pid; sleep 600")
    while not (tmp_path / "pid").exists():
        time.sleep(0.1)
    assert jobs.status(job, address=cluster.address)["status"] == "RUNNING"
    found = jobs.stop(job, address=cluster.address)
    assert (found["status"], found["stopped"]) == ("STOPPED", True)
    assert jobs.stop(job, address=cluster.address)["stopped"] is False
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    with pytest.raises(RuntimeError, match="was stopped before it ended"):
        follow(cluster, job, lambda line: None)


@pytest.mark.slow
def test_an_unknown_job_is_bad_input(short: Any) -> None:
    cluster, job = short("true")
    for ask in (jobs.status, jobs.stop):
        with pytest.raises(InputError, match=f"unknown job .*{job[:-1]}x.*did you mean '{job}'"):
            ask(f"{job[:-1]}x", address=cluster.address)


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(short: Any) -> None:
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line == "working":
            os.kill(os.getpid(), signal.SIGINT)

    cluster, job = short("echo working; sleep 600")
    found = follow(cluster, job, say)
    assert found["status"] == "RUNNING"
    shown = "\n".join(lines)
    for words in ("gru submit status", "ray job logs --follow", "gru submit stop"):
        assert f"{words} {job} --address {cluster.address}" in shown
    assert jobs.stop(job, address=cluster.address)["stopped"]


class Proxy:
    """A TCP proxy that can cut every connection through it."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self.target))
            self.open += [client, there]
            for pair in ((client, there), (there, client)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def cut(self) -> None:
        for each in self.open:
            with each:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not an end
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        self.open = []


@pytest.mark.slow
def test_dropped_connections_lose_and_repeat_nothing(short: Any, ray_head: Head) -> None:
    proxy = Proxy(int(ray_head.address.rpartition(":")[2]))
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line in ("3", "6"):
            proxy.cut()

    loop = "for i in 1 2 3 4 5 6 7 8 9; do echo $i; sleep 0.7; done"
    cluster, job = short(loop, f"http://127.0.0.1:{proxy.port}")
    assert follow(cluster, job, say)["status"] == "SUCCEEDED"
    assert lines == [str(n) for n in range(1, 10)]


@pytest.mark.slow
def test_a_cluster_that_goes_away_for_good_is_told(
    short: Any,
    ray_head: Head,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joblog, "LOST_S", 1.0)
    proxy = Proxy(int(ray_head.address.rpartition(":")[2]))

    def say(line: str) -> None:
        if line == "working":
            proxy.server.shutdown(socket.SHUT_RDWR)
            proxy.server.close()
            proxy.cut()

    cluster, job = short("echo working; sleep 600", f"http://127.0.0.1:{proxy.port}")
    with pytest.raises(RuntimeError, match=f"lost the cluster; the job may still run: gru submit status {job}"):
        asyncio.run(joblog.stream(cluster, job, joblog.Log(say, job)))
    assert jobs.stop(job, address=ray_head.address)["stopped"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_own_data_goes_along_and_the_run_comes_back(study: Path, ray_head: Head) -> None:
    """The whole way: uploaded rows, resolved config, model and MLflow in the client's folder."""
    lines, say = told()
    found = jobs.submit(tiny("unlearn", "--json"), address=ray_head.address, wait=True, say=say)
    assert found["status"] == "SUCCEEDED"
    assert found["output"] == str(study / "runs" / "one")
    assert (Path(found["model"]) / "model.safetensors").exists()
    assert found["tracking_uri"] == f"sqlite:///{study / 'mlflow.db'}"
    assert (study / "mlflow.db").exists()
    assert found["result"]["steps"] == 1
    again = jobs.submit(tiny("unlearn", "--json", "--resume"), address=ray_head.address, wait=True, say=say)
    assert again["result"]["run_id"] == found["result"]["run_id"]
    from mlflow import MlflowClient

    tags = MlflowClient(found["tracking_uri"]).get_run(found["result"]["run_id"]).data.tags
    here = provenance.commit()  # the package that was sent has no .git
    assert tags.get("gru.commit", "").removesuffix("+changes") == (here or "").removesuffix("+changes")
    assert not list(study.rglob(".gru-*"))
    assert "What is" not in "\n".join(lines)


@pytest.mark.slow
def test_what_the_cluster_cannot_do_is_refused_and_leaves_nothing(study: Path, ray_head: Head) -> None:
    def refusal(*more: str) -> str:
        before = contents(study)
        with pytest.raises(InputError) as error:
            jobs.submit(tiny("unlearn", *more), address=ray_head.address, wait=True, say=lambda line: None)
        assert contents(study) == before
        return str(error.value)

    start = time.monotonic()
    line = refusal("--tracking-uri", f"http://user:hunter2@127.0.0.1:{free_port()}")
    assert "track.uri: http://127.0.0.1" in line
    assert "--tracking-uri http://HOST:5000" in line
    assert "hunter2" not in line
    assert time.monotonic() - start < 15
    assert "is not empty" in refusal("--output", str(study))
    assert "holds nothing to resume" in refusal("--resume")
    line = refusal("--output", "/proc/new")
    assert line.startswith(("output.dir", "on the cluster: output folder"))
    assert "/proc" in line
    assert "/nowhere/model is not there on the cluster's head" in refusal("--set", "model.path=/nowhere/model")


# ------------------------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def locked() -> Iterator[Head]:
    with start_head(token="right-token") as head:
        yield head


@pytest.mark.slow
def test_token_authentication(locked: Head, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal() -> str:
        with pytest.raises(InputError) as error:
            jobs.submit(tiny(), address=locked.address, wait=True, say=lambda line: None)
        return str(error.value)

    line = refusal()
    assert "uses token authentication and no token was found here" in line
    assert "RAY_AUTH_TOKEN" in line
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-token")
    line = refusal()
    assert "refuses the token from RAY_AUTH_TOKEN" in line
    assert "wrong-token" not in line

    monkeypatch.delenv("RAY_AUTH_TOKEN")
    file = Path.home() / ".ray" / "auth_token"
    file.parent.mkdir(parents=True)
    file.write_text("right-token\n")
    cluster = clusters.connect(locked.address)
    job = jobs.start(cluster, "echo hello", study, {}, name="test")
    lines, say = told()
    assert follow(cluster, job, say)["status"] == "SUCCEEDED"
    assert lines == ["hello"]

    file.unlink()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("right-token")
    assert jobs.status(job, address=locked.address)["status"] == "SUCCEEDED"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_a_cluster_with_a_token(locked: Head, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe and the driver join the cluster with the token of its own processes."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right-token")
    lines, say = told()
    words = tiny("unlearn", "--set", "train.workers=1")
    found = jobs.submit(words, address=locked.address, wait=True, say=say)
    assert found["status"] == "SUCCEEDED"
    assert "right-token" not in "\n".join(lines) + json.dumps(found)


# --------------------------------------------------------------------- a cluster with another file system


needs_mount = pytest.mark.skipif(not can_hide(), reason="needs root and unshare for a file system of its own")


@pytest.mark.slow
@needs_mount
def test_paths_that_the_cluster_does_not_share_are_refused(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster sees an empty folder where the client's working folder is."""
    model_folder(study / "large", 1000)
    shared = tmp_path / "shared"
    shared.mkdir()
    store = ["--tracking-uri", f"sqlite:///{shared}/mlflow.db"]
    with start_head(hide=study) as head:

        def refusal(*more: str) -> str:
            before = contents(tmp_path)
            with pytest.raises(InputError) as error:
                jobs.submit(tiny("unlearn", *more), address=head.address, wait=True, say=lambda line: None)
            assert contents(tmp_path) == before
            return str(error.value)

        fix = "--set output.dir=/shared/runs/name"
        assert refusal() == (
            f"output.dir: {study}/runs/one of this machine is not on the cluster's head; "
            f"set a folder that the cluster shares, such as {fix}"
        )
        line = refusal("--output", str(shared / "one"))
        assert line.startswith(f"track.uri: sqlite:///{study}/mlflow.db of this machine is not on the cluster's head")
        assert "--tracking-uri http://HOST:5000" in line
        monkeypatch.setattr(package, "LIMIT", sum(p.stat().st_size for p in code_files()) + 5000)
        (study / "large" / "model.safetensors").write_bytes(b"0" * 20_000)
        line = refusal("--set", "model.path=large", "--output", str(shared / "one"), *store)
        assert line.startswith(f"model.path: {study}/large is not there on the cluster's head and is too large")

        lines, say = told()
        words = tiny("unlearn", "--output", str(study / "absolute"), *store)
        job = jobs.submit(words, address=head.address, wait=False, say=say)
        assert f"results stay on the cluster: {study}/absolute is not shared with this machine" in lines
        jobs.stop(job["job"], address=head.address)


def code_files() -> list[Path]:
    return [ROOT / name for name in expected_code()]


@pytest.mark.slow
@needs_mount
def test_several_nodes_must_share_the_output_folder(study: Path, tmp_path: Path) -> None:
    """A second node, which sees an empty folder where the output is to be."""
    hidden = tmp_path / "output"
    hidden.mkdir()
    with start_head() as head, start_node(head, hide=hidden):
        words = ["--output", str(hidden / "one"), "--set", "train.workers=2"]
        with pytest.raises(InputError, match=rf"output\.dir: node [\d.]+ does not see {hidden}/one of the head"):
            jobs.submit(tiny("unlearn", *words), address=head.address, wait=True, say=lambda line: None)
        assert contents(hidden) == set()
        lines, say = told()
        job = jobs.submit(tiny("unlearn", "--output", str(hidden / "one")), address=head.address, wait=False, say=say)
        assert any("(1 node)" in line for line in lines)  # no workers: the run stays on the head
        jobs.stop(job["job"], address=head.address)
        shutil.rmtree(hidden / "one", ignore_errors=True)
        job = jobs.submit(tiny("unlearn", *words[2:]), address=head.address, wait=False, say=say)
        assert any("(2 nodes)" in line for line in lines)
        jobs.stop(job["job"], address=head.address)
