"""The watchdog of a worker, in processes of its own: what counts as progress, and the end of one that makes none."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import alive

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys, time
from pathlib import Path
from pipelines import alive
folder, first, progress = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
alive.START_S = first
with alive.watched(folder, 0, 0.5):
    if progress != "never":
        alive.beat()
    file = folder / "checkpoints" / ".part-1" / "model.safetensors"
    file.parent.mkdir(parents=True)
    for number in range(15):
        time.sleep(0.1)
        if progress == "batches":
            alive.beat()
        if progress == "bytes":
            with file.open("a") as out:
                out.write("x")
        if progress == "another":
            alive._touch(folder / alive.NAME / "1")
print("whole")
"""


def run(folder: Path, first: float, progress: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(first), progress]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)


@pytest.mark.parametrize(
    ("first", "progress", "lives"),
    [
        (0.5, "batches", True),
        (0.5, "bytes", True),
        (0.5, "another", True),
        (60.0, "never", True),
        (0.5, "never", False),
        (60.0, "one", False),
    ],
)
def test_a_process_lives_while_any_rank_makes_progress(
    tmp_path: Path, first: float, progress: str, lives: bool
) -> None:
    done = run(tmp_path, first, progress)
    if lives:
        assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr
        assert alive.hung(tmp_path) == []
        assert progress == "another" or not (tmp_path / alive.NAME).exists()
    else:
        assert done.returncode == -signal.SIGKILL
        assert "rank 0: no progress for 0.5 s" in done.stderr
        assert alive.hung(tmp_path) == [0]
        assert alive.hung(tmp_path) == []


def test_every_batch_counts() -> None:
    import torch

    model = torch.nn.Linear(2, 2)
    alive.follow(model)
    before = alive._beats
    model(torch.zeros(1, 2))
    model(torch.zeros(1, 2))
    assert alive._beats == before + 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with alive.watched(tmp_path / "file", 0, 30.0):
        time.sleep(0.01)
