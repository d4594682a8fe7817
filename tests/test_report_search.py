"""The report of a search: the same frontier as ``gru frontier``, the point that was asked for, and real runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gru_core.errors import InputError
from pipelines import frontier, report_page, settings
from pipelines.courier import deliver_all
from pipelines.delivery import Delivery, remembered
from pipelines.journal import Journal
from pipelines.tracking import Mlflow
from tests.fake_search import write_search
from tests.mlflow_server import empty_store
from tests.report_page import Page, write_run
from tests.study import Study, gru
from tests.test_pages import BROWSER, OPTIONS


def quiet(line: str) -> None:
    pass


def made(source: object, **options: Any) -> tuple[dict[str, Any], Page]:
    document = report_page.run(str(source), say=quiet, **options)
    return document, Page(Path(document["report"]).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine trials of 60 steps, evaluated every 20; the last one of plain collapsed."""
    return write_search(tmp_path_factory.mktemp("search") / "a study")


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_frontier_is_that_of_gru_frontier(search: Path, tmp_path: Path) -> None:
    document, page = made(search, output=str(tmp_path / "page.html"))
    expected = frontier.build(str(search), out=tmp_path / "frontier")
    families = page.numbers(f"Families of settings, on {'equal' if expected['comparable'] else 'unequal'} budgets")
    shown = {name.split(" (")[0]: values for name, values in families.items()}
    assert shown == {name: [volume] for name, volume in expected["hypervolume"].items()}
    rows = page.table("Points that no other point beats")[1:]
    assert [(row[0].removesuffix(" (knee)"), int(row[2]), float(row[3][1:]), float(row[4][1:])) for row in rows] == [
        (point["trial"], point["step"], point["unlearning"], point["retention"]) for point in expected["frontier"]
    ]
    assert sum(row[0].endswith(" (knee)") for row in rows) == 1
    assert sum(attrs.get("class") == "chosen" for tag, attrs in page.tags if tag == "tr") == 1
    knee = expected["knee"]
    assert (document["point"]["trial"], document["step"]) == (knee["trial"], knee["step"])
    scores = page.numbers("The starting model, the model of the chosen point")
    assert scores["unlearning"][1] == knee["unlearning"]
    assert scores["model utility"][1] == knee["metrics"]["model_utility"]
    for value in expected["hypervolume"].values():
        assert any(f"{value:.3f}" in (attrs.get("aria-label") or "") for tag, attrs in page.tags if tag == "svg")


def test_another_point_can_be_shown(search: Path, tmp_path: Path) -> None:
    document, page = made(search, output=str(tmp_path / "page.html"), point="plain-000:20")
    point = document["point"]
    assert (point["trial"], point["step"], point["knee"]) == ("plain-000", 20, False)
    scores = page.numbers("The starting model, the model of the chosen point")
    assert scores["unlearning"][1] == point["unlearning"]
    assert "It was asked for" in page.text
    assert document["course"]["measured"] == 20
    assert "chosen: step 20" in page.source


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ("plain-000", "allowed: TRIAL:STEP"),
        ("plain-000:x", "allowed: TRIAL:STEP"),
        ("plian-000:20", "unknown trial 'plian-000'; did you mean 'plain-000'"),
        ("plain-000:21", "got step 21 of plain-000, evaluated: 20, 40, 60"),
        ("plain-000:0", "evaluated: 20, 40, 60"),
    ],
)
def test_a_point_that_is_none_is_refused(search: Path, tmp_path: Path, point: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        made(search, output=str(tmp_path / "page.html"), point=point)
    with pytest.raises(InputError, match="this is a run and not a search"):
        made(write_run(tmp_path / "run"), point=point)
    assert not list(tmp_path.glob("*.html"))


def test_the_command_ends_at_the_chosen_step_or_there_is_none(tmp_path: Path) -> None:
    for schedule in ("constant", "linear"):
        folder = tmp_path / schedule
        with Journal(folder) as journal:
            journal.run(schedule, {"gru.kind": "search"})
            journal.status("finished")
        values = {"unlearn.schedule": schedule, "unlearn.evaluate_every": 10}
        trial = write_run(folder / "trials" / "plain-000", steps=10, tags={"gru.trial": "plain-000"}, values=values)
        document, _ = made(folder)
        commands = document["make"]["commands"]
        again = [f"gru unlearn -c {trial}/config.yaml --set unlearn.steps=10 --output runs/{schedule}-chosen"]
        assert commands == (again if schedule == "constant" else [])
        assert ("linear schedule over 20 steps" in document["make"]["note"]) == (schedule == "linear")
        assert settings.load(str(trial / "config.yaml")).unlearn.steps == 20


def test_a_search_without_a_point_says_so(tmp_path: Path) -> None:
    with Journal(tmp_path / "s") as journal:
        journal.run("s", {"gru.kind": "search"})
        journal.status("stopped")
    write_run(
        tmp_path / "s" / "trials" / "plain-000", evaluated=False, status="failed", tags={"gru.trial": "plain-000"}
    )
    document, page = made(tmp_path / "s")
    assert document["point"] is None
    assert "none was evaluated yet" in page.text
    assert "There is no evaluated point to make again" in page.text
    assert "can go on (--resume)" in page.text


def test_names_of_families_and_trials_are_text(tmp_path: Path) -> None:
    bad = '<b onclick="x">$\\frac$'
    folder = write_search(tmp_path / "s", families=("plain", bad.replace("/", "")), trials=1)
    _, page = made(folder)
    assert "b" not in {tag for tag, attrs in page.tags if attrs}
    assert bad in page.text


@pytest.mark.slow
def test_from_mlflow_alone_as_from_the_folder(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "gone", trials=2)
    delivery = Delivery(Mlflow(empty_store(tmp_path / "mlflow.db")), "study")
    deliver_all(delivery, folder)
    run_id = remembered(folder)["run_id"]
    local, _ = made(folder)
    shutil.rmtree(folder)
    remote, page = made("gone", tracking_uri=delivery.store.uri)
    assert (remote["report"], remote["in_mlflow"], remote["run_id"]) == ("report-gone.html", True, run_id)
    same = ("lead", "scores", "course", "step", "limits", "settings", "environment")
    assert {key: remote[key] for key in same} == {key: local[key] for key in same}
    for key in ("hypervolume", "frontier", "families", "gain", "knee"):
        assert remote["frontier"][key] == local["frontier"][key]
    assert "mlflow artifacts download --run-id" in page.text
    assert "frontier" in {(attrs.get("id") or "") for tag, attrs in page.tags if tag == "h2"}


# ------------------------------------------------------------------------------------------------ real runs


@pytest.mark.slow
def test_a_real_run_is_told_without_a_word_of_its_rows(study: Study, tmp_path: Path) -> None:
    settings_of = [f"--set=output.dir={tmp_path / 'run'}", "--set=unlearn.steps=4", "--set=unlearn.evaluate_every=2"]
    ran = gru(["unlearn", "-c", str(study.config), *settings_of], study.environment)
    assert ran.returncode == 0, ran.stderr
    told = gru(["report", str(tmp_path / "run"), "--json"], study.environment)
    assert told.returncode == 0, told.stderr
    document = json.loads(told.stdout)
    assert document["in_mlflow"]
    page = Page((tmp_path / "run" / "report.html").read_text())
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["scores"]
    shown = page.numbers("The starting model")
    baseline = json.loads((tmp_path / "run" / "baseline.json").read_text())
    for name, value in scores.items():
        retain = baseline["retain"]["scores"].get(name)
        assert shown[name.replace("_", " ")][1:] == [value, retain]
    rows = [json.loads(line) for line in (study.folder / "forget.jsonl").read_text().splitlines()]
    lines = [json.dumps([row["question"], row["answer"]], ensure_ascii=False) + "\n" for row in rows]
    assert hashlib.sha256("".join(lines).encode()).hexdigest() in page.text
    for row in rows:
        words = row["answer"].split()  # one alone may be the name of a setting
        for text in (row["question"], *(" ".join(words[i : i + 2]) for i in range(len(words) - 1))):
            assert text not in page.source + told.stdout + told.stderr
    weights = tmp_path / "run" / "model" / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in page.text
    from safetensors.torch import load_file

    count = sum(tensor.numel() for tensor in load_file(weights).values())
    assert f"{count:,} parameters" in page.text


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="Chromium is not installed")
def test_a_browser_without_javascript_shows_and_prints_it(search: Path, tmp_path: Path) -> None:
    document, _ = made(search, output=str(tmp_path / "page.html"))
    options = [*OPTIONS, "--host-resolver-rules=MAP * ~NOTFOUND"]
    # Chromium's own switch for scripts switches its screenshots off, too: the page itself forbids them, and all loading
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "strict.html").write_text(text.replace("<head>", f"<head>{policy}", 1), encoding="utf-8")
    url = (tmp_path / "strict.html").as_uri()

    def chromium(*more: str) -> None:
        command = [BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", *more, url]
        ran = subprocess.run(command, capture_output=True, check=False, timeout=120, env={**os.environ, "TZ": "UTC"})
        assert ran.returncode == 0, ran.stderr[-2000:]

    chromium("--window-size=1100,3000", "--hide-scrollbars", f"--screenshot={tmp_path / 'page.png'}")
    from matplotlib.image import imread

    pixels = imread(tmp_path / "page.png")
    assert pixels.shape[:2] == (3000, 1100)
    assert len({tuple(pixel) for pixel in (pixels[::7, ::7, :3].reshape(-1, 3) * 255).astype(int)}) > 50
    chromium("--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    printed = (tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert 3 <= pages <= 12
    if reader := shutil.which("pdftotext"):
        ran = subprocess.run([reader, str(tmp_path / "page.pdf"), "-"], capture_output=True, text=True, check=True)
        for text in (
            "What was to be forgotten",
            "Scores before and after",
            f"run {document['subject']}",
            "hypervolume",
        ):
            assert text in ran.stdout
