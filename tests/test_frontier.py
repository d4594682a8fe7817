"""The frontier of a search: numbers against hand-made ones, the same from MLflow and from journals."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gru_core.errors import InputError, StorageError
from pipelines import frontier, plots
from pipelines.courier import deliver_all
from pipelines.delivery import Delivery, remembered
from pipelines.frontier import Trial, build, summarise
from pipelines.journal import Journal
from pipelines.tracking import Mlflow
from tests.fake_search import write_search, write_trial
from tests.mlflow_server import empty_store, free_port


def trial(name: str, family: str, *pairs: tuple[float, float], status: str = "finished", **params: Any) -> Trial:
    """A trial with an evaluation at steps 0, 10, 20, ...; params with ``__`` for the dot."""
    points = [{"step": 0, "unlearning": 0.0, "retention": 1.0}]
    points += [{"step": 10 * (n + 1), "unlearning": u, "retention": r, "rouge": 0.1} for n, (u, r) in enumerate(pairs)]
    return Trial(name, family, status, {key.replace("__", "."): v for key, v in params.items()}, points)


HAND = [
    trial("p1", "plain", (0.2, 0.5), (0.4, 0.25), rectify__strength=0.0),
    trial("s1", "sum", (0.5, 0.5), (0.25, 0.5), rectify__strength=0.0),
    trial("r1", "rectified", (0.25, 0.8), (0.5, 0.8), rectify__strength=1.0),
    trial("r2", "rectified", (0.75, 0.6), (1.0, 0.1), rectify__strength=2.0),
    trial("p2", "plain", (0.2, 0.5), (0.1, 0.1), rectify__strength=0.0),
    trial("s2", "sum", (0.5, 0.5), (0.6, 0.1), rectify__strength=0.0),
]


# ---------------------------------------------------------------- numbers


def test_hypervolumes_frontier_gain_and_knee_by_hand() -> None:
    document, points = summarise("hand", HAND)
    # areas of the staircases, rectangle by rectangle
    assert document["hypervolume"] == pytest.approx(
        {
            "plain": 0.2 * 0.5 + 0.2 * 0.25,
            "sum": 0.5 * 0.5 + 0.1 * 0.1,
            "rectified": 0.5 * 0.8 + 0.25 * 0.6 + 0.25 * 0.1,
        }
    )
    assert document["gain"] == pytest.approx({"over_plain": 0.575 - 0.15, "over_sum": 0.575 - 0.26})
    found = [(p["trial"], p["step"], p["unlearning"], p["retention"]) for p in document["frontier"]]
    assert found == [("r1", 20, 0.5, 0.8), ("r2", 10, 0.75, 0.6), ("r2", 20, 1.0, 0.1)]
    assert (document["knee"]["trial"], document["knee"]["step"]) == ("r2", 10)
    assert len(points) == 12  # step 0 is the start model, not a result
    assert document["searched"] == ["rectify.strength"]
    assert document["frontier"][0]["params"] == {"rectify.strength": 1.0}
    assert document["frontier"][0]["metrics"] == {"rouge": 0.1}


def test_of_equal_points_only_the_first_is_marked() -> None:
    _, points = summarise("hand", HAND)
    marked = [(p["trial"], p["step"]) for p in points if p["on_family_frontier"] and p["family"] != "rectified"]
    assert marked == [("p1", 10), ("p1", 20), ("s1", 10), ("s2", 20)]
    assert sum(p["knee"] for p in points) == 1


def test_a_frontier_of_one_family_is_stairs_between_the_axes() -> None:
    _, points = summarise("hand", HAND)
    xs, ys = plots.stairs([p for p in points if p["family"] == "rectified"])
    assert xs == [0.0, 0.5, 0.75, 1.0, 1.0]
    assert ys == [0.8, 0.8, 0.6, 0.1, 0.0]
    # the area under the line (a value holds back to the point before it) is the hypervolume
    area = sum((xs[i] - xs[i - 1]) * ys[i] for i in range(1, len(xs)))
    assert area == pytest.approx(0.575)


def test_equal_budgets_are_compared_and_the_loser_is_named() -> None:
    assert summarise("hand", HAND)[0]["comparable"]
    notes = summarise("hand", HAND)[0]["notes"]
    assert "rectified covers 0.425 (283.3%) more of the trade-off than plain" in notes
    swapped = {"plain": "rectified", "rectified": "plain", "sum": "sum"}
    turned = [Trial(t.name, swapped[t.family], t.status, t.params, t.points) for t in HAND]
    assert "rectified covers 0.425 (73.9%) less of the trade-off than plain" in summarise("hand", turned)[0]["notes"]


@pytest.mark.parametrize("how", ["fewer trials", "incomplete", "more evaluations planned"])
def test_unequal_budgets_are_said_and_not_compared(how: str) -> None:
    trials = list(HAND)
    if how == "fewer trials":
        trials = trials[:-1]
    elif how == "incomplete":
        trials[-1] = trial("s2", "sum", (0.5, 0.5), status="failed", rectify__strength=0.0)
    else:
        more = {"unlearn.steps": 90, "unlearn.evaluate_every": 10}
        trials[-1] = Trial("s2", "sum", "finished", more, HAND[-1].points)
    document = summarise("hand", trials)[0]
    assert not document["comparable"]
    assert "budgets differ: hypervolumes not comparable" in document["notes"]
    assert not any("covers" in note for note in document["notes"])
    assert document["families"]["sum"]["incomplete"] == (1 if how == "incomplete" else 0)


def test_a_collapsed_trial_used_its_budget_and_its_points_count() -> None:
    plan = {"unlearn__steps": 25, "unlearn__evaluate_every": 10}
    trials = [trial("p", "plain", (0.9, 0.1), status="collapsed", **plan)]
    trials.append(trial("r", "rectified", (0.5, 0.5), (0.5, 0.6), (0.6, 0.6), **plan))
    document = summarise("x", trials)[0]
    assert document["comparable"]
    assert document["families"]["plain"]["planned_evaluations"] == 3
    assert document["families"]["plain"]["points"] == 1
    assert document["families"]["plain"]["collapsed"] == 1
    assert [point["trial"] for point in document["frontier"]] == ["r", "p"]


def test_nothing_evaluated_is_said() -> None:
    document, points = summarise("x", [trial("p", "plain", status="failed")])
    assert points == []
    assert document["frontier"] == []
    assert document["knee"] is None
    assert document["hypervolume"] == {"plain": 0.0}
    assert "no trial was evaluated: there is no frontier" in document["notes"]


def test_what_the_scores_rest_on_is_said() -> None:
    point = {"step": 5, "unlearning": 0.5, "retention": 0.5}
    one = Trial("a", "sum", "finished", {"retain_model": None, "evaluate.unlearning": "rouge"}, [point], scored=True)
    document = summarise("x", [one])[0]
    assert "no retain model: unlearning 1 means that the forget metric is 0" in document["notes"]
    assert any("retain.include_scored" in note for note in document["notes"])
    assert document["axes"] == {"unlearning": "rouge", "retention": "retention"}
    assert plots.labels(document) == ("unlearning, from rouge (1 = forgotten)", "retention (1 = as before)")


# ---------------------------------------------------------------- files and console


def test_files_say_what_the_document_says(tmp_path: Path) -> None:
    document, points = summarise("hand", HAND)
    artifacts = frontier.write(document, points, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "frontier.csv", "frontier.html", "frontier.json", "frontier.png",
    ]  # fmt: skip
    rows = list(csv.DictReader(Path(artifacts["csv"]).read_text().splitlines()))
    assert len(rows) == 12
    assert {(row["trial"], int(row["step"])) for row in rows if row["on_frontier"] == "True"} == {
        ("r1", 20), ("r2", 10), ("r2", 20),
    }  # fmt: skip
    assert rows[0]["rectify.strength"] == "0.0"
    stored = json.loads(Path(artifacts["json"]).read_text())
    assert stored["hypervolume"] == document["hypervolume"]
    assert stored["frontier"] == document["frontier"]
    assert Path(artifacts["png"]).read_bytes().startswith(b"\x89PNG")


def test_the_page_stands_alone_and_escapes_names(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    document, points = summarise(bad, [*HAND, trial(bad, "plain", (0.3, 0.3), note=bad), trial("q", "sum", (0.3, 0.3))])
    plots.html(document, points, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert bad not in page
    assert len(page) > 3_000_000  # plotly.js is inside
    assert re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?https?:", page) == []


def test_families_are_told_apart_without_colour() -> None:
    styles = plots.style(["plain", "sum", "rectified", "mine", "yours"])
    assert len({look[0] for look in (styles[name] for name in styles)}) == 5
    assert len({look[1] for look in styles.values()}) == 5
    assert len({look[2] for look in styles.values()}) == 5


# ---------------------------------------------------------------- from tracked runs


@pytest.fixture
def delivery(tmp_path: Path) -> Delivery:
    return Delivery(Mlflow(empty_store(tmp_path / "store" / "mlflow.db")), "study")


def core(document: dict[str, Any]) -> dict[str, Any]:
    """The part of a document that does not say where it came from."""
    return {key: value for key, value in document.items() if key not in {"folder", "artifacts", "notes", "run_id"}}


def test_mlflow_alone_and_journals_alone_give_the_same(delivery: Delivery, tmp_path: Path) -> None:
    folder = write_search(tmp_path / "my search", trials=3)
    deliver_all(delivery, folder)
    uri, run_id = delivery.store.uri, remembered(folder)["run_id"]
    both = build(str(folder), out=tmp_path / "a")
    assert both["run_id"] == run_id
    assert both["folder"] == str(folder)
    assert len(both["frontier"]) > 3
    by_id = build(run_id, tracking_uri=uri, out=tmp_path / "b")
    by_name = build("my search", tracking_uri=uri, out=tmp_path / "c")
    assert by_id["folder"] is None
    (tmp_path / "store" / "mlflow.db").rename(tmp_path / "elsewhere.db")
    said: list[str] = []
    local = build(str(folder), out=tmp_path / "d", say=said.append)
    assert said == [f"the MLflow database {tmp_path}/store/mlflow.db is not there: read from the journals in {folder}"]
    assert not (tmp_path / "store" / "mlflow.db").exists()
    assert core(both) == core(by_id) == core(by_name) == core(local)
    csvs = {Path(each["artifacts"]["csv"]).read_text() for each in (both, by_id, by_name, local)}
    assert len(csvs) == 1


def test_the_parent_run_gets_numbers_and_files_and_the_trials_marks(delivery: Delivery, tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", trials=2)
    deliver_all(delivery, folder)
    document = build(str(folder))
    build(str(folder))  # again: nothing stands there twice
    client, run_id = delivery.store.client, document["run_id"]
    run = client.get_run(run_id)
    for family, value in document["hypervolume"].items():
        assert run.data.metrics[f"hypervolume/{family}"] == pytest.approx(value)
        assert len(client.get_metric_history(run_id, f"hypervolume/{family}")) == 1
    assert run.data.metrics["hypervolume/gain_over_plain"] == pytest.approx(document["gain"]["over_plain"])
    assert run.data.metrics["points"] == 17  # 6 trials with 3 evaluations, less one of the collapsed one
    files = {each.path: each.file_size for each in client.list_artifacts(run_id)}
    assert sorted(files) == ["frontier.csv", "frontier.html", "frontier.json", "frontier.png"]
    assert files["frontier.png"] == (folder / "frontier.png").stat().st_size
    marked = {point["trial"] for point in document["frontier"]}
    for each in delivery.store.children(run_id):
        data = client.get_run(each)
        assert data.data.tags["gru.on_frontier"] == ("true" if data.info.run_name in marked else "false")
        assert data.data.tags["gru.knee"] == ("true" if data.info.run_name == document["knee"]["trial"] else "false")
    assert "| rectified | 2 |" in run.data.tags["mlflow.note.content"]
    client.set_tag(run_id, "mlflow.note.content", "my own words")
    build(str(folder))
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == "my own words"


def test_what_mlflow_lacks_comes_from_the_journals_until_it_is_synced(delivery: Delivery, tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", trials=1)
    deliver_all(delivery, folder)
    write_trial(folder / "trials" / "plain-late", "plain-late", "plain", seed=9)
    said: list[str] = []
    before = build(str(folder), say=said.append)
    assert said == ["MLflow has 11 of 15 evaluations (--sync delivers the rest): read from the journals"]
    assert before["families"]["plain"]["trials"] == 2
    said.clear()
    after = build(str(folder), sync=True, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("delivered ")
    assert core(after) == core(before)
    assert len(delivery.store.children(after["run_id"])) == 4


def test_sync_delivers_a_search_that_never_reached_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_search(tmp_path / "search", trials=1)
    uri = empty_store(tmp_path / "m.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    document = build(str(folder))
    assert document["run_id"] is None
    assert "not in MLflow" in document["notes"][-1]
    synced = build(str(folder), sync=True)
    assert synced["run_id"] is not None
    assert core(synced) == core(document)
    assert remembered(folder)["uri"] == uri


def test_a_server_that_is_away_is_no_reason_to_fail_unless_it_was_asked_for(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search", trials=1)
    away = f"http://127.0.0.1:{free_port()}"
    stored = {"uri": away, "experiment": "study", "run_id": "0" * 32}
    (folder / "mlflow.json").write_text(json.dumps(stored))
    document = build(str(folder))
    assert document["notes"][-1].startswith(f"the MLflow server {away} cannot be reached")
    assert len(document["frontier"]) > 0
    for options in ({"sync": True}, {"tracking_uri": away}):
        with pytest.raises(InputError, match="cannot be reached"):
            build(str(folder), **options)  # type: ignore[arg-type]


def test_a_single_run_is_a_search_of_one(delivery: Delivery, tmp_path: Path) -> None:
    write_trial(tmp_path / "run", "run", "rectified")
    delivery.deliver(tmp_path / "run")
    document = build(str(tmp_path / "run"))
    assert list(document["families"]) == ["rectified"]
    assert document["families"]["rectified"]["points"] == 3
    assert (
        build(document["run_id"], tracking_uri=delivery.store.uri, out=tmp_path / "b")["frontier"]
        == (document["frontier"])
    )


def test_a_source_that_is_no_search_is_said_in_one_line(delivery: Delivery, tmp_path: Path) -> None:
    uri = delivery.store.uri
    with pytest.raises(InputError, match="no run with this id or name"):
        build("nothing", tracking_uri=uri)
    with pytest.raises(InputError, match=f"no MLflow database {tmp_path}/none.db"):
        build("nothing", tracking_uri=f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(InputError, match=r"is no search folder: it has no journal.jsonl"):
        build(str(tmp_path))
    with pytest.raises(InputError, match="--sync delivers a search folder"):
        build("nothing", tracking_uri=uri, sync=True)


def test_files_that_cannot_be_written_are_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="the frontier cannot be written to"):
        frontier.write(*summarise("hand", HAND), tmp_path / "taken")


def test_an_empty_search_has_no_frontier_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Journal(tmp_path / "search") as record:
        record.run("search", {"gru.kind": "search"})
    with pytest.raises(InputError, match="has no trials yet"):
        build(str(tmp_path / "search"))
