"""What a user sees in a browser: the frontier page, and the search's run in MLflow, in headless Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipelines.courier import deliver_all
from pipelines.delivery import Delivery, remembered
from pipelines.frontier import build
from pipelines.tracking import Mlflow
from tests.fake_search import write_search
from tests.mlflow_server import Server, empty_store

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="Chromium is not installed")]

OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
]  # fmt: skip


class Page(HTMLParser):
    """The text of a page, and the attributes of its elements."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._hidden = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._hidden = tag in {"script", "style"}

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if data.strip() and not self._hidden:
            self.text.append(data.strip())

    def classes(self, name: str) -> int:
        """How many elements have this class."""
        return sum(name in (attrs.get("class") or "").split() for _, attrs in self.elements)


def rendered(url: str, profile: Path, *, offline: bool = False) -> Page:
    """The page after its scripts ran; ``offline`` lets it reach nothing but itself."""
    blocked = ["--host-resolver-rules=MAP * ~NOTFOUND"] if offline else []
    ran = subprocess.run(
        [BROWSER, *OPTIONS, *blocked, f"--user-data-dir={profile}", "--virtual-time-budget=20000",
         "--window-size=1400,2000", "--dump-dom", url],
        capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return Page(ran.stdout)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A search that was delivered to a SQLite store, and its frontier."""
    base = tmp_path_factory.mktemp("pages")
    folder = write_search(base / "browsed-study", trials=3)
    delivery = Delivery(Mlflow(empty_store(base / "mlflow.db")), "study")
    deliver_all(delivery, folder)
    return {**build(str(folder)), "base": base, "experiment": delivery.experiment_id}


@pytest.fixture(scope="module")
def server(search: dict[str, Any]) -> Iterator[Server]:
    """MLflow's own pages over that store."""
    with Server(search["base"] / "server", store=search["tracking_uri"]) as started:
        yield started


def test_the_frontier_page_draws_every_point_without_a_network(search: dict[str, Any], tmp_path: Path) -> None:
    page = rendered(Path(search["artifacts"]["html"]).as_uri(), tmp_path, offline=True)
    legend = [text for text in page.text if text in {"plain", "sum", "rectified", "knee"}]
    assert set(legend) == {"plain", "sum", "rectified", "knee"}
    points = sum(row["points"] for row in search["families"].values())
    legend_marks = page.classes("legendpoints")
    assert legend_marks == 4
    drawn = sum(
        tag == "path" and (attrs.get("class") or "") == "point" for tag, attrs in page.elements
    )  # plotly's mark for a point
    assert drawn == points + 1  # and the ring of the knee
    assert page.classes("js-line") == 3  # stairs of three families
    assert "unlearning, from extraction strength (1 = forgotten)" in page.text
    assert "retention, from model utility (1 = as before)" in page.text
    assert "Forgetting against retention: browsed-study" in page.text


def test_the_page_shows_the_numbers_of_the_document(search: dict[str, Any], tmp_path: Path) -> None:
    page = rendered(Path(search["artifacts"]["html"]).as_uri(), tmp_path, offline=True)
    for value in search["hypervolume"].values():
        assert f"{value:.3f}" in page.text
    knee = search["knee"]
    row = page.text.index(f"{knee['trial']} (knee)")
    assert page.text[row + 1 : row + 5] == [
        knee["family"], str(knee["step"]), f"{knee['unlearning']:.3f}", f"{knee['retention']:.3f}",
    ]  # fmt: skip
    for note in search["notes"]:
        assert note in page.text


def test_the_parent_run_in_mlflow(search: dict[str, Any], server: Server, tmp_path: Path) -> None:
    run = f"{server.uri}/#/experiments/{search['experiment']}/runs/{search['run_id']}"
    page = rendered(run, tmp_path)
    assert "browsed-study" in page.text
    assert "Finished" in page.text
    assert any(re.fullmatch(r"rectified-00\d", text.strip(", ")) for text in page.text)  # child runs
    for family in ("plain", "sum", "rectified"):
        assert f"hypervolume/{family}" in page.text
    assert any("gru.kind" in text for text in page.text)


def test_the_artifacts_of_the_parent_run_in_mlflow(search: dict[str, Any], server: Server, tmp_path: Path) -> None:
    page = rendered(
        f"{server.uri}/#/experiments/{search['experiment']}/runs/{search['run_id']}/artifacts/frontier.png", tmp_path
    )
    for kind in ("csv", "html", "json", "png"):
        assert f"frontier.{kind}" in page.text


def test_the_curves_of_a_trial_in_mlflow(search: dict[str, Any], server: Server, tmp_path: Path) -> None:
    trial = remembered(Path(search["folder"]) / "trials" / "rectified-000")["run_id"]
    page = rendered(f"{server.uri}/#/experiments/{search['experiment']}/runs/{trial}", tmp_path)
    assert "rectified-000" in page.text
    for key in ("eval/unlearning", "eval/retention", "train/cosine", "rectify.strength"):
        assert key in page.text
