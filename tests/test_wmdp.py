"""Benchmark wmdp: which rows, which are scored, what is left out; and what a job takes along of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gru_core.benchmarks import load_benchmark, retain_subset
from gru_core.benchmarks.wmdp import SOURCES, SPLITS
from gru_core.config import BenchmarkConfig, LmEvalConfig, RetainConfig
from gru_core.errors import InputError
from pipelines import inputs, package, settings


def write(folder: Path, name: str, texts: list[Any]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def passages(what: str, n: int) -> list[str]:
    return [f"{what} {i}: " + "a passage of some length, " * (2 + i % 3) for i in range(n)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "cyber-forget-corpus", passages("attack", 900))
    write(tmp_path, "wikitext", ["", " = Heading = \n", *passages("history", 20), "x" * 50, "y" * 51])
    return tmp_path


def test_rows_and_what_scores_them(folder: Path) -> None:
    found = load_benchmark(BenchmarkConfig(name="wmdp", split="cyber", data_dir=str(folder)))
    assert found.name == "wmdp/cyber"
    assert [row.id for row in found.forget[:2]] == ["cyber-forget-corpus:0", "cyber-forget-corpus:1"]
    assert {row.kind for row in (*found.forget, *found.retain)} == {"text"}
    assert [row.id for row in found.retain] == [f"wikitext:{i}" for i in (*range(2, 22), 23)], "50 characters are short"
    scored = [row.id for row in found.scored["forget"]]
    assert scored[:3] == [f"cyber-forget-corpus:{i}" for i in (0, 2, 4)]  # 400 of 900, evenly spaced
    assert (len(scored), len(set(scored)), scored[-1]) == (400, 400, "cyber-forget-corpus:897")
    assert [row.id for row in found.scored["retain"]] == ["wikitext:2", "wikitext:7", "wikitext:12", "wikitext:17"]
    assert found.retain_scored == {0, 5, 10, 15}
    assert len(retain_subset(found, RetainConfig(), 0)) == 17, "what scores does not train"


def test_the_hub_is_asked_for_the_published_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def give(*names: Any, split: str) -> list[dict[str, str]]:
        asked.append((*names, split))
        return [{"text": text, "doi": "1"} for text in passages(str(names), 3)]

    monkeypatch.setattr(datasets, "load_dataset", give)
    for split in SPLITS:
        load_benchmark(BenchmarkConfig(name="wmdp", split=split))
    assert set(asked) == set(SOURCES.values())

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("gated")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"cais/wmdp-bio-forget-corpus .*ask its owners.*bio-forget-corpus.jsonl"):
        load_benchmark(BenchmarkConfig(name="wmdp", split="bio"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split": "cyber-corpora"}, "cyber-retain-corpus.jsonl missing"),
        ({"split": "forget10"}, "unknown split of benchmark wmdp 'forget10'"),
        ({"forget": "x.jsonl"}, "benchmark.forget"),
    ],
)
def test_bad_input_is_one_line(folder: Path, change: dict[str, str], said: str) -> None:
    config = replace(BenchmarkConfig(name="wmdp", split="cyber", data_dir=str(folder)), **change)
    with pytest.raises(InputError, match=said):
        load_benchmark(config)


def test_rows_are_named_by_place_and_never_repeated(folder: Path) -> None:
    write(folder, "wikitext", ["", 7])
    with pytest.raises(InputError, match=r"wikitext.jsonl, line 2: column 'text' must be text, got int"):
        load_benchmark(BenchmarkConfig(name="wmdp", split="cyber", data_dir=str(folder)))
    write(folder, "wikitext", ["short", "a text that is long enough to be kept, but it stands alone"])
    with pytest.raises(InputError, match="1 retain rows of more than 50 characters, at least 2"):
        load_benchmark(BenchmarkConfig(name="wmdp", split="cyber", data_dir=str(folder)))


def test_a_job_takes_corpora_questions_and_tasks_along(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (folder / "questions.json").write_text("[]")
    (folder / "tasks" / "deep").mkdir(parents=True)
    for name in ("own.yaml", "_template", "deep/other.yaml", "code.py"):
        (folder / "tasks" / name).write_text("task: own\n")
    monkeypatch.chdir(folder)
    config = settings.load("wmdp_cyber")
    own = LmEvalConfig(include_path="tasks", data={"wmdp_cyber": "questions.json"})
    config = replace(
        config,
        benchmark=replace(config.benchmark, data_dir=str(folder)),
        evaluate=replace(config.evaluate, lm_eval=own),
    )
    whole = inputs.absolute(config).evaluate.lm_eval
    assert whole.data == {"wmdp_cyber": str(folder / "questions.json")}
    assert whole.include_path == str(folder / "tasks")
    place = tmp_path / "package"
    place.mkdir()
    sent = package.build(config, place)
    files = {str(file.relative_to(place / "inputs")) for file in (place / "inputs").rglob("*") if file.is_file()}
    data, tasks = "evaluate.lm_eval.data.wmdp_cyber", "evaluate.lm_eval.include_path"
    assert files == {
        "benchmark.data_dir/cyber-forget-corpus.jsonl", "benchmark.data_dir/wikitext.jsonl", f"{data}/questions.json",
        f"{tasks}/own.yaml", f"{tasks}/_template", f"{tasks}/deep/other.yaml",
    }  # fmt: skip
    assert f'--set {data}="$PWD"/inputs/{data}/questions.json' in sent.overrides()
    again = settings.load(str(place / "config.yaml"), [f"{data}=/there/questions.json"])
    assert again.evaluate.lm_eval.data == {"wmdp_cyber": "/there/questions.json"}
