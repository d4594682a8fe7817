"""The command line: help, exit codes, one clear line for bad input and nothing written, one document for --json."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gru_core.config import RunConfig
from gru_core.errors import ConfigError, InputError, StorageError
from pipelines import cli, console, demo, exits, report, settings
from pipelines.journal import Journal

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("demo", "doctor", "prepare", "unlearn", "search", "frontier", "report", "submit", "ui")


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, a cache of its own, and an environment that is put back."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("GRU_CACHE", str(tmp_path / "cache"))
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def gru(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs one command in this process."""

    def run(*arguments: str) -> Answer:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        out, err = capfd.readouterr()
        return Answer(int(ended.value.code or 0), out, err)

    return run


def shell(*arguments: str, timeout: float = 120) -> Answer:
    """Runs one command as a user does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    return Answer(done.returncode, done.stdout, done.stderr)


def assert_refused(answer: Answer, *names: str) -> None:
    """Exit code 2, exactly one line on standard error that names what was wrong, nothing printed or written."""
    assert answer.code == 2, answer
    assert answer.out == ""
    assert answer.err.endswith("\n")
    assert answer.err.count("\n") == 1, answer.err
    assert "Traceback" not in answer.err
    for name in names:
        assert name in answer.err, answer.err
    assert list(Path.cwd().iterdir()) == []


def test_help_lists_every_command_with_a_line_and_an_example_at_once() -> None:
    start = time.monotonic()
    answer = shell("--help")
    assert time.monotonic() - start < 1.5
    assert answer.code == 0
    lines = answer.out.splitlines()
    for name in COMMANDS:
        assert [line for line in lines if line.split()[:1] == [name] and len(line.split()) > 3], name
        assert any(line.strip().startswith(f"gru {name}") for line in lines), name
    assert not any(line.endswith("...") for line in lines[1:])  # nothing is cut off


def test_help_loads_no_heavy_library() -> None:
    code = "import sys, pipelines.cli; print(*{'torch', 'ray', 'mlflow', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_its_example(name: str, gru: Callable[..., Answer]) -> None:
    answer = gru(name, "--help")
    assert answer.code == 0
    assert f"Example: gru {name}" in answer.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_a_command_line_that_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example reaches its command with its options understood: the work itself is cut off."""
    reached: list[str] = []

    def work(*_: object, **__: object) -> dict[str, object]:
        reached.append(name)
        return {"ok": True, "status": "finished"}

    monkeypatch.setattr(cli, "_run", work)
    monkeypatch.setattr("pipelines.console.run", work)
    monkeypatch.setitem(sys.modules, "pipelines.ui", _module(run=work))
    monkeypatch.setattr("pipelines.ui", sys.modules["pipelines.ui"], raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main(cli.EXAMPLES[name].split()[1:])
    assert (ended.value.code, reached) == (0, [name])


def _module(**members: object) -> ModuleType:
    module = ModuleType("fake")
    vars(module).update(members)
    return module


def test_no_command_prints_the_help(gru: Callable[..., Answer]) -> None:
    answer = gru()
    assert answer.code == 0
    assert "Commands:" in answer.out


# ------------------------------------------------------------------------------------------------ bad input

BAD: list[tuple[Sequence[str], Sequence[str]]] = [
    (["serch"], ["unknown command 'serch'; did you mean 'search'?", *COMMANDS]),
    (["search", "--seet", "x=1"], ["'--seet'; did you mean '--set'?", "--overwrite"]),
    (["search", "--set"], ["--set"]),
    (["search", "extra"], ["extra"]),
    (["ui", "--port", "many"], ["--port: got 'many'", "1 to 65535"]),
    (["ui", "--port", "0"], ["--port: got '0'"]),
    (["ui"], ["nothing is recorded yet", "mlflow.db"]),
    (["ui", "--tracking-uri", "http://127.0.0.1:5000"], ["server already"]),
    (["frontier"], ["SEARCH"]),
    (["submit"], ["no command given"]),
    (["submit", "--", "serch"], ["'serch'; did you mean 'search'?"]),
    (["submit", "status"], ["JOB"]),
    (["search", "-c", "demmo"], ["'demmo'; did you mean 'demo'?", "own_data"]),
    (["search", "-c", "no/such.yaml"], ["no/such.yaml"]),
    (["unlearn", "-c", "demo", "--set", "rectify.strenght=1"], ["did you mean 'rectify.strength'?"]),
    (["unlearn", "-c", "demo", "--set", "rectify.strength=-1"], ["rectify.strength: got -1.0", "from 0"]),
    (["unlearn", "-c", "demo", "--set", "retain.size=0"], ["retain.size: got 0"]),
    (["unlearn", "-c", "demo", "--set", "retain.size=100000"], ["retain.size: got 100000", "1 to "]),
    (["unlearn", "-c", "demo", "--set", "rectify.ema=0"], ["rectify.ema: got 0"]),
    (["unlearn", "-c", "demo", "--set", "unlearn.steps=0"], ["unlearn.steps: got 0"]),
    (["unlearn", "-c", "demo", "--set", "unlearn.steps=ten"], ["unlearn.steps: got 'ten'", "a whole number"]),
    (["unlearn", "-c", "demo", "--set", "unlearn.objective=nppo"], ["'nppo'; did you mean 'npo'?", "simnpo"]),
    (["unlearn", "-c", "demo", "--set", "rectify.rule=grru"], ["'grru'; did you mean 'gru'?", "sum"]),
    (["prepare", "-c", "demo", "--set", "benchmark.name=autors"], ["'autors'; did you mean 'authors'?", "jsonl"]),
    (["unlearn", "-c", "demo", "--set", "evaluate.metrics=[forget_qualty]"], ["did you mean 'forget_quality'?"]),
    (["unlearn", "-c", "demo", "--set", "retain_model=null", "--set", "evaluate.metrics=[forget_quality]"],
     ["forget_quality", "retain_model"]),
    (["unlearn", "-c", "demo", "--output", "x", "--overwrite", "--resume"], ["--overwrite and --resume"]),
    (["unlearn", "-c", "demo", "--resume"], ["nothing to resume"]),
    (["unlearn", "-c", "own_data"], ["my-model"]),
    (["unlearn", "-c", "demo", "--tracking-uri", "ftp://x"], ["ftp://x"]),
    (["demo", "--set", "search.trials=25"], ["search.trials: got 25", "a multiple of 3"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "names"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: Sequence[str], names: Sequence[str], gru: Callable[..., Answer]
) -> None:
    lines = [arguments]
    if arguments[0] in ("prepare", "unlearn", "search", "demo") and arguments[-1] != "--set":
        lines.append([*arguments, "--json"])
    for line in lines:
        assert_refused(without_signs_of_life(gru(*line)), *names)


def without_signs_of_life(answer: Answer) -> Answer:
    """A slow machine may still be importing when the first one is due."""
    out, err = (re.sub(r"^\.\.\. starting \(\d+ s\)\n", "", text, flags=re.M) for text in (answer.out, answer.err))
    return Answer(answer.code, out, err)


def test_bad_input_in_a_process_of_its_own() -> None:
    answer = shell("unlearn", "-c", "demo", "--set", "rectify.rule=grru", "--json")
    assert_refused(without_signs_of_life(answer), "did you mean 'gru'?")


def test_an_output_folder_with_something_else_is_left_alone(tmp_path: Path, gru: Callable[..., Answer]) -> None:
    output = tmp_path / "precious"
    output.mkdir()
    (output / "thesis.tex").write_text("years")
    for option in ([], ["--overwrite"], ["--resume"]):
        answer = gru("unlearn", "-c", "demo", "--output", str(output), *option)
        assert_refused(without_signs_of_life(answer), "precious is not empty", "--overwrite")
    assert (output / "thesis.tex").read_text() == "years"


# ------------------------------------------------------------------------------------- exit codes, documents


def _search(monkeypatch: pytest.MonkeyPatch, run: Callable[..., object]) -> None:
    module = _module(run=run)
    monkeypatch.setitem(sys.modules, "pipelines.search", module)
    monkeypatch.setattr("pipelines.search", module, raising=False)


DOCUMENT: dict[str, Any] = {
    "search": "runs/demo",
    "frontier": [
        {"family": "rectified", "unlearning": 0.9, "retention": 0.8, "trial": "a", "step": 40,
         "params": {"rectify.strength": 3.0, "rectify.ema": 0.8}},
        {"family": "sum", "unlearning": 0.95, "retention": float("nan"), "trial": "b", "step": 60,
         "params": {"rectify.strength": 1.0, "rectify.ema": 0.8}},
    ],
    "hypervolume": {"plain": 0.7, "sum": 0.9, "rectified": 0.85},
    "artifacts": {"png": Path("runs/demo/frontier.png")},
    "tracking_uri": "sqlite:////elsewhere/my runs.db",
}  # fmt: skip


def test_json_prints_one_document_whatever_else_is_printed(
    monkeypatch: pytest.MonkeyPatch, gru: Callable[..., Answer]
) -> None:
    def run(config: RunConfig, *, overwrite: bool, resume: bool, say: console.Say) -> dict[str, object]:
        say("working")
        print("a library prints")
        os.write(1, b"a child process prints\n")
        return {**DOCUMENT, "options": [overwrite, resume]}

    _search(monkeypatch, run)
    answer = gru("search", "-c", "demo", "--json", "--resume")
    document = json.loads(answer.out)
    assert answer.code == 0
    assert answer.out.count("\n") == 1
    assert document["hypervolume"] == DOCUMENT["hypervolume"]
    assert document["options"] == [False, True]
    assert document["frontier"][1]["retention"] is None
    assert document["artifacts"]["png"] == "runs/demo/frontier.png"
    for line in ("working", "a library prints", "a child process prints"):
        assert line in answer.err


def test_options_and_overrides_reach_the_search(monkeypatch: pytest.MonkeyPatch, gru: Callable[..., Answer]) -> None:
    seen: list[RunConfig] = []

    def run(config: RunConfig, **_: object) -> dict[str, Any]:
        seen.append(config)
        return DOCUMENT

    _search(monkeypatch, run)
    answer = gru("search", "-c", "demo", "--set", "output.dir=a", "--output", "b", "--set", "train.seed=3",
                 "--tracking-uri", "sqlite:///x.db")  # fmt: skip
    assert answer.code == 0
    assert (seen[0].output.dir, seen[0].train.seed, seen[0].track.uri) == ("b", 3, "sqlite:///x.db")


def test_a_search_ends_with_table_volumes_pictures_and_the_way_to_mlflow(
    monkeypatch: pytest.MonkeyPatch, gru: Callable[..., Answer]
) -> None:
    rows = [
        {"trial": "a", "family": "rectified", "step": 40, "unlearning": 0.9, "retention": 0.8,
         "params": {"rectify.rule": "gru", "rectify.strength": 3.0, "rectify.ema": 0.8, "unlearn.lr": 1e-3}},
        {"trial": "b", "family": "rectified", "step": 60, "unlearning": 0.95, "retention": 0.7,
         "params": {"rectify.rule": "gru", "rectify.strength": 2.0, "rectify.ema": 0.8, "unlearn.lr": 1e-3}},
        {"trial": "c", "family": "sum", "step": 60, "unlearning": 0.99, "retention": 0.1,
         "params": {"rectify.rule": "sum", "rectify.ema": 1.0, "unlearn.lr": 1e-3}},
    ]  # fmt: skip
    _search(monkeypatch, lambda *_, **__: {**DOCUMENT, "frontier": rows})
    out = gru("search", "-c", "demo").out
    lines = [line.split() for line in out.splitlines()]
    # the rule and ema follow from the family, lr is the same everywhere
    assert ["family", "unlearning", "retention", "trial", "step", "strength"] in lines
    assert ["rectified", "0.9", "0.8", "a", "40", "3"] in lines
    assert ["sum", "0.99", "0.1", "c", "60"] in lines
    assert ["sum", "0.9"] in lines
    assert "png: runs/demo/frontier.png" in out
    assert "gru ui --tracking-uri 'sqlite:////elsewhere/my runs.db'" in out


def test_a_table_of_many_settings_fits_a_terminal() -> None:
    params = [{f"unlearn.a_setting_with_a_long_name_{n}": n + k for n in range(9)} for k in range(2)]
    points = [{"trial": f"t{k}", "family": "sum", "step": 1, "params": each} for k, each in enumerate(params)]
    lines = report.search({**DOCUMENT, "frontier": points})
    assert max(map(len, lines)) <= 140
    assert any("more searched settings: see the csv" in line for line in lines)
    assert "a_setting_with_a_long_name_0" in lines[1]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("the file\n  is bad"), 2, "gru: the file is bad"),
        (ConfigError("retain.size", 0, "from 1"), 2, "gru: retain.size: got 0, allowed: from 1"),
        (OSError(28, "No space left on device"), 1, "gru: OSError: [Errno 28] No space left on device"),
        (RuntimeError("what went wrong\nand more"), 1, "gru: what went wrong (--verbose shows where)"),
        (KeyError("key"), 1, "gru: KeyError: 'key' (--verbose shows where)"),
        (ValueError("Traceback (most recent call last)\n  line\nthe end"), 1, "gru: ValueError: the end (--verb"),
        (StorageError("disk full; last valid: c/step-20"), 1, "gru: disk full; last valid: c/step-20\n"),
        (KeyboardInterrupt(), 130, "gru: interrupted"),
    ],
)
def test_failures_have_their_code_and_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, gru: Callable[..., Answer]
) -> None:
    def run(*_: object, **__: object) -> None:
        raise error

    _search(monkeypatch, run)
    for option in ([], ["--json"]):
        answer = gru("search", "-c", "demo", *option)
        assert (answer.code, answer.out) == (code, "")
        assert answer.err.startswith(line)
        assert answer.err.count("\n") == 1


def test_verbose_shows_the_traceback_of_a_failure(monkeypatch: pytest.MonkeyPatch, gru: Callable[..., Answer]) -> None:
    def run(*_: object, **__: object) -> None:
        raise RuntimeError("deep inside")

    _search(monkeypatch, run)
    answer = gru("search", "-c", "demo", "--verbose")
    assert answer.code == 1
    assert "Traceback" in answer.err
    assert answer.err.splitlines()[-1] == "gru: deep inside"


def test_bad_input_found_by_a_ray_task_is_bad_input() -> None:
    from ray.exceptions import RayTaskError

    inner = InputError("row 7 has no answer")
    raised = RayTaskError("work", "Traceback ...\nInputError: row 7 has no answer", inner).as_instanceof_cause()
    assert exits.explain(raised) == (2, "row 7 has no answer")
    outer = RuntimeError("a worker failed")
    outer.__cause__ = raised
    assert exits.explain(outer) == (2, "row 7 has no answer")


def test_submit_passes_the_command_line_on(monkeypatch: pytest.MonkeyPatch, gru: Callable[..., Answer]) -> None:
    calls: list[object] = []

    def submit(arguments: list[str], *, address: str | None, wait: bool, say: console.Say) -> dict[str, object]:
        calls.append((arguments, address, wait))
        return {"job": "raysubmit_1"}

    def status(job: str, *, address: str | None) -> dict[str, object]:
        calls.append((job, address))
        return {"job": job, "status": "RUNNING"}

    module = _module(submit=submit, status=status, stop=status)
    monkeypatch.setitem(sys.modules, "pipelines.jobs", module)
    monkeypatch.setattr("pipelines.jobs", module, raising=False)
    job = ["search", "-c", "f.yaml", "--set", "a=b", "--json", "--verbose", "--help"]
    assert gru("submit", "--address", "http://h:1", "--no-wait", "--", *job).code == 0
    assert gru("submit", *job).code == 0
    assert json.loads(gru("submit", "--json", "status", "j", "--address", "http://h:1").out)["status"] == "RUNNING"
    assert "RUNNING" in gru("submit", "--address", "http://h:2", "stop", "j").out
    assert calls == [
        (job, "http://h:1", False), (job, None, True), ("j", "http://h:1"), ("j", "http://h:2"),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- demo


@pytest.mark.parametrize(
    ("volumes", "helps", "words"),
    [
        ({"plain": 0.7, "sum": 0.9, "rectified": 0.95}, True, ["0.95 against plain 0.7 and sum 0.9"]),
        ({"plain": 0.7, "sum": 0.9, "rectified": 0.85}, False, ["0.85 is not above that of sum"]),
        ({"plain": 0.9, "sum": 0.9, "rectified": 0.9}, False, ["0.9 is not above that of plain and sum"]),
    ],
)
def test_the_verdict_follows_the_numbers(volumes: dict[str, float], helps: bool, words: list[str]) -> None:
    sentence = report.best(volumes, 8)
    assert sentence.startswith("Rectification helps") is helps
    assert sentence.startswith("Rectification does not win") is not helps
    assert all(word in sentence for word in [*words, "8 trials each"])


def test_the_verdict_compares_only_what_compares() -> None:
    volumes = {"plain": 0.7, "rectified": 0.9}
    assert "cannot be compared" in report.best(volumes, 8, comparable=False)
    assert report.best({"mine": 0.7}, 8) == "Nothing to compare: the families are mine."


@pytest.fixture
def fake_demo(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A search that writes its journal's first line and nothing else; records whether it was told to overwrite."""
    told: list[bool] = []

    def run(
        config: RunConfig, *, overwrite: bool, resume: bool, say: console.Say, tags: dict[str, str]
    ) -> dict[str, object]:
        told.append(overwrite)
        with Journal(Path(config.output.dir)) as journal:
            journal.run("demo", {"gru.kind": "search", **tags})
        return DOCUMENT

    _search(monkeypatch, run)
    return told


def test_a_demo_replaces_a_demo_and_nothing_else(fake_demo: list[bool], tmp_path: Path) -> None:
    lines: list[str] = []
    document = demo.run(say=lines.append)
    demo.run(say=lines.append)
    assert fake_demo == [False, True]
    assert "not above that of sum" in document["verdict"]
    assert demo.lines(document)[-2] == document["verdict"]


@pytest.mark.parametrize("kind", ["run", "search"])
def test_a_run_with_the_demo_config_is_no_demo(fake_demo: list[bool], tmp_path: Path, kind: str) -> None:
    """`gru unlearn -c demo` and `gru search -c demo` write the same config; a demo must not delete their folder."""
    folder = tmp_path / "other"
    with Journal(folder) as journal:
        journal.run("mine", {"gru.kind": kind})
    (folder / "config.yaml").write_text(settings.to_yaml(settings.load("demo")))
    with pytest.raises(InputError, match="is not empty"):
        demo.run((), str(folder), say=lambda line: None)
    assert fake_demo == []
    assert (folder / "config.yaml").exists()


def test_the_demo_speaks_within_5_seconds_and_ends_with_what_was_promised(
    fake_demo: list[bool], gru: Callable[..., Answer]
) -> None:
    answer = gru("demo")
    assert answer.code == 0
    for part in ("hypervolume", "rectified", "frontier.png", "Rectification does not win", "gru ui"):
        assert part in answer.out
    document = json.loads(gru("demo", "--json").out)
    assert {"search", "frontier", "hypervolume", "artifacts", "tracking_uri", "verdict"} <= set(document)
