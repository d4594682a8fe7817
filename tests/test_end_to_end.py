"""Searches as users run them: real trials, killed and resumed, on Ray Train workers, as a job on a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines import frontier, jobs, journal, search
from tests.mlflow_server import Server
from tests.ray_head import Head, ray_head  # noqa: F401
from tests.study import Study, gru

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPACE = "search.space={unlearn.lr: [1.0e-4, 3.0e-4], retain.size: [4, 20]}"


def quiet(line: str) -> None:
    pass


def points(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {f.name: journal.points(f) for f in sorted((folder / "trials").iterdir())}


@pytest.fixture(scope="module")
def searched(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """Folder of a search of three real trials, its command line, and what it printed."""
    folder = tmp_path_factory.mktemp("searched") / "search"
    words = ["search", "-c", str(study.config), "--output", str(folder), "--set", SPACE]
    words += ["--set", "search.trials=3", "--set", "search.sampler=random"]
    done = gru(words, study.environment)
    assert done.returncode == 0, done.stderr
    return folder, words, done.stdout


def test_a_search_from_the_command_line(study: Study, searched: tuple[Path, list[str], str]) -> None:
    """Table, pictures and MLflow; the frontier recomputed from what was tracked."""
    folder, words, printed = searched
    document = json.loads((folder / "frontier.json").read_text())
    assert set(document["hypervolume"]) == {"plain", "sum", "rectified"}
    assert all(0 <= v <= 1 for v in document["hypervolume"].values())
    assert len(list(folder.glob("trials/*/scores.json"))) == 3
    assert "no conclusion can be drawn" in printed
    for name in ("png", "html"):
        assert (folder / f"frontier.{name}").stat().st_size > 10_000
    again = gru(["frontier", str(folder), "--json"], study.environment)
    assert again.returncode == 0, again.stderr
    recomputed = json.loads(again.stdout)
    assert recomputed["hypervolume"] == document["hypervolume"]
    assert recomputed["frontier"] == document["frontier"]
    _mlflow_holds(study, recomputed)
    refused = gru(words, study.environment)
    assert refused.returncode == 2
    assert "is not empty" in refused.stderr


def _mlflow_holds(study: Study, document: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{study.folder}/mlflow.db")
    parent = client.get_run(document["run_id"])
    assert parent.data.tags["gru.kind"] == "search"
    for family, value in document["hypervolume"].items():
        assert parent.data.metrics[f"hypervolume/{family}"] == pytest.approx(value)
    names = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert {"frontier.png", "frontier.html", "frontier.csv", "frontier.json"} <= names
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=100
    )
    assert len(children) == 3
    assert {c.data.tags["gru.family"] for c in children} == {"plain", "sum", "rectified"}
    on_frontier = {c.data.tags["gru.trial"] for c in children if c.data.tags.get("gru.on_frontier") == "true"}
    assert on_frontier == {p["trial"] for p in document["frontier"]}


def test_trials_on_ray_train_workers_are_the_same_trials(study: Study, tmp_path: Path) -> None:
    """Three trials of two sharded workers through TorchTrainer inside Tune on 2 cores: the points of workers 0.

    The starting model is scored by the first trial's workers, for all of them.
    """
    one, two = tmp_path / "zero", tmp_path / "two"
    settings = ["search.trials=3", "search.sampler=random", SPACE]
    search.run(study.load(one, *settings), say=quiet)
    search.run(study.load(two, *settings, "train.workers=2", "train.strategy=fsdp"), say=quiet)
    scored = {f.stat().st_mtime_ns for f in two.glob("trials/*/baseline.json")}
    assert (two / "baseline.json").stat().st_mtime_ns > min(scored)
    assert len({f.read_text() for f in two.glob("**/baseline.json")}) == 1
    alone, together = points(one), points(two)
    assert alone.keys() == together.keys()
    assert len(alone) == 3
    for name in alone:
        for a, b in zip(alone[name], together[name], strict=True):
            assert a["step"] == b["step"]
            assert a["unlearning"] == pytest.approx(b["unlearning"], abs=0.1)
            assert a["retention"] == pytest.approx(b["retention"], abs=0.1)


def test_a_submitted_search_is_browsed_from_the_client(
    study: Study,
    tmp_path: Path,
    ray_head: Head,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`gru submit` of a real search to a real head, tracked on a real MLflow server, drawn from the client."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "search"
    with Server(tmp_path) as server:
        arguments = ["search", "-c", str(study.config), "--set", "search.trials=3", "--set", SPACE]
        arguments += ["--set", "search.sampler=random", "--set", "train.seed=3", "--set", "prepare.steps=150"]
        arguments += ["--output", str(folder), "--tracking-uri", server.uri, "--json"]
        found = jobs.submit(arguments, address=ray_head.address, wait=True, say=quiet)
        assert found["status"] == "SUCCEEDED"
        assert found["tracking_uri"] == server.uri
        document = frontier.build(found["result"]["run_id"], tracking_uri=server.uri, out=tmp_path / "mine", say=quiet)
    assert document["hypervolume"] == found["result"]["hypervolume"]
    assert (tmp_path / "mine" / "frontier.png").stat().st_size > 10_000
    assert len(points(folder)) == 3


def test_mlflow_that_goes_away_costs_nothing(study: Study, tmp_path: Path) -> None:
    """The server dies mid-search: the search ends well, says so once, and --sync delivers later."""
    lines: list[str] = []
    folder = tmp_path / "search"
    server = Server(tmp_path)
    with server:
        config = study.load(folder, "search.trials=3", "search.sampler=random", SPACE, f"track.uri={server.uri}")

        def say(line: str) -> None:
            lines.append(line)
            if line.startswith("[1/3]"):
                server.kill()

        document = search.run(config, say=say)
    assert sum("is away" in line for line in lines) == 1
    assert document["trials"]["failed"] == 0
    with server:
        synced = frontier.build(str(folder), tracking_uri=server.uri, sync=True, say=lines.append)
        from_server = frontier.build(synced["run_id"], tracking_uri=server.uri, out=tmp_path / "mine", say=lines.append)
    assert from_server["hypervolume"] == document["hypervolume"]


def test_the_point_that_a_search_chooses_becomes_a_model(study: Study, searched: tuple[Path, list[str], str]) -> None:
    """The printed command makes the model of the knee again, and it scores as the point did."""
    import shlex

    folder, _, printed = searched
    command = next(line for line in printed.splitlines() if line.startswith("take it: ")).removeprefix("take it: ")
    words = shlex.split(command)
    assert words[:2] == ["gru", "unlearn"]
    taken = gru([*words[1:], "--json"], study.environment)
    assert taken.returncode == 0, taken.stderr
    result = json.loads(taken.stdout)
    knee = json.loads((folder / "frontier.json").read_text())["knee"]
    assert (Path(result["model"]) / "model.safetensors").exists()
    assert result["points"][-1]["step"] == knee["step"]
    assert result["scores"]["unlearning"] == pytest.approx(knee["unlearning"], abs=1e-9)
    assert result["scores"]["retention"] == pytest.approx(knee["retention"], abs=1e-9)
