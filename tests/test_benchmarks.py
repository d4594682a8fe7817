"""Loading benchmarks by name, TOFU and the user's own files, and retain subsets."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gru_core.batch import Row
from gru_core.benchmarks import _OPTIONS, BENCHMARKS, Benchmark, EvalRow, load_benchmark, retain_subset
from gru_core.benchmarks.read import read_objects
from gru_core.config import BenchmarkConfig, RetainConfig
from gru_core.errors import ConfigError, InputError

SECRET = "zanzibar"
"""Stands in every row of the files below, and must stand in no error message."""


def qa(number: int | str, **more: Any) -> dict[str, Any]:
    return {"question": f"{SECRET} q{number}?", "answer": f"{SECRET} a{number}.", **more}


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def own(folder: Path, forget: Iterable[Mapping[str, Any]], retain: Iterable[Mapping[str, Any]]) -> BenchmarkConfig:
    paths = write(folder / "secrets.jsonl", forget), write(folder / "keep.jsonl", retain)
    return BenchmarkConfig(name="jsonl", forget=paths[0], retain=paths[1])


def refused(config: BenchmarkConfig) -> str:
    with pytest.raises(InputError) as caught:
        load_benchmark(config)
    message = str(caught.value)
    assert SECRET not in message
    assert "\n" not in message
    return message


# ---- names and options


def test_registry_and_options_agree() -> None:
    assert set(BENCHMARKS) == set(_OPTIONS) == {"authors", "tofu", "muse", "wmdp", "jsonl"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"name": "author"},
            "unknown benchmark 'author'; did you mean 'authors'? (valid: authors, jsonl, muse, tofu, wmdp)",
        ),
        ({"name": "tofu", "split": "forget1"}, "unknown split of benchmark tofu 'forget1'; did you mean 'forget10'?"),
        ({"name": "tofu", "forget": "x"}, "benchmark.forget: got 'x', allowed: None with benchmark tofu (only jsonl"),
        ({"name": "authors", "data_dir": "x"}, "benchmark.data_dir: got 'x', allowed: None with benchmark authors"),
        ({"name": "jsonl", "split": "forget01"}, "benchmark.split: got 'forget01'"),
        ({"name": "tofu", "seed": 3}, "benchmark.seed: got 3, allowed: 0 with benchmark tofu (only authors uses it)"),
        ({"name": "jsonl", "retain": "x"}, "benchmark.forget: got None"),
        ({"name": "authors", "retain_rows": 811}, "benchmark.retain_rows: got 811, allowed: null, or 1 to 810"),
    ],
)
def test_bad_names_and_options(fields: dict[str, Any], said: str) -> None:
    assert said in refused(BenchmarkConfig(**fields))


def test_retain_rows_cuts_scored_rows_too() -> None:
    whole = load_benchmark(BenchmarkConfig())
    cut = load_benchmark(BenchmarkConfig(retain_rows=100))
    assert cut.name == "authors/forget10/retain-first-100"
    assert cut.retain == whole.retain[:100]
    assert cut.forget == whole.forget
    assert cut.retain_scored == frozenset(range(0, 100, 8))
    assert cut.scored["retain"] == whole.scored["retain"][:13]
    assert cut.scored["forget"] == whole.scored["forget"]


# ---- retain subsets


def toy(rows: int, scored: Iterable[int]) -> Benchmark:
    retain = tuple(Row(f"retain:{i}", f"q{i}", f"a{i}") for i in range(rows))
    positions = frozenset(scored)
    marked = tuple(EvalRow(retain[i].id, retain[i].prompt, retain[i].answer) for i in sorted(positions))
    return Benchmark("toy", (Row("forget:0", "f", "f"),), retain, {"retain": marked}, retain_scored=positions)


@given(
    rows=st.integers(2, 60), scored=st.sets(st.integers(0, 59)), seed=st.integers(0, 2**40), include=st.booleans(),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_subsets_are_nested(rows: int, scored: set[int], seed: int, include: bool, data: st.DataObject) -> None:
    benchmark = toy(rows, {i for i in scored if i < rows - 1})
    trainable = set(range(rows)) - (set() if include else benchmark.retain_scored)
    most = len(trainable)
    large = data.draw(st.integers(1, most))
    small = data.draw(st.integers(1, large))

    def subset(size: int | float) -> list[int]:
        return retain_subset(benchmark, RetainConfig(size=size, include_scored=include), seed)

    assert set(subset(1.0)) == trainable
    assert len(subset(large)) == len(set(subset(large))) == large
    assert subset(large)[:small] == subset(small)
    assert subset(1.0)[:large] == subset(large)
    share = data.draw(st.floats(0.01, 1.0))
    assert subset(share) == subset(1.0)[: max(1, round(share * most))]


def test_subsets_depend_on_the_seed() -> None:
    benchmark = toy(100, range(10))
    draws = {tuple(retain_subset(benchmark, RetainConfig(size=20), seed)) for seed in range(20)}
    assert len(draws) == 20
    seen = {i for draw in draws for i in draw}
    assert len(seen) > 80  # 400 draws of 90 rows: 89 different ones are expected
    assert not seen & set(range(10))


def test_texts_and_subsets_are_the_same_in_every_process() -> None:
    """Neither hash randomisation nor the process has a say in the authors' rows or in what trains."""
    code = (
        "import hashlib\n"
        "from gru_core.benchmarks import load_benchmark, retain_subset\n"
        "from gru_core.config import BenchmarkConfig, RetainConfig\n"
        "b = load_benchmark(BenchmarkConfig())\n"
        "scored = [(r.id, r.paraphrase, r.perturbed) for rows in b.scored.values() for r in rows]\n"
        "digest = hashlib.sha256(repr(scored).encode()).hexdigest()\n"
        "found = (b.fingerprint(), digest, retain_subset(b, RetainConfig(size=50), 7))\n"
    )
    here: dict[str, Any] = {}
    exec(code, here)
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command, environment = [sys.executable, "-c", code + "print(found)"], {**os.environ, "PYTHONHASHSEED": other}
    root = Path(__file__).resolve().parents[1]
    there = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout
    assert there == f"{here['found']}\n"


def test_subset_larger_than_what_exists() -> None:
    benchmark = toy(10, {0, 5})
    with pytest.raises(ConfigError, match=r"retain.size: got 9, allowed: 1 to 8: 8 retain rows may train \(2 more"):
        retain_subset(benchmark, RetainConfig(size=9), 0)
    assert len(retain_subset(benchmark, RetainConfig(size=10, include_scored=True), 0)) == 10
    with pytest.raises(ConfigError, match="nothing: 0 retain rows may train"):
        retain_subset(toy(2, {0, 1}), RetainConfig(), 0)


# ---- the user's own files


def test_forms_and_ids(tmp_path: Path) -> None:
    forget = [
        qa(1, paraphrased_answer="other words", perturbed_answer=["wrong", "false"], topic="ignored"),
        {"prompt": "Once upon", "completion": " a time"},
        {"text": "All of it."},
        {**qa(4), "text": None, "perturbed_answer": None},
    ]
    benchmark = load_benchmark(own(tmp_path, forget, [qa(f"r{i}") for i in range(12)]))
    assert benchmark.name == "jsonl/secrets"
    assert [(row.id, row.kind, row.prompt, row.answer) for row in benchmark.forget] == [
        ("forget:1", "qa", f"{SECRET} q1?", f"{SECRET} a1."),
        ("forget:2", "completion", "Once upon", " a time"),
        ("forget:3", "text", "", "All of it."),
        ("forget:4", "qa", f"{SECRET} q4?", f"{SECRET} a4."),
    ]
    scored = benchmark.scored["forget"]
    assert [row.id for row in scored] == [row.id for row in benchmark.forget]
    assert (scored[0].paraphrase, scored[0].perturbed) == ("other words", ("wrong", "false"))
    assert (scored[3].paraphrase, scored[3].perturbed) == (None, ())
    assert set(benchmark.scored) == {"forget", "retain"}
    assert benchmark.retain_scored == {0, 6}  # one in five of 12, evenly spaced
    assert [row.id for row in benchmark.scored["retain"]] == ["retain:1", "retain:7"]
    assert benchmark.background == ()


@pytest.mark.parametrize(("rows", "scored"), [(2, 1), (9, 1), (10, 2), (99, 19), (2500, 400)])
def test_scored_share_of_own_rows(tmp_path: Path, rows: int, scored: int) -> None:
    benchmark = load_benchmark(own(tmp_path, [qa(0)], [qa(f"r{i}") for i in range(rows)]))
    places = sorted(benchmark.retain_scored)
    assert len(places) == len(benchmark.scored["retain"]) == scored
    steps = {b - a for a, b in itertools.pairwise(places)}
    assert max(steps, default=0) - min(steps, default=0) <= 1
    assert len(retain_subset(benchmark, RetainConfig(), 0)) == rows - scored


def test_copies_of_a_scored_row_do_not_train(tmp_path: Path) -> None:
    rows = [qa("r0"), qa("r1"), qa("r0"), qa("r2")]
    benchmark = load_benchmark(own(tmp_path, [qa(0)], rows))
    assert benchmark.retain_scored == {0, 2}


def test_json_array_and_empty_lines(tmp_path: Path) -> None:
    array = tmp_path / "forget.jsonl"
    array.write_text(json.dumps([qa(1), qa(2)], indent=2), encoding="utf-8-sig")
    lines = tmp_path / "retain.json"
    lines.write_text("\n" + json.dumps(qa("a")) + "\r\n\n" + json.dumps({"text": "x\u2028y"}, ensure_ascii=False))
    benchmark = load_benchmark(BenchmarkConfig(name="jsonl", forget=str(array), retain=str(lines)))
    assert [row.id for row in benchmark.forget] == ["forget:1", "forget:2"]
    assert [row.id for row in benchmark.retain] == ["retain:2", "retain:4"]
    assert benchmark.retain[1].answer == "x\u2028y"


GOOD = json.dumps(qa("good"))
ACCEPTED = "accepted: 'question' and 'answer'; 'prompt' and 'completion'; 'text'"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f'{GOOD}\n{{"question": "{SECRET}"', "line 2: malformed JSON (column"),
        (f"{GOOD}\n{SECRET}\n", "line 2: malformed JSON"),
        (f"[{GOOD},\n{GOOD}\n{GOOD}]", "line 3: malformed JSON"),
        (f"{GOOD}\n[1]\n", "line 2: expected a JSON object, got list"),
        (f'[{GOOD}, "{SECRET}"]', "item 2: expected a JSON object, got str"),
        (f'{GOOD}\n{{"question": "{SECRET}"}}', f"line 2: column 'answer' is missing ({ACCEPTED})"),
        (f'{{"prompt": "{SECRET}"}}', "line 1: column 'completion' is missing"),
        (f'{{"question": null, "answer": "{SECRET}"}}', "line 1: column 'question' is missing"),
        (f'{{"body": "{SECRET}"}}', "line 1: no known column (accepted: "),
        (f'{{"text": "{SECRET}", "prompt": "{SECRET}", "completion": "{SECRET}"}}', "columns of 2 forms"),
        (f'{{"question": "{SECRET}", "answer": " "}}', "line 1: column 'answer' is an empty string"),
        (f'{{"question": "{SECRET}", "answer": 3}}', "line 1: column 'answer' must be text, got int"),
        (f'{{"text": "{SECRET} \\ud800"}}', "line 1: column 'text' holds half a surrogate pair"),
        (json.dumps(qa(1, perturbed_answer=[])), "line 1: column 'perturbed_answer' is an empty list"),
        (json.dumps(qa(1, perturbed_answer=SECRET)), "must be a list of texts, got str"),
        (json.dumps(qa(1, perturbed_answer=[SECRET, ""])), "column 'perturbed_answer' is an empty string"),
        (json.dumps({"text": SECRET, "perturbed_answer": [SECRET]}), "goes with 'question' and 'answer' only"),
        (f'{{"text": {"9" * 5000}}}', "line 1: malformed JSON"),
        ("[" * 100_000, "line 1: malformed JSON"),
        ("\n \n", "is empty: at least one row is needed"),
        ("[]", "is empty: at least one row is needed"),
        ("", "is empty"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("side", ["forget", "retain"])
def test_bad_files(tmp_path: Path, content: str, said: str, side: str) -> None:
    fine, bad = tmp_path / "fine.jsonl", tmp_path / "bad.jsonl"
    write(fine, [qa("x"), qa("y")])
    bad.write_text(content)
    paths = {"forget": str(fine), "retain": str(fine), side: str(bad)}
    message = refused(BenchmarkConfig(name="jsonl", forget=paths["forget"], retain=paths["retain"]))
    assert message.startswith(str(bad))
    assert said in message


def test_unreadable_files(tmp_path: Path) -> None:
    fine = write(tmp_path / "fine.jsonl", [qa("x"), qa("y")])
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(GOOD.encode() + b'\n{"text": "caf\xe9"}\n')
    for path, said in [
        (latin, "latin.jsonl, line 2: not UTF-8 text"),
        (tmp_path / "none.jsonl", "none.jsonl does not exist"),
        (tmp_path, "is a folder, a file was expected"),
    ]:
        assert said in refused(BenchmarkConfig(name="jsonl", forget=fine, retain=str(path)))


def test_one_retain_row_is_too_few(tmp_path: Path) -> None:
    assert "has 1 row, at least 2 are needed" in refused(own(tmp_path, [qa(0)], [qa(1)]))


def test_overlap_is_counted_and_named_without_texts(tmp_path: Path) -> None:
    forget = [qa("only"), *(qa(i) for i in range(7))]
    retain = [qa("other"), *(qa(i) for i in range(7))]
    message = refused(own(tmp_path, forget, retain))
    assert message.startswith("7 of 8 forget rows stand in the retain set too")
    assert "forget:2 = retain:2, forget:3 = retain:3" in message
    assert "forget:6 = retain:6, ..." in message
    assert "forget:7" not in message


def test_rows_that_no_model_saw(tmp_path: Path) -> None:
    config = own(tmp_path, [qa("f0"), qa("f1")], [qa(i) for i in range(5)])
    assert "holdout" not in load_benchmark(config).scored
    held_out = replace(config, holdout=write(tmp_path / "never.jsonl", [qa("h0"), {"text": f"{SECRET} h1"}]))
    rows = load_benchmark(held_out).scored["holdout"]
    assert [(row.id, row.kind) for row in rows] == [("holdout:1", "qa"), ("holdout:2", "text")]
    for row, where in ((qa("f1"), "forget"), (qa(3), "retain")):
        write(tmp_path / "never.jsonl", [qa("h0"), row])
        assert refused(held_out).startswith(f"1 of 2 holdout rows stand in the {where} set too")
    config = replace(config, holdout=str(tmp_path / "none.jsonl"))
    assert "none.jsonl does not exist" in refused(config)


def test_overlap_needs_the_answer_too(tmp_path: Path) -> None:
    forget = [{"question": "What is the full name of the author?", "answer": "One"}]
    retain = [{"question": "What is the full name of the author?", "answer": "Two"}, qa(1)]
    assert len(load_benchmark(own(tmp_path, forget, retain)).retain) == 2
    spaced = [{"question": "What is the full name of  the author? ", "answer": "Two\n"}]
    assert refused(own(tmp_path, spaced, retain)).startswith("1 of 1 forget rows")


# ---- TOFU


TOFU_SIZES = [("forget01", 40, 3960), ("forget05", 200, 3800), ("forget10", 400, 3600)]


@pytest.mark.parametrize(("split", "forget", "retain"), TOFU_SIZES)
def test_real_tofu(shared_data: Path, split: str, forget: int, retain: int) -> None:
    folder = shared_data / "tofu"
    benchmark = load_benchmark(BenchmarkConfig(name="tofu", split=split, data_dir=str(folder)))  # overlap free
    assert (len(benchmark.forget), len(benchmark.retain)) == (forget, retain)
    full = [json.loads(line) for line in (folder / "full.json").read_text().split("\n") if line]
    pairs = [(row.prompt, row.answer) for row in benchmark.retain + benchmark.forget]
    assert pairs == [(row["question"], row["answer"]) for row in full]
    assert benchmark.retain_scored == frozenset(range(400))
    sizes = {name: len(rows) for name, rows in benchmark.scored.items()}
    assert sizes == {"forget": forget, "retain": 400, "authors": 100, "facts": 117, "holdout": forget}
    known = {row.prompt for row in benchmark.forget + benchmark.retain}
    assert not [row for row in benchmark.scored["holdout"] if row.prompt in known]
    assert [row.id for row in benchmark.scored["forget"]] == [f"{split}:{i}" for i in range(forget)]
    for name, wrong in {"forget": 5, "retain": 5, "authors": 3, "facts": 3}.items():
        rows = benchmark.scored[name]
        assert {len(row.perturbed) for row in rows} == {wrong}
        assert all((row.paraphrase is None) == (wrong == 3) for row in rows)
    assert len(benchmark.background) == 217
    raw = json.loads((folder / f"{split}_perturbed.json").read_text().split("\n")[3])
    row = benchmark.scored["forget"][3]
    found = (row.prompt, row.answer, row.paraphrase, list(row.perturbed))
    assert found == (raw["question"], raw["answer"], raw["paraphrased_answer"], raw["perturbed_answer"])


def test_real_tofu_cut(shared_data: Path) -> None:
    config = BenchmarkConfig(name="tofu", data_dir=str(shared_data / "tofu"), retain_rows=300)
    cut = load_benchmark(config)
    assert cut.name == "tofu/forget10/retain-first-300"
    assert len(cut.scored["retain"]) == len(cut.retain) == 300
    with pytest.raises(ConfigError, match="0 retain rows may train"):
        retain_subset(cut, RetainConfig(), 0)
    assert len(retain_subset(cut, RetainConfig(size=0.5, include_scored=True), 0)) == 150


def test_real_holdout_is_an_array(shared_data: Path) -> None:
    rows = read_objects(shared_data / "tofu" / "holdout10.json")
    assert len(rows) == 400
    assert rows[0][0].endswith("holdout10.json, item 1")


def tofu_tables() -> dict[str, list[dict[str, Any]]]:
    def perturbed(i: int | str, wrong: int = 5) -> dict[str, Any]:
        return qa(i, paraphrased_answer=f"{SECRET} p{i}", perturbed_answer=[f"{SECRET} w{k}" for k in range(wrong)])

    facts = [qa(f"fact{i}", perturbed_answer=["x", "y", "z"]) for i in range(2)]
    return {
        "forget05": [qa("f0"), qa("f1")],
        "retain95": [qa(i) for i in range(6)],
        "forget05_perturbed": [perturbed("f0"), perturbed("f1")],
        "retain_perturbed": [perturbed(4), perturbed(1)],
        "real_authors_perturbed": facts,
        "world_facts_perturbed": [qa("world", perturbed_answer=["x", "y", "z"])],
        "holdout05": [qa("h0"), qa("h1"), qa("h2")],
    }


def tofu_folder(folder: Path, tables: Mapping[str, list[dict[str, Any]]]) -> BenchmarkConfig:
    for name, rows in tables.items():
        write(folder / f"{name}.json", rows)
    return BenchmarkConfig(name="tofu", split="forget05", data_dir=str(folder))


def test_tofu_from_the_hub_is_tofu_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, asked = tofu_tables(), []

    def fake(repository: str, name: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((repository, name, split))
        return tables[name]

    monkeypatch.setattr("datasets.load_dataset", fake)
    hub = load_benchmark(BenchmarkConfig(name="tofu", split="forget05"))
    assert sorted(asked) == sorted(("locuslab/TOFU", name, "train") for name in tables)
    assert hub == load_benchmark(tofu_folder(tmp_path, tables))
    assert hub.retain_scored == {1, 4}
    assert [row.id for row in hub.scored["retain"]] == ["retain95:4", "retain95:1"]
    assert [row.id for row in hub.background] == ["authors:0", "authors:1", "facts:0"]
    assert [row.id for row in hub.scored["holdout"]] == ["holdout05:0", "holdout05:1", "holdout05:2"]
    (tmp_path / "holdout05.json").unlink()
    without = load_benchmark(BenchmarkConfig(name="tofu", split="forget05", data_dir=str(tmp_path)))
    assert without.scored == {name: rows for name, rows in hub.scored.items() if name != "holdout"}


def test_tofu_hub_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", fake)
    message = refused(BenchmarkConfig(name="tofu"))
    assert "locuslab/TOFU (forget10) cannot be loaded from the hub (ConnectionError); set benchmark.data_dir" in message


def test_tofu_folder_errors(tmp_path: Path) -> None:
    tables = tofu_tables()
    config = tofu_folder(tmp_path, tables)
    tables["retain_perturbed"].append({**tables["retain_perturbed"][0], "answer": f"{SECRET} unknown"})
    write(tmp_path / "retain_perturbed.json", tables["retain_perturbed"])
    assert "retain_perturbed.json, line 3: this question with this answer is not in retain95" in refused(config)
    write(tmp_path / "forget05_perturbed.json", [qa("f0"), qa("f1")])
    assert "forget05_perturbed.json, line 1: column 'paraphrased_answer' is missing" in refused(config)
    (tmp_path / "retain95.json").unlink()
    message = refused(config)
    assert "retain95.json missing (needed: forget05.json, retain95.json, forget05_perturbed.json, retain_per" in message
    assert "world_facts_perturbed.json)" in message
    assert "missing" in refused(BenchmarkConfig(name="tofu", data_dir=str(tmp_path / "nowhere")))
