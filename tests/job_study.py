"""What the tests of submitted jobs share: a study with own data in a working folder, and small helpers.

Import the fixtures where they are used: ``no_cluster_in_environment`` (for every test of the file) and ``study``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import package

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--set", "prepare.steps=60", "--set", "prepare.warmup=0", "--set", "prepare.hidden=32", "--set", "prepare.layers=1",
    "--set", "prepare.intermediate=32", "--set", "prepare.heads=2", "--set", "prepare.batch_size=16",
    "--set", "prepare.lr=0.01",
    "--set", "unlearn.steps=1", "--set", "unlearn.batch_size=2", "--set", "unlearn.evaluate_every=1",
    "--set", "evaluate.metrics=[extraction_strength, retain_extraction_strength]",
    "--set", "evaluate.retention=retain_extraction_strength",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_cluster_in_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A developer's own cluster, token or store must not change what is tested."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with own data, and with things that are nobody's business."""
    folder = tmp_path / "study"
    folder.mkdir()
    rows = {"forget": range(4), "retain": range(100, 112)}
    for name, numbers in rows.items():
        lines = [json.dumps({"question": f"What is {n}?", "answer": f"It is number {n}."}) for n in numbers]
        (folder / f"{name} rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "study.yaml").write_text(
        "benchmark: {name: jsonl, forget: forget rows.jsonl, retain: retain rows.jsonl}\n"
        "rectify: {rule: gru}\noutput: {dir: runs/one}\n"
    )
    (folder / ".git").mkdir()
    (folder / ".git" / "secret").write_text("x")
    (folder / "runs").mkdir()
    (folder / "runs" / "old.safetensors").write_text("x")
    (folder / "password.json").write_text("{}")
    monkeypatch.chdir(folder)
    return folder


def tiny(command: str = "unlearn", *more: str) -> list[str]:
    return [command, "-c", "study.yaml", *TINY, *more]


def told() -> tuple[list[str], Callable[[str], None]]:
    lines: list[str] = []
    return lines, lines.append


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def expected_code() -> set[str]:
    names = set()
    for top in package.CODE:
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".yaml") or path.name == "py.typed":
                names.add(path.relative_to(ROOT).as_posix())
    return names


def model_folder(path: Path, weights: int) -> Path:
    path.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_text("{}")
    (path / "model.safetensors").write_bytes(b"0" * weights)
    (path / "pytorch_model.bin").write_text("pickled")
    (path / "optimizer.pt").write_text("pickled")
    (path / ".gitattributes").write_text("x")
    return path
