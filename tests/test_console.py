"""Signs of life, silence of the libraries, and documents in JSON's own types."""

from __future__ import annotations

import io
import json
import math
import os
import threading
import time
from pathlib import Path

import pytest

from pipelines import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_it_is_never_silent_for_long() -> None:
    stream = io.StringIO()
    with console.Progress(stream, first=0.1, every=0.3) as say:
        time.sleep(0.3)
        say("training the target model ...")
        time.sleep(1.0)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("... starting (")
    assert "training the target model ..." in lines
    after = lines[lines.index("training the target model ...") + 1 :]
    assert 2 <= len(after) <= 3  # one for each 0.3 s of 1.0
    assert all(line.startswith("... still at: training the target model (") for line in after)


def test_the_defaults_keep_the_promise() -> None:
    """A line within 5 seconds, and never more than 15 without one."""
    progress = console.Progress(io.StringIO())
    assert progress._first + 0.5 < 5
    assert progress._every + 0.5 < 15


def test_lines_that_come_often_need_no_sign_of_life() -> None:
    stream = io.StringIO()
    with console.Progress(stream, first=0.4, every=0.4) as say:
        for step in range(6):
            say(f"step {step}")
            time.sleep(0.1)
    assert stream.getvalue().splitlines() == [f"step {step}" for step in range(6)]


def test_on_a_terminal_the_sign_of_life_replaces_itself() -> None:
    stream = Terminal()
    with console.Progress(stream, first=0.1, every=0.1) as say:
        say("one")
        time.sleep(0.4)
        say("two")
    text = stream.getvalue()
    assert text.startswith("one\n... still at: one (0 s)")
    assert text.endswith("\r\x1b[Ktwo\n")
    assert text.count("\n") == 2


def test_lines_of_many_threads_stay_whole() -> None:
    stream = io.StringIO()
    with console.Progress(stream) as say:

        def speak(n: int) -> None:
            for _ in range(50):
                say(f"{n}" * 50)

        threads = [threading.Thread(target=speak, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 400
    assert all(len(line) == 50 and len(set(line)) == 1 for line in lines)


def test_a_stream_that_breaks_does_not_end_the_work() -> None:
    with console.Progress(Broken(), first=0.05, every=0.05) as say:
        say("one")
        time.sleep(0.2)
        say("two")


def test_the_heartbeat_ends_with_the_work() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), console.Progress(io.StringIO()):
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_libraries_are_silenced_and_what_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*console._ALWAYS, *console._QUIET, "GRU_VERBOSE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "DEBUG")
    console.quiet()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert os.environ["MLFLOW_LOGGING_LEVEL"] == "DEBUG"
    assert not console.verbose()


def test_verbose_lets_the_libraries_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*console._ALWAYS, *console._QUIET, "GRU_VERBOSE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    console.quiet(show=True)
    assert console.verbose()
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_plain_gives_what_json_can_hold() -> None:
    value = {"a": Path("x"), 1: (1, 2.5, True, None), "b": [math.nan, -math.inf], "c": {"d": {3}}}
    assert json.loads(json.dumps(console.plain(value), allow_nan=False)) == {
        "a": "x", "1": [1, 2.5, True, None], "b": [None, None], "c": {"d": [3]},
    }  # fmt: skip
