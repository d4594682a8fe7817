"""Journals reach MLflow exactly once, whatever happens to the server, and its failures cost a run nothing."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from gru_core.config import TrackConfig
from gru_core.errors import InputError
from pipelines import journal
from pipelines.courier import Courier, deliver_all
from pipelines.delivery import Delivery, remembered
from pipelines.journal import Journal
from pipelines.stores import check, hide, resolve_uri
from pipelines.tracking import Mlflow, text_of, value_of
from tests.fake_search import write_search, write_trial
from tests.mlflow_server import Server, empty_store, free_port


def histories(store: Mlflow, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """All metrics of a run as MLflow's own client gives them."""
    keys = store.client.get_run(run_id).data.metrics
    return {
        key: sorted((each.step, each.value) for each in store.client.get_metric_history(run_id, key)) for key in keys
    }


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from the journal's lines, read with nothing but json."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "journal.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for key, value in entry.get("metrics", {}).items():
            found.setdefault(key, []).append((entry["step"], value))
    return found


def assert_delivered(store: Mlflow, folder: Path) -> None:
    """Everything in the folder's journals stands in MLflow, once, under one run each."""
    parent = remembered(folder)["run_id"]
    children = {store.client.get_run(each).info.run_name: each for each in store.children(parent)}
    trials = sorted((folder / "trials").iterdir())
    assert sorted(children) == [trial.name for trial in trials]
    assert len(store.children(parent)) == len(trials)
    for trial in trials:
        assert histories(store, children[trial.name]) == expected(trial)


@pytest.fixture
def delivery(tmp_path: Path) -> Delivery:
    return Delivery(Mlflow(empty_store(tmp_path / "store" / "mlflow.db")), "study")


# ---------------------------------------------------------------- which store


def test_the_store_is_the_given_one_then_the_environment_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000/")
    assert resolve_uri(TrackConfig(uri="https://here:1")) == "https://here:1"
    assert resolve_uri(TrackConfig()) == "http://there:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolve_uri(TrackConfig()) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri(TrackConfig(uri="sqlite:///a/../b.db")) == f"sqlite:///{tmp_path}/b.db"
    assert resolve_uri(TrackConfig(uri="sqlite:////abs/b.db")) == "sqlite:////abs/b.db"
    assert resolve_uri(TrackConfig(uri="postgresql+psycopg2://u:p@h/db")) == "postgresql+psycopg2://u:p@h/db"


@pytest.mark.parametrize(
    "uri",
    [
        "mlruns",
        "/tmp/mlruns",
        "file:///tmp/mlruns",
        "sqlite://",
        "sqlite:///:memory:",
        "http://",
        "ftp://x",
        "host:5000",
    ],
)
def test_stores_that_cannot_be_are_refused_in_one_line(uri: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_uri(TrackConfig(uri=uri))
    assert repr(uri) in str(caught.value)
    assert "sqlite:///" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_passwords_are_never_shown() -> None:
    assert hide("http://user:secret@host:5000/x") == "http://host:5000/x"
    assert hide("error at postgresql://u:p%40@h:1/db and http://a/b@c") == (
        "error at postgresql://h:1/db and http://a/b@c"
    )
    with pytest.raises(InputError) as caught:
        check(f"http://user:secret@127.0.0.1:{free_port()}")
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        resolve_uri(TrackConfig(uri="ftp://user:secret@host"))
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_said_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=r"^the MLflow server http://127.0.0.1:\d+ cannot be reached"):
        check(f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - start < 5


def test_a_server_that_hangs_is_given_up_in_five_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        start = time.monotonic()
        with pytest.raises(InputError, match="does not answer within 4 s"):
            check(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - start < 6


class Other(http.server.BaseHTTPRequestHandler):
    """Answers 401 unless the right user asks; a page otherwise."""

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Basic bWU6cHc="  # me:pw
        body = b"<html>hello</html>"
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def other() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_server_that_refuses_or_is_another_one_is_named(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"refuses access \(401\): set MLFLOW_TRACKING_USERNAME"):
        check(other)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw")
    with pytest.raises(InputError, match="not as an MLflow server"):
        check(other)


def test_a_database_that_cannot_be_written_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x" * 100)
    with pytest.raises(InputError, match="cannot be written"):
        check(f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(InputError, match="is not a SQLite database"):
        check(f"sqlite:///{tmp_path}/file")
    with pytest.raises(InputError, match="cannot be read and written"):
        check(f"sqlite:///{tmp_path}")
    check(f"sqlite:///{tmp_path}/new/deeper/mlflow.db")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_default_store_makes_no_noise_and_keeps_artifacts_beside_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, '.')\n"
        "from pipelines.tracking import Mlflow, resolve_uri; from pipelines.delivery import Delivery\n"
        "from gru_core.config import TrackConfig; from tests.fake_search import write_trial\n"
        "base = Path(sys.argv[1]); write_trial(base / 'run', 'one', 'sum')\n"
        "delivery = Delivery(Mlflow(resolve_uri(TrackConfig(), base)), 'study'); delivery.deliver(base / 'run')\n"
        "print(delivery.store.client.get_experiment(delivery.experiment_id).artifact_location)\n"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    root = Path(__file__).resolve().parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, cwd=root, env=env
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == [(tmp_path / "mlartifacts").as_uri()]
    assert (tmp_path / "mlflow.db").exists()


# ---------------------------------------------------------------- delivery


def test_a_search_stands_in_mlflow_as_its_journals_say(delivery: Delivery, tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", trials=2)
    deliver_all(delivery, folder)
    store = delivery.store
    assert_delivered(store, folder)
    stored = remembered(folder)
    assert stored["uri"] == store.uri
    assert stored["experiment"] == "study"
    trial = folder / "trials" / "plain-001"
    run = store.client.get_run(remembered(trial)["run_id"])
    assert run.info.run_name == "plain-001"
    assert run.info.status == "FINISHED"
    assert run.data.tags["gru.status"] == "collapsed"
    assert run.data.tags["mlflow.parentRunId"] == stored["run_id"]
    params = json.loads((trial / "journal.jsonl").read_text().splitlines()[1])["params"]
    assert {key: value_of(text) for key, text in run.data.params.items()} == params
    times = [json.loads(line)["time_ms"] for line in (trial / "journal.jsonl").read_text().splitlines()[2:]]
    assert run.info.end_time == times[-1]


def test_delivering_again_from_the_start_changes_nothing(delivery: Delivery, tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", trials=1)
    deliver_all(delivery, folder)
    runs = delivery.store.client.search_runs([delivery.experiment_id])
    for path in folder.rglob("mlflow.json"):
        path.unlink()  # found again by the key of its journal
    again = Delivery(delivery.store, "study")
    count, refused = deliver_all(again, folder)
    assert count > 100
    assert refused == []
    after = delivery.store.client.search_runs([delivery.experiment_id])
    assert sorted(run.info.run_id for run in after) == sorted(run.info.run_id for run in runs)
    assert_delivered(delivery.store, folder)
    assert deliver_all(again, folder) == (0, [])


def test_a_growing_journal_is_delivered_in_parts_without_repeats(delivery: Delivery, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write_trial(whole, "one", "sum")
    data = (whole / journal.NAME).read_bytes()
    folder = tmp_path / "run"
    folder.mkdir()
    for size in range(0, len(data), len(data) // 9):
        (folder / journal.NAME).write_bytes(data[:size])
        delivery.deliver(folder)
        run_id = delivery.run_id(folder)
        if run_id is not None:
            assert delivery.store.client.get_run(run_id).info.status == "RUNNING"
    (folder / journal.NAME).write_bytes(data)
    delivery.deliver(folder)
    run_id = remembered(folder)["run_id"]
    assert histories(delivery.store, run_id) == expected(whole)
    assert delivery.store.client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        ("finished", "FINISHED"),
        ("collapsed", "FINISHED"),
        ("failed", "FAILED"),
        ("non_finite", "FAILED"),
        ("stopped", "KILLED"),
    ],
)
def test_how_a_run_ended_and_that_it_goes_on(delivery: Delivery, tmp_path: Path, status: str, shown: str) -> None:
    folder = tmp_path / "run"
    with Journal(folder) as record:
        record.run("one")
        record.metrics(1, {"train/lr": 1.0})
        record.status(status)
    delivery.deliver(folder)
    run_id = remembered(folder)["run_id"]
    assert delivery.store.client.get_run(run_id).info.status == shown
    with Journal(folder) as record:  # resumed, by another driver
        record.metrics(2, {"train/lr": 1.0})
    Delivery(delivery.store, "study").deliver(folder)
    assert delivery.store.client.get_run(run_id).info.status == "RUNNING"


def test_a_run_written_anew_in_the_same_folder_is_a_new_run(delivery: Delivery, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_trial(folder, "one", "sum")
    delivery.deliver(folder)
    first = remembered(folder)["run_id"]
    (folder / journal.NAME).unlink()  # mlflow.json of the old run is still there
    write_trial(folder, "one", "sum", seed=5)
    Delivery(delivery.store, "study").deliver(folder)
    assert remembered(folder)["run_id"] != first


def test_a_run_deleted_in_mlflow_is_made_again(delivery: Delivery, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_trial(folder, "one", "sum")
    delivery.deliver(folder)
    delivery.store.client.delete_run(remembered(folder)["run_id"])
    Delivery(delivery.store, "study").deliver(folder)
    assert histories(delivery.store, remembered(folder)["run_id"]) == expected(folder)


def test_artifacts_arrive_and_none_from_outside_the_folder(delivery: Delivery, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "secret.txt").write_text("not yours")
    with Journal(folder) as record:
        record.run("one")
        (folder / "evaluations").mkdir()
        (folder / "evaluations" / "step-1.json").write_text("{}")
        (folder / "config.yaml").write_text("a: 1\n")
        for path in ("config.yaml", "evaluations/step-1.json", "../secret.txt", "gone.json"):
            record.artifact(path)
    delivery.deliver(folder)
    client, run_id = delivery.store.client, remembered(folder)["run_id"]
    assert [each.path for each in client.list_artifacts(run_id)] == ["config.yaml", "evaluations"]
    assert [each.path for each in client.list_artifacts(run_id, "evaluations")] == ["evaluations/step-1.json"]
    assert len(delivery.notes) == 2
    assert "../secret.txt" in delivery.notes[0]


def test_an_artifact_that_cannot_be_stored_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed artifact folder: metrics, statuses and other runs arrive, one line tells, and a retry mends it."""
    said: list[str] = []
    folder = write_search(tmp_path / "search", trials=1)
    bad = folder / "trials" / "plain-000"
    with Journal(bad) as record:
        (bad / "scores.json").write_text("{}")
        record.artifact("scores.json")
        record.status("finished")
    upload = Mlflow.upload

    def closed(store: Mlflow, run_id: str, path: Path, under: str | None = None) -> None:
        if path.parent == bad:
            raise PermissionError(13, "Permission denied", "/closed")
        upload(store, run_id, path, under)

    monkeypatch.setattr(Mlflow, "upload", closed)
    courier = Courier(empty_store(tmp_path / "m.db"), "study", folder, say=said.append)
    assert not courier.flush()
    store = Mlflow(f"sqlite:///{tmp_path}/m.db")
    assert_delivered(store, folder)
    run_id = remembered(bad)["run_id"]
    assert store.client.get_run(run_id).info.status == "FINISHED"
    assert not courier.flush()  # nothing new, and still not there
    assert not courier.close()
    assert [line for line in said if "plain-000: artifact scores.json: [Errno 13] Permission denied" in line]
    assert "1 run(s) are not delivered in full" in said[-1]
    assert not any("is away" in line for line in said)

    monkeypatch.setattr(Mlflow, "upload", upload)
    said.clear()
    assert courier.close()
    assert said == []
    assert [each.path for each in store.client.list_artifacts(run_id)] == ["scores.json"]


def test_limits_of_mlflow_are_kept(delivery: Delivery, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Journal(folder) as record:
        record.run("one")
        record.params({**{f"p{number}": number for number in range(250)}, "long": "x" * 9000, "search.space[0]": 1})
        record.metrics(1, {f"m{number}": float(number) for number in range(1500)})
        record.metrics(2, {"train/loss": float("nan")})
    delivery.deliver(folder)
    data = delivery.store.client.get_run(remembered(folder)["run_id"]).data
    assert len(data.params) == 252
    assert data.params["long"] == "x" * 6000
    assert data.params["search.space_0_"] == "1"
    assert len(data.metrics) == 1500
    assert data.tags["gru.non_finite"] == "true"
    assert delivery.notes == ["run: cut to the length that MLflow stores: long"]


def test_parameters_come_back_as_they_were() -> None:
    for value in (1, 1.0, 1e-5, 0.1 + 0.2, -3, True, False, None, "npo", "forget10", ""):
        back = value_of(text_of(value))
        assert back == value
        assert type(back) is type(value)


def test_a_deleted_experiment_is_named(delivery: Delivery) -> None:
    delivery.store.client.delete_experiment(delivery.experiment_id)
    with pytest.raises(InputError, match="experiment 'study' was deleted"):
        Delivery(delivery.store, "study")


def test_delivery_is_fast(delivery: Delivery, tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", trials=8)  # 24 trials, 60 steps, 8 metrics a step
    start = time.monotonic()
    deliver_all(delivery, folder)
    assert time.monotonic() - start < 30  # 1.7 s on two idle cores


# ---------------------------------------------------------------- the courier


def test_the_courier_follows_a_run_and_trials_that_appear(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "search"
    with Courier(empty_store(tmp_path / "m.db"), "study", folder, say=said.append, every=0.05) as courier:
        assert courier.run_id is None
        write_search(folder, trials=1)
        deadline = time.monotonic() + 20
        while courier.run_id is None and time.monotonic() < deadline:
            time.sleep(0.02)
        parent = courier.run_id
        assert parent is not None
        write_trial(folder / "trials" / "late", "late", "sum")
    assert said == []
    store = Mlflow(f"sqlite:///{tmp_path}/m.db")
    assert remembered(folder)["run_id"] == parent
    assert_delivered(store, folder)


def test_a_store_that_breaks_is_one_line_and_never_an_error(tmp_path: Path) -> None:
    said: list[str] = []
    folder = write_search(tmp_path / "search", trials=1)
    database = tmp_path / "db" / "m.db"
    courier = Courier(empty_store(database), "study", folder, say=said.append, every=0.05)
    shutil.copy(database, tmp_path / "kept.db")
    database.write_bytes(b"broken" * 1000)
    with courier:
        time.sleep(0.6)
    assert len([line for line in said if "is away" in line]) == 1
    assert f"gru frontier {folder} --sync" in said[-1]
    assert "4 run(s)" in said[-1]
    shutil.copy(tmp_path / "kept.db", database)
    store = Mlflow(f"sqlite:///{database}")
    deliver_all(Delivery(store, "study"), folder)
    assert_delivered(store, folder)


@pytest.mark.slow
def test_a_server_killed_midway_and_started_again_gets_everything_once(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "search"
    server = Server(tmp_path / "server")
    try:
        server.start()
        check(server.uri)
        with Journal(folder) as record:
            record.run("search", {"gru.kind": "search"})
        with Courier(server.uri, "study", folder, say=said.append, every=0.2) as courier:
            live = Journal(folder / "trials" / "live")
            live.run("live", {"gru.kind": "trial", "gru.family": "sum", "gru.trial": "live"})
            (folder / "trials" / "live" / "scores.json").write_text("{}")
            for step in range(30):
                live.metrics(step, {f"train/{key}": step + key / 10 for key in range(8)})
                time.sleep(0.03)
            write_trial(folder / "trials" / "before", "before", "plain")
            while courier.run_id is None or not (folder / "trials" / "before" / "mlflow.json").exists():
                time.sleep(0.05)
            server.kill()
            start = time.monotonic()
            for step in range(30, 60):  # the run goes on at its own pace
                live.metrics(step, {f"train/{key}": step + key / 10 for key in range(8)})
                time.sleep(0.03)
            write_trial(folder / "trials" / "during", "during", "rectified")
            assert time.monotonic() - start < 5
            while not said:
                time.sleep(0.05)
            server.start()
            live.artifact("scores.json")
            live.status("finished")
            live.close()
        assert "is away" in said[0]
        assert said[1:] == [f"MLflow at {server.uri} answers again: everything is delivered"]
        store = Mlflow(server.uri)
        assert_delivered(store, folder)
        names = Counter(run.info.run_name for run in store.client.search_runs([courier._delivery.experiment_id]))
        assert names == {"search": 1, "live": 1, "before": 1, "during": 1}
        live_id = remembered(folder / "trials" / "live")["run_id"]
        assert [each.path for each in store.client.list_artifacts(live_id)] == ["scores.json"]
        assert store.client.get_run(live_id).info.status == "FINISHED"
    finally:
        server.kill()
