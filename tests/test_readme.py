"""The README's commands, in its order, from an empty folder; the demo as its promise says."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mlflow_server import free_port
from tests.ray_head import Head, ray_head  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

README = Path(__file__).parents[1] / "README.md"


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@dataclass(frozen=True)
class Said:
    """What a command printed, and when."""

    code: int
    lines: list[str]
    times: list[float]


def run(command: str, cwd: Path, environment: dict[str, str]) -> Said:
    words = shlex.split(command)
    assert words[0] == "gru", command
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", *words[1:]],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines, times = [], []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        times.append(time.monotonic() - start)
    return Said(process.wait(), lines, times)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """An empty working folder with a model cache of its own, and no settings from outside."""
    folder = tmp_path_factory.mktemp("readme")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_", "GRU_", "OMP_"))}
    return folder, kept | {"GRU_CACHE": str(folder / "cache")}


def test_the_readme_names_every_command() -> None:
    named = {shlex.split(c)[1] for c in commands()}
    expected = {
        "doctor",
        "demo",
        "plan",
        "unlearn",
        "evaluate",
        "export",
        "search",
        "frontier",
        "report",
        "ui",
        "submit",
    }
    assert named == expected
    assert "make demo" in README.read_text().split("```sh")[1].splitlines()[1]
    assert "make test" in README.read_text().split("```sh")[1].splitlines()[2]


def test_the_commands_run_in_order(
    place: tuple[Path, dict[str, str]],
    ray_head: Head,  # noqa: F811
) -> None:
    folder, environment = place
    for command in commands():
        if command.startswith("gru ui"):
            _browse(folder, environment)
            continue
        if command.startswith("gru submit"):
            command = command.replace("http://127.0.0.1:8265", ray_head.address)
        # half of the demo's trials: what it takes as a whole stands in docs/results
        said = run(command + " --set search.trials=24" * (command == "gru demo"), folder, environment)
        assert said.code == 0, (command, said.lines[-5:])
        if command == "gru demo":
            _demo(folder, said)
        elif command.startswith(("gru unlearn", "gru search")):
            assert any("cached in" in line for line in said.lines), "the models of the demo are used again"
    assert (folder / "runs" / "one" / "model" / "model.safetensors").exists()
    assert (folder / "models" / "one" / "model.safetensors").exists()
    assert "hypervolume" in (folder / "runs" / "small" / "report.html").read_text().lower()
    assert (folder / "runs" / "two" / "model" / "adapter_model.safetensors").exists()
    assert (folder / "runs" / "job" / "frontier.png").exists()


def _demo(folder: Path, said: Said) -> None:
    assert said.times[0] < 5, "progress within 5 seconds"
    gaps = [b - a for a, b in zip(said.times, said.times[1:], strict=False)]
    assert max(gaps) < 30, f"silent for {max(gaps):.0f} s"
    text = "\n".join(said.lines)
    for family in ("plain", "sum", "rectified"):
        assert re.search(rf"^  {family} +\d\.\d+$", text, re.M), f"hypervolume of {family}"
    for name in ("png", "html"):
        shown = re.search(rf"^{name}: (.+)$", text, re.M)
        assert shown
        assert Path(shown[1]).stat().st_size > 10_000
    assert "browse it: gru ui" in text
    document = json.loads((folder / "runs" / "demo" / "frontier.json").read_text())
    assert len(document["frontier"]) > 3
    trials = list((folder / "runs" / "demo" / "trials").iterdir())
    assert len(trials) == 24
    assert all((trial / "scores.json").exists() for trial in trials)


def _browse(folder: Path, environment: dict[str, str]) -> None:
    """`gru ui` serves the store of this folder on localhost, and ends when told to."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "ui", "--port", str(port)],
        cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search",
            data=b'{"max_results": 10}', headers={"Content-Type": "application/json"},
        )  # fmt: skip
        end = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    names = [e["name"] for e in json.load(answer)["experiments"]]
                    break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.5)
        assert "demo" in names
    finally:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) in (0, 130)
