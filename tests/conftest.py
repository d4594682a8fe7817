"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.study import Study, make

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: processes that share the files out (``pytest -n``) then end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


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
