"""The doctor: what it finds on a healthy machine, and that each thing missing is named with its fix."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import doctor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def by_name(document: dict[str, object]) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in document["checks"]}  # type: ignore[attr-defined]


def test_a_healthy_machine_passes_quickly_and_nothing_is_written(tmp_path: Path) -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pipelines", "doctor", "--json"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)  # fmt: skip
    assert time.monotonic() - start < 10
    document = json.loads(done.stdout)
    checks = by_name(document)
    assert (done.returncode, document["ok"]) == (0, True)
    assert {"python", "cpus", "memory", "disk", "gpus", "ray cluster", "mlflow store"} <= set(checks)
    assert checks["torch"]["detail"] == importlib.metadata.version("torch")
    assert checks["ray"]["detail"] == importlib.metadata.version("ray")
    assert list(tmp_path.iterdir()) == []


def test_every_check_has_a_status_and_what_failed_a_fix() -> None:
    document = doctor.run(address="http://127.0.0.1:1", tracking_uri="http://127.0.0.1:1")
    for check in document["checks"]:
        assert check["status"] in ("ok", "warn", "fail")
        assert check["detail"]
        assert "\n" not in check["detail"]
    checks = by_name(document)
    assert not document["ok"]
    assert checks["ray cluster"]["status"] == "fail"
    assert "ray start --head" in checks["ray cluster"]["detail"]
    assert checks["mlflow store"]["status"] == "fail"
    assert "127.0.0.1:1" in checks["mlflow store"]["detail"]
    assert checks["mlflow store"]["fix"]
    text = "\n".join(doctor.lines(document))
    assert "fail  ray cluster" in text
    assert "something needed is missing" in text


def test_a_library_that_is_missing_or_old_comes_with_its_command() -> None:
    missing = doctor.library("no-such-library", ">=2")
    assert (missing.status, missing.fix) == ("fail", "pip install 'no-such-library>=2'")
    installed = importlib.metadata.version("numpy")
    old = doctor.library("numpy", ">=999")
    assert (old.status, old.detail) == ("fail", f"{installed}, needed: >=999")
    assert doctor.library("numpy", ">=1").status == "ok"


def test_what_is_checked_is_what_the_package_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["numpy>=1", "no-such-library>=3", "pytest>=8; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    assert {check.name: check.status for check in doctor.libraries()} == {"numpy": "ok", "no-such-library": "fail"}


def test_the_built_in_list_holds_what_pyproject_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package's metadata is not installed (a Ray job), the same libraries are checked by name."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.LIBRARIES) == {Requirement(line).name for line in project["dependencies"]}


def test_addresses_from_the_environment_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{port}")
    found = doctor.ray(None)
    assert (found.status, str(port) in found.detail) == ("fail", True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    assert doctor.mlflow(None).status == "fail"


def test_a_store_that_does_not_exist_yet_is_fine_and_is_not_made(tmp_path: Path) -> None:
    found = doctor.mlflow("sqlite:///new.db")
    assert found.status == "ok"
    assert "made by the first run" in found.detail
    assert not (tmp_path / "new.db").exists()
    (tmp_path / "bad.db").write_text("this is no database at all")
    assert doctor.mlflow("sqlite:///bad.db").status == "fail"


def test_little_memory_or_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_memory", lambda: (8 * doctor.GIB, 2 * doctor.GIB))
    few = doctor.memory()
    assert (few.status, few.detail) == ("warn", "2.0 GiB free of 8.0")
    assert few.fix
    monkeypatch.setattr(doctor, "_memory", lambda: (16 * doctor.GIB, 9 * doctor.GIB))
    assert doctor.memory().status == "ok"
    monkeypatch.setattr(doctor, "DISK_GIB", 1e9)
    assert doctor.disk().status == "warn"


def test_gpus_are_those_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    found = doctor.gpus()
    assert found.detail.startswith(f"{torch.cuda.device_count()}:" if torch.cuda.is_available() else "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    blind = doctor.gpus()
    assert blind.status == "warn"
    assert "CUDA build" in blind.fix
