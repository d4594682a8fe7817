"""A search of twelve trials that is stopped once and killed three times, and ends as a calm one would have."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipelines import journal, selection, settings, worker
from pipelines.ledger import NAME as LEDGER
from tests import faults
from tests.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, INTERVAL, TRIALS = 15, 5, 12
SPACE = "search.space={unlearn.lr: {low: 1.0e-4, high: 5.0e-4}, retain.size: [4, 8, 20]}"
GIVEN = [
    f"search.trials={TRIALS}", "search.sampler=random", SPACE, f"unlearn.steps={STEPS}",
    f"unlearn.evaluate_every={STEPS}", f"train.checkpoint_every={INTERVAL}",
]  # fmt: skip


class Shaken:
    """The search's folder, its marks, and what must not change any more."""

    def __init__(self, study: Study, place: Path) -> None:
        self.study, self.folder, self.marks, self.log = study, place / "run", place / "marks", place / "log"
        self.marks.mkdir()
        self.kept: dict[str, int] = {}
        self.killed: list[str] = []

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        arguments = ["search", "-c", str(self.study.config), "--output", str(self.folder), *more]
        return faults.driver([*arguments, *(word for each in GIVEN for word in ("--set", each))], self.study, self.log)

    def finished(self) -> dict[str, int]:
        return {f.parent.name: f.stat().st_mtime_ns for f in self.folder.glob("trials/*/scores.json")}

    def keep(self) -> None:
        self.check()
        self.kept |= self.finished()

    def check(self) -> None:
        now = self.finished()
        assert {name: now.get(name) for name in self.kept} == self.kept, "a finished trial was lost, or ran again"

    def catch(self, finished: int, process: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
        """Waits until so many trials are done and others are in the middle: these."""
        found: dict[str, psutil.Process] = {}

        def ready() -> bool:
            nonlocal found
            found = self.running(process)
            return bool(found) and len(self.finished()) >= finished

        faults.wait(ready, process)
        self.keep()
        return found

    def running(self, driver: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
        """Trials of a driver that are in the middle and were never killed, and their processes."""
        mine = {process.pid: process for process in psutil.Process(driver.pid).children(recursive=True)}
        found: dict[str, psutil.Process] = {}
        done = self.finished()
        for file in sorted(self.marks.iterdir()):
            name, _, pid = file.name.rpartition(".")
            if name not in done and name not in self.killed and 2 < len(file.read_text().split()) < STEPS:
                found |= {name: mine[int(pid)]} if int(pid) in mine else {}
        return found

    def kill(self, draw: random.Random, finished: int, driver: subprocess.Popen[bytes], *more: int) -> None:
        """Kills the process of a trial in the middle (behind the processes ``more``), with so many trials done.

        It is stopped first, and looked at again: it may have ended its trial meanwhile.
        """
        count = len(self.killed)
        while len(self.killed) == count:
            name, process = draw.choice(sorted(self.catch(finished, driver).items()))
            with suppress(psutil.NoSuchProcess):
                process.suspend()
                if name in self.running(driver):
                    for pid in more:
                        os.kill(pid, signal.SIGKILL)
                    process.kill()
                    self.killed.append(name)
                else:
                    process.resume()

    def executed(self) -> dict[str, list[list[int]]]:
        """The steps that each trial took, by process."""
        found: dict[str, list[list[int]]] = defaultdict(list)
        for file in sorted(self.marks.iterdir(), key=lambda file: file.stat().st_mtime_ns):
            found[file.name.rpartition(".")[0]].append([int(line) for line in file.read_text().split()])
        return found


def test_twelve_trials_stopped_once_and_killed_three_times(study: Study, tmp_path: Path) -> None:
    draw, shaken = random.Random(11), Shaken(study, tmp_path)
    process = shaken.start()
    shaken.catch(1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 130, shaken.log.read_text()
    assert "done; --resume goes on" in shaken.log.read_text()
    once = shaken.executed()
    for name, parts in once.items():
        assert parts == [list(range(1, len(parts[0]) + 1))], name
        last = max(journal.load(shaken.folder / "trials" / name).metrics)
        assert last == len(parts[0])
    shaken.keep()

    process = shaken.start("--resume")
    shaken.kill(draw, 4, process)
    shaken.kill(draw, 6, process, process.pid)
    process.wait()
    for name in shaken.executed():  # what was stopped in order went on where it was
        if name in once and len(once[name][0]) < STEPS and len(shaken.executed()[name]) > 1:
            assert shaken.executed()[name][1][:1] in ([len(once[name][0]) + 1], [])
    process = shaken.start("--resume")
    shaken.kill(draw, 8, process)
    assert process.wait(240) == 0, shaken.log.read_text()
    shaken.check()
    _nothing_is_lost_or_twice(shaken)
    _as_undisturbed(shaken, tmp_path)


def _nothing_is_lost_or_twice(shaken: Shaken) -> None:
    ends = selection.outcomes(journal.read(shaken.folder / LEDGER)[0])
    assert len(ends) == TRIALS
    assert {end["status"] for end in ends.values()} == {"finished"}
    executed = shaken.executed()
    assert len(executed) == TRIALS
    for name, parts in executed.items():
        assert {step for part in parts for step in part} == set(range(1, STEPS + 1))
        assert sum(map(len, parts)) - STEPS <= (len(parts) - 1) * INTERVAL, "more than an interval was repeated"
        folder = shaken.folder / "trials" / name
        faults.each_once(folder, STEPS, [0, STEPS])
        faults.tracked_once(folder, STEPS, faults.store_of(shaken.study))
    assert len(set(shaken.killed)) == 3
    assert all(len(executed[name]) > 1 for name in shaken.killed)


def _as_undisturbed(shaken: Shaken, place: Path) -> None:
    """Every trial that was cut off has the points that it has when it runs in one piece."""
    for name, parts in shaken.executed().items():
        if len(parts) > 1:
            mine, calm = shaken.folder / "trials" / name, place / "calm" / name
            worker.work(settings.load(str(mine / "config.yaml")), calm)
            assert journal.points(calm) == journal.points(mine)
