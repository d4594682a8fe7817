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
folder, first, progress, beats = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], int(sys.argv[4])
alive.START_S = first
with alive.watched(folder, 0, 2.0):
    if progress != "never":
        alive.beat()
    file = folder / "checkpoints" / ".part-1" / "model.safetensors"
    file.parent.mkdir(parents=True)
    for number in range(beats):
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


CASES = [
    (1.0, "batches", True),
    (1.0, "bytes", True),
    (1.0, "another", True),
    (60.0, "never", True),
    (1.0, "never", False),
    (60.0, "one", False),
]
"""Seconds for the first sign of life, what makes progress, and whether the process lives."""


def start(folder: Path, first: float, progress: str, lives: bool) -> subprocess.Popen[str]:
    folder.mkdir()
    beats = 40 if lives else 400  # twice the time-out; as long as it may take to be killed
    command = [sys.executable, "-c", SCRIPT, str(folder), str(first), progress, str(beats)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.slow
def test_a_process_lives_while_any_rank_makes_progress(tmp_path: Path) -> None:
    """All at once: they wait for most of their time."""
    running = [start(tmp_path / str(number), *case) for number, case in enumerate(CASES)]
    ended = [process.communicate(timeout=90) for process in running]
    for number, (case, process, (said, errors)) in enumerate(zip(CASES, running, ended, strict=True)):
        folder, (_, progress, lives) = tmp_path / str(number), case
        if lives:
            assert (process.returncode, said) == (0, "whole\n"), (case, errors)
            assert alive.hung(folder) == []
            assert progress == "another" or not (folder / alive.NAME).exists()
        else:
            assert process.returncode == -signal.SIGKILL, case
            assert "rank 0: no progress for 2 s" in errors
            assert alive.hung(folder) == [0]
            assert alive.hung(folder) == []


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
