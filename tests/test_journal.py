"""The local record of a run: nothing torn, nothing twice, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gru_core.errors import StorageError
from pipelines import journal
from pipelines.journal import Journal


def write(path: Path) -> Path:
    with Journal(path) as record:
        record.run("a", {"gru.family": "sum"})
        record.params({"unlearn.lr": 1e-5, "retain_model": None, "rectify.rule": "sum"})
        record.metrics(0, {"eval/unlearning": 0.0, "eval/retention": 1.0})
        record.metrics(1, {"train/cosine": -0.25})
        record.metrics(20, {"eval/unlearning": 0.5, "eval/retention": 0.75, "eval/model_utility": 0.4})
        record.artifact("config.yaml")
        record.status("finished")
    return path / journal.NAME


def test_lines_are_as_documented(tmp_path: Path) -> None:
    before = time.time() * 1000
    lines = [json.loads(line) for line in write(tmp_path).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "params", "metrics", "metrics", "metrics", "artifact", "status"]
    assert lines[0]["name"] == "a"
    assert lines[0]["tags"] == {"gru.family": "sum"}
    assert lines[1]["params"] == {"unlearn.lr": 1e-5, "retain_model": None, "rectify.rule": "sum"}
    assert lines[3]["step"] == 1
    assert lines[3]["metrics"] == {"train/cosine": -0.25}
    assert before - 1 <= lines[3]["time_ms"] <= time.time() * 1000
    assert lines[5]["path"] == "config.yaml"


def test_a_resumed_run_repeats_nothing(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = path.read_bytes()
    with Journal(path) as record:
        record.run("another name", {})
        record.params({"unlearn.lr": 3.0})
        record.metrics(20, {"eval/unlearning": 0.9, "eval/retention": 0.9})
        assert path.read_bytes() == before
        record.metrics(20, {"eval/unlearning": 0.9, "eval/rouge": 0.1})  # one known key, one new
        record.metrics(21, {"train/cosine": 0.5})
    added = [json.loads(line) for line in path.read_bytes()[len(before) :].splitlines()]
    assert [(line["step"], line["metrics"]) for line in added] == [
        (20, {"eval/rouge": 0.1}),
        (21, {"train/cosine": 0.5}),
    ]


def test_every_torn_end_is_cut_off_and_the_rest_kept(tmp_path: Path) -> None:
    whole = write(tmp_path).read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]
    for size in range(ends[2], len(whole) + 1):
        path = tmp_path / f"cut-{size}.jsonl"
        path.write_bytes(whole[:size])
        keep = max(end for end in ends if end <= size)
        entries, offset = journal.read(path)
        assert offset == keep
        assert len(entries) == ends.index(keep) + 1
        Journal(path).close()
        assert path.read_bytes() == whole[:keep]


def test_reading_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = write(tmp_path).read_bytes()
    path = tmp_path / "growing.jsonl"
    assert journal.read(path) == ([], 0)
    seen, offset = [], 0
    for size in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:size])
        entries, offset = journal.read(path, offset)
        seen += entries
    path.write_bytes(whole)
    seen += journal.read(path, offset)[0]
    assert seen == [json.loads(line) for line in whole.splitlines()]


def test_a_block_of_zeros_after_power_loss_is_a_torn_line(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 20 + b"\n")
    assert journal.read(path)[1] == len(whole)
    Journal(path).close()
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{oops\n", *lines[2:]]))
    with pytest.raises(StorageError, match=f"broken at byte {len(lines[0]) + len(lines[1])}"):
        journal.read(path)


def test_values_that_are_not_finite_are_left_out_named_and_counted(tmp_path: Path) -> None:
    with Journal(tmp_path) as record:
        record.metrics(3, {"train/forget_loss": float("nan"), "train/update_norm": float("inf"), "train/lr": 1e-5})
        assert record.non_finite == 2
    entry = journal.read(tmp_path)[0][0]
    assert entry["metrics"] == {"train/lr": 1e-5}
    assert entry["non_finite"] == ["train/forget_loss", "train/update_norm"]
    with Journal(tmp_path) as record:
        record.metrics(3, {"train/forget_loss": float("nan"), "train/lr": 2.0})
        assert record.non_finite == 2
    assert len(journal.read(tmp_path)[0]) == 1


def test_points_are_the_steps_with_both_scores(tmp_path: Path) -> None:
    write(tmp_path)
    with Journal(tmp_path) as record:
        record.metrics(40, {"eval/unlearning": 0.9})
    assert journal.points(tmp_path) == [
        {"step": 0, "unlearning": 0.0, "retention": 1.0},
        {"step": 20, "unlearning": 0.5, "retention": 0.75, "model_utility": 0.4},
    ]
    record_of = journal.load(tmp_path)
    assert (record_of.name, record_of.status, record_of.tags) == ("a", "finished", {"gru.family": "sum"})
    assert list(record_of.metrics) == [0, 1, 20, 40]


def test_disk_full_is_a_storage_error_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Journal(tmp_path)
    record.metrics(1, {"train/lr": 1.0})
    real = record._file

    class Full:
        """Takes ten bytes of a line, then has no space left: as a file system does."""

        taken = 0

        def write(self, data: bytes) -> int:
            if self.taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.taken = real.write(data[:10]) or 0
            return self.taken

    monkeypatch.setattr(record, "_file", Full())
    with pytest.raises(StorageError, match="No space left on device"):
        record.metrics(2, {"train/lr": 1.0})
    monkeypatch.setattr(record, "_file", real)
    record.metrics(3, {"train/lr": 1.0})
    assert [entry["step"] for entry in journal.read(tmp_path)[0]] == [1, 3]


def test_a_write_that_the_system_refuses_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pipelines.journal import Journal\n"
        "from gru_core.errors import StorageError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); record = Journal(sys.argv[1])\n"
        "try:\n"
        "    for step in range(100): record.metrics(step, {'train/lr': 1.0})\n"
        "except StorageError as error:\n"
        "    sys.exit(str(error))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "cannot be written: File too large" in ran.stderr
    data = (tmp_path / journal.NAME).read_bytes()
    assert 900 < len(data) <= 1000
    assert data.endswith(b"\n")


def test_a_killed_writer_loses_no_finished_line(tmp_path: Path) -> None:
    code = (
        "import sys; from pipelines.journal import Journal\n"
        "record = Journal(sys.argv[1]); step = 0\n"
        "while True:\n"
        "    step += 1; record.metrics(step, {'train/lr': 1.0}); print(step, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(50):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    steps = [entry["step"] for entry in journal.read(tmp_path)[0]]
    assert len(steps) >= 50
    assert steps == list(range(1, len(steps) + 1))


def test_importing_the_journal_imports_no_mlflow() -> None:
    code = "import sys, pipelines.journal, pipelines.tracking, pipelines.courier; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
