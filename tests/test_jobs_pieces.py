"""``gru submit`` without a cluster: what is refused here, what is sent, how answers are judged, how logs are read."""

# ruff: noqa: F811 (a fixture that is imported has the name of the argument that asks for it)

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gru_core.errors import InputError
from pipelines import cluster as clusters
from pipelines import joblog, jobs, package, preflight, probe, provenance, request, settings
from tests.job_study import ROOT, contents, expected_code, model_folder, no_cluster_in_environment, study, tiny, told  # noqa: F401
from tests.ray_head import free_port

# -------------------------------------------------------------------------------------- the command line


def test_a_command_line_resolves_paths_and_keeps_flags(study: Path) -> None:
    found = request.parse(tiny("unlearn", "--set", "unlearn.lr=0.5", "--resume", "--json"))
    assert found.command == "unlearn"
    assert found.shared_output
    assert found.config.output.dir == str(study / "runs" / "one")
    assert found.config.track.uri == f"sqlite:///{study / 'mlflow.db'}"
    assert found.config.unlearn.lr == 0.5
    assert found.flags == ("--resume", "--json")


def test_options_win_over_set_and_set_over_the_file(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment:1")
    words = ["--set", "output.dir=/set", "--output", "/option", "--set", "track.uri=http://set:1"]
    found = request.parse(tiny("search", *words)).config
    assert (found.output.dir, found.track.uri) == ("/option", "http://set:1")
    assert request.parse(tiny()).config.track.uri == "http://from-environment:1"
    assert request.parse(tiny("unlearn", "--tracking-uri", "http://o:1")).config.track.uri == "http://o:1"


def test_demo_is_submitted_as_the_search_that_it_is(study: Path) -> None:
    found = request.parse(["demo"])
    assert found.command == "search"
    assert found.config.search == settings.load("demo").search


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "unknown command for a job ''"),
        (["serch"], "did you mean 'search'"),
        (["doctor"], "valid: demo, prepare, requests, search, unlearn"),
        (["search", "--sett", "a=1"], "submit search: unrecognized arguments: --sett a=1"),
        (["prepare", "--resume"], "unrecognized arguments: --resume"),
        (["search", "-c"], "expected one argument"),
        (["search", "-c", "missing.yaml"], "no config file or shipped study 'missing.yaml'"),
        (tiny("unlearn", "--set", "rectify.strength=-1"), "rectify.strength: got -1"),
        (tiny("unlearn", "--set", "unlearn.objective=nop"), "did you mean 'npo'"),
        (tiny("unlearn", "--set", "track.uri=./mlruns"), "track.uri: got './mlruns'"),
        (tiny("unlearn", "--set", "benchmark.forget=gone.jsonl"), "benchmark.forget: there is no file 'gone.jsonl'"),
        (tiny("unlearn", "--set", "benchmark.forget=runs"), "benchmark.forget: 'runs' is no file"),
        (tiny("unlearn", "--set", "model.path=./gone"), "model.path: there is no folder './gone'"),
        (tiny("unlearn", "--set", "model.path=runs"), "has no config.json"),
        (tiny("unlearn", "--set", "retain.size=1000"), "retain.size: got 1000"),
        (tiny("unlearn", "--set", "benchmark.retain=bad.jsonl"), "bad.jsonl"),
    ],
)
def test_bad_input_is_refused_before_any_cluster_is_asked(study: Path, arguments: list[str], line: str) -> None:
    (study / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": 3}\n')
    lines, say = told()
    with pytest.raises(InputError) as error:
        jobs.submit(arguments, address="http://127.0.0.1:9", wait=True, say=say)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert lines == []


# ---------------------------------------------------------------------------------------------- the package


def test_a_package_holds_code_config_and_named_inputs_only(study: Path, tmp_path: Path) -> None:
    (study / "forget rows.jsonl").rename(tmp_path / "elsewhere.jsonl")
    (study / "forget rows.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    config = request.parse(tiny()).config
    folder = tmp_path / "package"
    folder.mkdir()
    built = package.build(config, folder)
    inputs = {"inputs/benchmark.forget/forget rows.jsonl", "inputs/benchmark.retain/retain rows.jsonl"}
    assert contents(folder) == expected_code() | inputs | {"config.yaml", "find_python.sh"}
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    sent = folder / "inputs" / "benchmark.forget" / "forget rows.jsonl"
    assert sent.read_bytes() == (tmp_path / "elsewhere.jsonl").read_bytes()
    assert built.remote == ()
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert on_disk - len(package.FIND_PYTHON) == built.size


def test_the_packaged_config_is_the_checked_one_but_for_input_paths(study: Path, tmp_path: Path) -> None:
    config = request.parse(tiny()).config
    folder = tmp_path / "package"
    folder.mkdir()
    built = package.build(config, folder)
    sent, checked = settings.flat(settings.load(str(folder / "config.yaml"))), settings.flat(config)
    assert {key for key in checked if sent[key] != checked[key]} == {"benchmark.forget", "benchmark.retain"}
    assert {key: sent[key] for key in built.uploaded} == built.uploaded


def test_a_tofu_folder_is_sent_as_the_files_that_its_split_reads(shared_data: Path, tmp_path: Path) -> None:
    from gru_core.benchmarks import load_benchmark

    data = {"name": "tofu", "split": "forget01", "data_dir": str(shared_data / "tofu")}
    config = settings.from_dict({"benchmark": data})
    built = package.build(config, tmp_path)
    names = {path.name for path in (tmp_path / "inputs" / "benchmark.data_dir").iterdir()}
    assert names == {
        "forget01.json", "retain99.json", "forget01_perturbed.json", "retain_perturbed.json",
        "real_authors_perturbed.json", "world_facts_perturbed.json", "holdout01.json",
    }  # fmt: skip
    there = settings.with_values(config, {"benchmark.data_dir": str(tmp_path / built.uploaded["benchmark.data_dir"])})
    assert load_benchmark(there.benchmark).fingerprint() == load_benchmark(config.benchmark).fingerprint()


def test_a_small_model_is_sent_without_pickles_and_a_large_one_must_be_there(study: Path, tmp_path: Path) -> None:
    model_folder(study / "small", 1000)
    model_folder(study / "large", package.LIMIT)
    config = settings.from_dict({"model": {"path": "small"}, "retain_model": "large"})
    built = package.build(config, tmp_path)
    assert contents(tmp_path / "inputs") == {
        f"model.path/{name}" for name in ("config.json", "tokenizer.json", "model.safetensors")
    }
    assert built.uploaded == {"model.path": "inputs/model.path"}
    (remote,) = built.remote
    assert (remote.key, remote.path) == ("retain_model", study / "large")
    assert remote.listing() == {"config.json": 2, "tokenizer.json": 2, "model.safetensors": package.LIMIT}


def test_hub_models_are_left_to_the_cluster_and_absolute_paths_must_be_there(study: Path, tmp_path: Path) -> None:
    config = settings.from_dict({"model": {"path": "owner/name"}, "retain_model": "/cluster/only"})
    assert [item.key for item in package.build(config, tmp_path).remote] == ["retain_model"]


def test_a_search_over_model_folders_names_them_by_absolute_paths(study: Path, tmp_path: Path) -> None:
    model_folder(study / "small", 10)
    space = {"search": {"space": {"model.path": ["owner/name", "small"]}}}
    with pytest.raises(InputError, match=r"search\.space\.model\.path: got 'small'"):
        package.build(settings.from_dict(space), tmp_path)
    space["search"]["space"]["model.path"] = [str(study / "small")]
    (remote,) = package.build(settings.from_dict(space), tmp_path).remote
    assert remote.key == "search.space.model.path"


def fake_code(root: Path) -> set[str]:
    """A package with things around and in it that are nobody's business; returns what belongs to the code."""
    code = {"fakecode/__init__.py", "fakecode/part/one.py", "fakecode/study.yaml", "fakecode/py.typed"}
    others = {
        ".git/config", "data/rows.py", "fakecode/.git/hooks.py", "fakecode/.env", "fakecode/__pycache__/one.py",
        "fakecode/runs/one/config.yaml", "fakecode/runs/one/model.safetensors", "fakecode/mlflow.db",
        "fakecode/data/rows.jsonl", "fakecode/data/rows.json", "fakecode/weights.pt", "fakecode/token",
    }  # fmt: skip
    for name in code | others:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    return code


def test_neither_history_nor_data_nor_results_travel_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = fake_code(tmp_path / "tree")
    monkeypatch.syspath_prepend(tmp_path / "tree")
    monkeypatch.setattr(package, "CODE", ("fakecode",))
    sent = tmp_path / "package"
    sent.mkdir()
    built = package.build(settings.from_dict({}), sent)
    assert contents(sent) == code | {"config.yaml", "find_python.sh"}
    assert built.size < 20_000


def test_code_that_is_too_large_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_code(tmp_path / "tree")
    monkeypatch.syspath_prepend(tmp_path / "tree")
    monkeypatch.setattr(package, "CODE", ("fakecode",))
    with (tmp_path / "tree" / "fakecode" / "large.py").open("wb") as file:
        file.truncate(package.LIMIT)
    sent = tmp_path / "package"
    sent.mkdir()
    with pytest.raises(InputError) as error:
        package.build(settings.from_dict({}), sent)
    assert str(error.value) == "the code here has 50.0 MiB, a job takes 50 MiB at most"


def test_an_input_that_is_too_large_to_be_sent_is_one_line(study: Path, tmp_path: Path) -> None:
    """A large file is not sent; where the cluster lacks it, the refusal says so with both sizes."""
    with (study / "forget rows.jsonl").open("ab") as file:
        file.truncate(package.LIMIT + 2**20)
    sent = tmp_path / "package"
    sent.mkdir()
    built = package.build(request.parse(tiny()).config, sent)
    (large,) = built.remote
    assert large.key == "benchmark.forget"
    assert sum(path.stat().st_size for path in sent.rglob("*") if path.is_file()) < package.LIMIT / 10
    report = good_report(here=good_node(inputs={"benchmark.forget": "is not there"}))
    with pytest.raises(InputError) as error:
        preflight.judge(report, PLAN, [large], MARKS)
    expected = (
        "is not there on the cluster's head and is too large to be sent (51 MiB, limit 50 MiB); put it on storage"
    )
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_job_knows_the_commit_of_the_code_that_it_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes: the client in a git checkout, the job in the package that it sent."""
    checkout, sent = tmp_path / "checkout", tmp_path / "package"
    shutil.copytree(ROOT / "pipelines", checkout / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "gru_core", checkout / "gru_core", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(checkout), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    shutil.copytree(checkout, sent, ignore=shutil.ignore_patterns(".git"))
    ask = "import json; from pipelines import provenance; print(json.dumps([provenance.carried(), provenance.tags()]))"
    kept = {name: value for name, value in os.environ.items() if name not in ("GRU_COMMIT", "PYTHONPATH")}

    def told_in(folder: Path, **variables: str) -> tuple[dict[str, str], str | None]:
        line = [sys.executable, "-c", ask]
        done = subprocess.run(line, cwd=folder, env=kept | variables, capture_output=True, text=True, check=True)
        carried, tags = json.loads(done.stdout)
        return carried, tags.get("gru.commit")

    carried, tag = told_in(checkout)
    assert (carried, tag) == ({"GRU_COMMIT": head}, head)
    assert told_in(sent) == ({}, None)
    assert told_in(sent, **carried)[1] == head
    assert told_in(sent, GRU_COMMIT="my password")[1] is None
    assert told_in(checkout, GRU_COMMIT="0" * 40)[1] == head  # what git says counts
    (checkout / "pipelines" / "__init__.py").write_text('"""Changed."""\n')
    changed = told_in(checkout)[0]
    assert changed == {"GRU_COMMIT": f"{head}+changes"}
    assert told_in(sent, **changed)[1] == f"{head}+changes"


def test_the_commit_is_among_the_variables_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "commit", lambda: "abcdef1")
    sent: dict[str, Any] = {}

    class Client:
        def submit_job(self, **words: Any) -> str:
            sent.update(words)
            return "job"

    cluster: Any = clusters.Cluster("http://h:1", Client())  # type: ignore[arg-type]
    assert jobs.start(cluster, "true", tmp_path, {}, name="test") == "job"
    assert sent["runtime_env"]["env_vars"] == {**jobs.ENVIRONMENT, "GRU_COMMIT": "abcdef1"}


class Slow:
    """A cluster, its client and a clock: the job, given a time to stop, ends so many seconds after it was asked to."""

    def __init__(self, ends: float, runtime_env: dict[str, Any]) -> None:
        self.ends, self.runtime_env, self.now = ends, runtime_env, 0.0
        self.address, self.client, self.stop_job = "http://h:1", self, lambda job: True

    def get_job_info(self, job: str) -> Any:
        from ray.dashboard.modules.job.pydantic_models import JobDetails

        status = "STOPPED" if self.now >= self.ends else "RUNNING"
        words = {"type": "SUBMISSION", "submission_id": job, "entrypoint": "true", "runtime_env": self.runtime_env}
        return JobDetails(status=status, **words)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("ends", "runtime_env", "stopped"),
    [
        (619, {"env_vars": jobs.environment(600)}, True),
        (700, {"env_vars": jobs.environment(600)}, False),
        (49, {}, True),
        (49, {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "<redacted>"}}, True),
        (100, {}, False),
    ],
)
def test_a_stopped_job_has_the_time_that_it_was_given(
    monkeypatch: pytest.MonkeyPatch, ends: float, runtime_env: dict[str, Any], stopped: bool
) -> None:
    slow = Slow(ends, runtime_env)
    monkeypatch.setattr(clusters, "connect", lambda address: slow)
    monkeypatch.setattr(jobs, "time", slow)
    if stopped:
        assert jobs.stop("job", address=None)["stopped"]
    else:
        with pytest.raises(RuntimeError, match=r"job was asked to stop .* and still runs"):
            jobs.stop("job", address=None)


# ------------------------------------------------------------------------------------ what the cluster says


def test_lowest_versions_and_modules_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {}
    for line in project["dependencies"]:
        name, low = re.match(r"([\w-]+)(?:\[[^]]*\])?>=([\d.]+)", line).groups()  # type: ignore[union-attr]
        wanted[name] = low
    assert {name: wanted[name] for name in preflight.MINIMUM} == preflight.MINIMUM
    assert set(wanted) <= set(preflight.MODULES.values())
    assert project["requires-python"] == ">=" + ".".join(map(str, preflight.PYTHON))


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "c"
    with probe.written(str(target), "marker") as error:
        assert error is None
        assert (target / "marker").exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("kept")
    with probe.written(str(tmp_path / "file" / "below"), "marker") as error:
        assert error is not None
        assert "ot a directory" in error
    assert contents(tmp_path) == {"file"}


def test_inputs_are_compared_by_name_and_size(tmp_path: Path) -> None:
    def compare(path: Path, **files: int) -> str:
        return probe._compare({"path": str(path), "files": files})

    (tmp_path / "rows").write_text("123")
    assert compare(tmp_path, rows=3) == compare(tmp_path / "rows", rows=3) == compare(tmp_path) == "same"
    assert compare(tmp_path, rows=4) == "has another rows (its size differs)"
    assert compare(tmp_path, other=1) == "lacks other"
    assert compare(tmp_path / "gone") == "is not there"


PLAN = preflight.Plan(output=Path("/out"), shared_output=True, tracking="sqlite:////db/mlflow.db")
MARKS = {"output": "/out/.m", "tracking": "/db/.m"}
BIG = package.Input("model.path", Path("/models/big"), {})


def good_node(**changes: Any) -> dict[str, Any]:
    versions = {name: "99.0+cpu" for name in preflight.MINIMUM}
    node = {"node": "n", "python": "/py", "version": "3.11.1", "missing": [], "versions": versions, "unseen": []}
    return {**node, "inputs": {"model.path": "same"}, **changes}


def good_report(**changes: Any) -> dict[str, Any]:
    report = {"here": good_node(), "nodes": [good_node(node="10.0.0.2")], "unwritable": {}, "cache": "/cache"}
    return {**report, "output": None, "tracking": None, **changes}


def test_a_good_report_passes() -> None:
    preflight.judge(good_report(), PLAN, [BIG], MARKS)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (good_report(here=good_node(version="3.10.2")), "head runs Python 3.10.2 (/py)"),
        (good_report(here=good_node(missing=["yaml", "torch"])), "lacks pyyaml, torch"),
        (good_report(here=good_node(missing=["yaml", "torch"])), "/py -m pip install pyyaml torch"),
        (good_report(here=good_node(versions={"mlflow": "2.22"})), "mlflow>=3.10 (has 2.22)"),
        (good_report(here=good_node(versions={"mlflow": "2.22"})), "pip install 'mlflow>=3.10'"),
        (good_report(here=good_node(inputs={"model.path": "is not there"})), "model.path: /models/big is not there"),
        (good_report(nodes=[good_node(node="10.0.0.2", missing=["torch"])]), "node 10.0.0.2 lacks torch"),
        (
            good_report(nodes=[{"node": "10.0.0.2", "silent": "gone"}]),
            "node 10.0.0.2 of the cluster does not run tasks",
        ),
        (good_report(here=good_node(unseen=["/out/.m"])), "output.dir: /out of this machine"),
        (good_report(here=good_node(unseen=["/out/.m"])), "--set output.dir=/shared"),
        (good_report(unwritable={"/out": "Read-only"}), "output.dir: the cluster's head cannot write /out (Read-only)"),
        (good_report(output="output folder /out is not empty"), "on the cluster: output folder /out is not empty"),
        (good_report(nodes=[good_node(node="b", unseen=["/out"])]), "node b does not see /out"),
        (good_report(nodes=[good_node(node="b", unseen=["/cache"])]), "node b does not see /cache of the head"),
        (good_report(nodes=[good_node(node="b", unseen=["/cache"])]), "GRU_CACHE"),
        (good_report(here=good_node(unseen=["/db/.m"])), "track.uri: sqlite:////db/mlflow.db of this machine"),
        (good_report(unwritable={"/db": "Permission denied"}), "cannot write /db (Permission denied)"),
        (good_report(tracking="cannot be reached"), "cannot be reached; use a server"),
        (good_report(tracking="cannot be reached"), "--tracking-uri http://"),
    ],
)
def test_whatever_stands_against_a_job_is_one_line_with_a_way_out(report: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        preflight.judge(report, PLAN, [BIG], MARKS)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_old_package_is_told_by_numbers_and_not_by_text() -> None:
    assert preflight._numbers("2.9.1") < preflight._numbers("2.11") < preflight._numbers("2.13.0+cpu")


def test_markers_stand_in_the_nearest_folder_and_vanish(tmp_path: Path) -> None:
    plan = preflight.Plan(tmp_path / "runs" / "new", True, f"sqlite:///{tmp_path}/mlflow.db")
    with preflight.markers(plan) as marks:
        assert {Path(mark).parent for mark in marks.values()} == {tmp_path}
        assert len(contents(tmp_path)) == 2
    assert contents(tmp_path) == set()


# ------------------------------------------------------------------------------------ address and token


def test_an_address_is_given_or_found_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clusters.resolve(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert clusters.resolve(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://head:1/")
    assert clusters.resolve(None) == "http://head:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://api:2")
    assert clusters.resolve(None) == "http://api:2"
    assert clusters.resolve("given:3") == "http://given:3"


@pytest.mark.parametrize("address", ["ray://head:10001", "http://", "http://head:port", "auto://x"])
def test_an_address_that_is_no_url_of_a_dashboard_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=r"--address: got .*allowed: http://HOST:8265"):
        clusters.resolve(address)


def test_nobody_there_is_one_line_within_seconds() -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=r"no Ray cluster answers at http://127\.0\.0\.1:\d+ \(connection refused\)"):
        clusters.connect(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(InputError, match="unknown host"):
        clusters.connect("http://user:hunter2@no-such-host.invalid:8265")
    assert time.monotonic() - start < 10


def test_a_server_that_swallows_requests_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(InputError, match="no Ray cluster answers"):
            clusters.connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - start < 5


def serve(reply: Callable[[str, str | None], tuple[int, str]]) -> Iterator[str]:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = reply(self.path, self.headers.get("Authorization"))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def other_server() -> Iterator[str]:
    yield from serve(lambda path, token: (200, "<html>hello</html>"))


def test_another_server_is_told_from_a_cluster(other_server: str) -> None:
    with pytest.raises(InputError, match="answers, but is no Ray job server"):
        clusters.connect(other_server)


@pytest.fixture
def open_server() -> Iterator[tuple[str, list[str | None]]]:
    tokens: list[str | None] = []

    def reply(path: str, token: str | None) -> tuple[int, str]:
        tokens.append(token)
        return 200, '{"ray_version": "2.60.0", "version": "4"}'

    for url in serve(reply):
        yield url, tokens


def test_a_cluster_that_asks_for_no_token_gets_none(
    open_server: tuple[str, list[str | None]],
) -> None:
    """In a process of its own, as `gru submit` is: Ray keeps the mode of its first cluster for ever."""
    url, tokens = open_server
    shown = "print(os.environ['RAY_API_SERVER_ADDRESS'])"
    code = f"import os; from pipelines import cluster; cluster.connect({url!r}); {shown}"
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    given = {"RAY_AUTH_TOKEN": "s3cret", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}  # the address given wins
    done = subprocess.run([sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True)
    assert len(tokens) > 1
    assert set(tokens) == {None}
    assert done.stdout.strip() == "http://127.0.0.1:9"


# ----------------------------------------------------------------------------------------------- the log


def test_a_log_is_said_once_however_often_its_stream_breaks() -> None:
    """Random cuts and restarts from the beginning, as reconnecting gives them, against the text itself."""
    head = "2026-11-23 22:11:46,400\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
    entry = "Running entrypoint for job x: exec python\n"
    body = "".join(f"line {n}\n" for n in range(200)) + "{\n" + '"a": [1, 2]}\nlast'
    texts = [head + entry + body, head + body.replace("line 3\n", f"line 3\n{entry}")]  # Ray may write it late
    random.seed(0)
    for text in texts * 10:
        lines, say = told()
        log = joblog.Log(say, "x")
        for _ in range(5):
            position, end = 0, random.randrange(len(text))
            while position < end:
                size = random.randrange(1, 90)
                log.piece(text[position : position + size], min(position + size, len(text)))
                position += size
        log.piece(text, len(text))
        log.end()
        assert lines == body.split("\n")


def test_the_document_at_the_end_of_a_log_is_found() -> None:
    log = joblog.Log(lambda line: None, "x")
    text = 'progress\n{"not": "this"}\nmore\n{"run": "x", "points": [{"a": 1}]}\n'
    log.piece(text, len(text))
    assert log.document() == {"run": "x", "points": [{"a": 1}]}
