"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.study import Study, make

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--minutes", type=float, help="no slow test begins later than this; what is left out is listed as skipped"
    )


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("GRU_TESTS_BEGAN", str(time.time()))  # processes of pytest-xdist get it, too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files without slow tests first, then those with some, from another one on each day: where time is short
    (``--minutes``), each has its turn."""
    slow = list(dict.fromkeys(item.path for item in items if item.get_closest_marker("slow")))
    day = int(float(os.environ["GRU_TESTS_BEGAN"]) // 86400)  # the same one in every process, past midnight too
    turn = day * len(slow) // 3
    place = {path: 1 + (number - turn) % len(slow) for number, path in enumerate(slow)}
    items.sort(key=lambda item: place.get(item.path, 0))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and item.get_closest_marker("slow"):
        spent = (time.time() - float(os.environ["GRU_TESTS_BEGAN"])) / 60
        if spent > minutes:
            pytest.skip(f"left out: {minutes:g} minutes are over; the next day begins with other slow tests")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real TOFU, WMDP and published logs; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("GRU_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "tofu").is_dir():
        pytest.skip("real benchmark files are not here (set GRU_TEST_DATA to their folder)")
    return folder


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A real, tiny study with prepared models; see :mod:`tests.study`."""
    before = dict(os.environ)
    yield make(tmp_path_factory.mktemp("study"))
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models on few cores: threads that wait for each other cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _interrupts() -> None:
    """Ctrl-C as a terminal has it: a shell's background job starts with it ignored, and Ray leaves its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ask_for_tokens(mode: str | None) -> None:
    """Sets ``RAY_AUTH_MODE`` for this process and the Ray that it has imported, which remembers what it read."""
    os.environ.pop("RAY_AUTH_MODE", None)
    if mode is not None:
        os.environ["RAY_AUTH_MODE"] = mode
    if raylet := sys.modules.get("ray._raylet"):
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture(scope="module", autouse=True)
def _ray_as_new() -> Iterator[None]:
    """``ray.init`` switches tokens on in the environment for good; the next module starts without that."""
    before = os.environ.get("RAY_AUTH_MODE")
    ask_for_tokens(before)
    yield
    ask_for_tokens(before)
