"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real TOFU, WMDP and published logs; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("GRU_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "tofu").is_dir():
        pytest.skip("real benchmark files are not here (set GRU_TEST_DATA to their folder)")
    return folder
