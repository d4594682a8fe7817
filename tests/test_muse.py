"""MUSE: its files, its pieces of text, and its scores against Hugging Face's own generation and a plain ROUGE-L."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gru_core import models
from gru_core.batch import Row, collate, encode, encode_whole
from gru_core.benchmarks import Benchmark, load_benchmark, retain_subset
from gru_core.benchmarks.muse import SPLITS
from gru_core.config import BenchmarkConfig, EvaluateConfig, ModelConfig, PrepareConfig, RetainConfig, RunConfig
from gru_core.errors import InputError
from gru_core.metrics import METRICS, check_metrics, evaluate, muse
from gru_core.metrics.generate import greedy
from gru_core.metrics.generations import CONTINUATION, continuation, reply
from pipelines import inputs, plan_inputs
from tests.muse_files import NAMES, write_muse
from tests.test_evaluate import Threads

MUSE = EvaluateConfig(
    metrics=(*muse.METRICS, "privleak", "extraction_strength"), unlearning="forget_verbmem", retention="retain_knowmem"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_muse(tmp_path_factory.mktemp("muse"))


@pytest.fixture(scope="module")
def bench(folder: Path) -> Benchmark:
    return load_benchmark(BenchmarkConfig(name="muse", split="news", data_dir=str(folder)))


def config(folder: Path, split: str = "news", **more: Any) -> BenchmarkConfig:
    return BenchmarkConfig(name="muse", split=split, data_dir=str(folder), **more)


def rows(folder: Path, place: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{place}.jsonl").read_text().splitlines()]


# ---- files


def test_rows_and_their_roles(bench: Benchmark, folder: Path) -> None:
    assert [row.id for row in bench.forget[:2]] == ["raw-forget:0", "raw-forget:1"]
    assert bench.forget[1].answer == rows(folder, "raw/forget")[1]["text"]
    assert {row.kind for row in bench.forget + bench.retain} == {"text"}
    assert [name for name in bench.scored] == [
        "forget",
        "retain",
        "holdout",
        "verbmem",
        "forget_knowmem",
        "retain_knowmem",
    ]
    asked = bench.scored["forget_knowmem"][0]
    shown, told = rows(folder, "knowmem/forget_qa_icl"), rows(folder, "knowmem/forget_qa")[0]
    lines = [f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in shown]
    assert asked.prompt == "".join(lines) + f"Question: {told['question']}\nAnswer: "
    assert (asked.id, asked.answer, asked.kind) == ("knowmem-forget_qa:0", told["answer"], "completion")
    first = rows(folder, "verbmem/forget")[0]
    assert (bench.scored["verbmem"][0].prompt, bench.scored["verbmem"][0].answer) == (first["prompt"], first["gt"])


def test_what_scores_retention_never_trains(bench: Benchmark, folder: Path) -> None:
    """retain2, from which questions and texts score, is known to the target and stays out of the retain stream."""
    trained = {bench.retain[i].id for i in retain_subset(bench, RetainConfig(), seed=0)}
    assert trained == {f"raw-retain1:{i}" for i in range(len(rows(folder, "raw/retain1")))}
    everything = retain_subset(bench, RetainConfig(include_scored=True), seed=0)
    assert {bench.retain[i].id.split(":")[0] for i in everything} == {"raw-retain1", "raw-retain2"}


def test_the_forget_sets_of_the_studies(folder: Path) -> None:
    texts = {s: {r.answer for r in load_benchmark(config(folder, s)).forget} for s in SPLITS if s.startswith("news/")}
    assert len(SPLITS) == 18
    for n in range(1, 4):
        assert texts[f"news/scal_{n}"] < texts[f"news/scal_{n + 1}"]
        assert not texts["news/sust_4"] & texts[f"news/sust_{n}"]
    assert load_benchmark(config(folder, "news/sust_2")).forget[0].id == "sust-forget_2:0"


def test_parquet_as_the_hub_stores_it(folder: Path, tmp_path: Path, bench: Benchmark) -> None:
    """Numbered files of the hub's repository, one table in two of them."""
    import pyarrow
    from pyarrow import parquet

    for file in folder.glob("*/*.jsonl"):
        table = [json.loads(line) for line in file.read_text().splitlines()]
        out = tmp_path / file.parent.name
        out.mkdir(exist_ok=True)
        halves = [table[:2], table[2:]] if file.stem == "retain1" else [table]
        for i, part in enumerate(halves):
            name = f"{file.stem}-{i:05d}-of-{len(halves):05d}.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(part), out / name)
    assert load_benchmark(config(tmp_path)) == bench
    (tmp_path / "raw" / "retain1-00001-of-00002.parquet").unlink()
    with pytest.raises(InputError, match="retain1 has 1 of 2 Parquet files"):
        load_benchmark(config(tmp_path))


def test_from_the_hub(folder: Path, bench: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(repository: str, subset: str, split: str) -> list[dict[str, str]]:
        asked.append((repository, subset, split))
        return rows(folder, f"{subset}/{split}")

    monkeypatch.setattr("datasets.load_dataset", fake)
    assert load_benchmark(BenchmarkConfig(name="muse", split="news")) == bench
    assert {repository for repository, _, _ in asked} == {"muse-bench/MUSE-News"}
    assert {(subset, split) for _, subset, split in asked} == {tuple(name.split("/")) for name in NAMES[:11]}
    with pytest.raises(InputError, match="MUSE-Books has no subset scal"):
        load_benchmark(BenchmarkConfig(name="muse", split="books/scal_1"))

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("the address of a proxy")

    monkeypatch.setattr("datasets.load_dataset", away)
    said = (
        r"muse-bench/MUSE-Books \(raw, forget\) cannot be loaded from the hub \(ConnectionError\); set benchmark.data"
    )
    with pytest.raises(InputError, match=said):
        load_benchmark(BenchmarkConfig(name="muse", split="books"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"split": "news/sust_5"}, "unknown split of benchmark muse 'news/sust_5'; did you mean 'news/sust_"),
        ({"split": "forget10"}, "unknown split of benchmark muse 'forget10'"),
        ({"retain_rows": 3}, "benchmark.retain_rows: got 3, allowed: null with benchmark muse"),
        ({"data_dir": "/nowhere"}, "benchmark.data_dir: /nowhere is not a folder"),
    ],
)
def test_bad_settings(folder: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_benchmark(replace(config(folder), **fields))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files(folder: Path, tmp_path: Path) -> None:
    write_muse(tmp_path)
    (tmp_path / "raw" / "forget.json").write_text('[{"text": "amber"}]')
    with pytest.raises(InputError, match=r"forget is there in 2 forms \(forget.jsonl, forget.json\)"):
        load_benchmark(config(tmp_path))
    (tmp_path / "raw" / "forget.json").unlink()
    (tmp_path / "verbmem" / "forget.jsonl").write_text('{"prompt": "amber", "text": "birch"}\n')
    with pytest.raises(InputError, match=r"verbmem/forget.jsonl, line 1: column 'gt' is missing"):
        load_benchmark(config(tmp_path))
    (tmp_path / "verbmem" / "forget.jsonl").unlink()
    with pytest.raises(InputError, match=r"verbmem/forget missing \(needed: raw/forget, raw/retain1, "):
        load_benchmark(config(tmp_path))
    (tmp_path / "verbmem" / "forget.parquet").write_bytes(b"amber birch")
    with pytest.raises(InputError, match=r"forget.parquet cannot be read as Parquet \(ArrowInvalid\)") as caught:
        load_benchmark(config(tmp_path))
    assert "birch" not in str(caught.value)


# ---- pieces


@pytest.fixture(scope="module")
def tokenizer(bench: Benchmark) -> Any:
    texts = [row.answer for row in bench.forget + bench.retain]
    texts += [text for part in bench.scored.values() for row in part for text in (row.prompt, row.answer)]
    return models.build_tokenizer(texts, SMALL)


SMALL = PrepareConfig(hidden=64, layers=2, heads=4, intermediate=128, vocab_size=500, tokenizer="bpe")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("limit", [2, 3, 7, 16, 400])
def test_no_token_of_a_long_text_is_lost(tokenizer: Any, bench: Benchmark, limit: int, bos: bool) -> None:
    """The tokens that carry loss, joined, are the text's, its very first left out where nothing predicts it."""
    its_own = tokenizer.bos_token
    tokenizer.bos_token = its_own if bos else None
    try:
        row = bench.forget[0]
        whole = [*tokenizer.encode(row.answer, add_special_tokens=False), tokenizer.eos_token_id]
        pieces = encode_whole(tokenizer, row, limit)
        carried = [i for piece in pieces for i in piece.ids[piece.prompt_length :]]
        assert carried == (whole if bos else whole[1:])
        assert all(len(piece.ids) == limit for piece in pieces[:-1])
        assert [piece.has_eos for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert {piece.id for piece in pieces} == {row.id}
        assert {piece.prompt_length for piece in pieces} == {1}
        context = [tokenizer.bos_token_id if bos else before.ids[-1] for before in pieces[:-1]]
        assert [piece.ids[0] for piece in pieces[1:]] == context
        assert (len(pieces) == 1) == (len(whole) + bos <= limit)
        if len(pieces) == 1:
            assert pieces == (encode(tokenizer, row, limit),)
    finally:
        tokenizer.bos_token = its_own


def test_answers_are_cut_as_before(tokenizer: Any) -> None:
    row = Row("r", "amber birch", "cedar " * 40)
    assert encode_whole(tokenizer, row, 30) == (encode(tokenizer, row, 30),)
    with pytest.raises(InputError, match="row r: a piece of text needs at least 2 tokens, the model takes 1"):
        encode_whole(tokenizer, Row("r", "", "amber", "text"), 1)


def test_a_run_and_its_plan_read_whole_texts(folder: Path, bench: Benchmark, tokenizer: Any, tmp_path: Path) -> None:
    """A model of 16 positions: rows stay rows where settings count them, and every token of them is read."""
    models.save_model(models.build_small(tokenizer, SMALL, seed=0, positions=16), tokenizer, tmp_path)
    run = RunConfig(model=ModelConfig(path=str(tmp_path)), benchmark=config(folder))
    shared = inputs.load(run)
    assert (len(shared.forget), len(shared.retain)) == (len(bench.forget), len(bench.retain))
    chosen = retain_subset(shared.benchmark, RetainConfig(size=3), seed=0)
    pieces = inputs.flat(shared.retain[i] for i in chosen)
    assert len({piece.id for piece in pieces}) == 3 < len(pieces)
    tokens = sum(len(tokenizer.encode(row.answer, add_special_tokens=False)) + 1 for row in bench.forget)
    assert sum(piece.answer_length for piece in inputs.flat(shared.forget)) == tokens
    planned = plan_inputs.lengths(run, models.load_settings(str(tmp_path)), None)
    everything = inputs.flat(shared.forget + shared.retain)
    assert sorted(planned.rows) == sorted(len(piece.ids) for piece in everything)


# ---- scores


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Longest common subsequence, by its definition."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def plain_f1(truth: str, made: str) -> float:
    """ROUGE-L F1 of words in lower case, without stemming: another scorer than the one under test."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (truth, made))
    common = lcs(a, b)
    return 0.0 if not common else 2 * common / (len(a) + len(b))


@pytest.fixture(scope="module")
def llama(bench: Benchmark, tokenizer: Any) -> nn.Module:
    """Trained on some of what scores it, so that generations are right, wrong and in between."""
    model = models.build_small(tokenizer, SMALL, seed=3, positions=400)
    known = [*bench.scored["verbmem"][:3], *bench.scored["forget_knowmem"][:4], *bench.scored["retain_knowmem"]]
    learn(model, tokenizer, [Row(r.id, r.prompt, r.answer, r.kind) for r in known], steps=60)
    return model


def learn(model: nn.Module, tokenizer: Any, rows: Sequence[Row], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    encoded = [encode(tokenizer, row, 400) for row in rows]
    batch = collate(encoded, range(len(encoded)), 0)
    for _ in range(steps):
        model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, labels=batch.labels_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def generated(model: nn.Module, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Hugging Face's own greedy generation behind one prompt."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]])
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_scores_equal_a_loop_over_hugging_face(llama: nn.Module, tokenizer: Any, bench: Benchmark) -> None:
    found = evaluate(llama, tokenizer, bench, MUSE, ModelConfig(), texts=True)
    expected: dict[str, list[float]] = {}
    for row in bench.scored["verbmem"]:
        made = generated(llama, tokenizer, row.prompt, 128)
        truth = tokenizer.decode(tokenizer(row.answer).input_ids[:128], skip_special_tokens=True)
        expected.setdefault("forget_verbmem", []).append(plain_f1(truth, made))
    for name in ("forget_knowmem", "retain_knowmem"):
        for row in bench.scored[name]:
            made = re.split(r"\n\n|\nQuestion|Question:", generated(llama, tokenizer, row.prompt, 32))[0]
            expected.setdefault(name, []).append(plain_f1(row.answer, made))
    for metric, name in (("forget_verbmem", "verbmem"), ("forget_knowmem", "forget_knowmem"), ("retain_knowmem",) * 2):
        assert [r.f1 for r in found.measurements.rows(name)] == pytest.approx(expected[metric])
        assert found.scores[metric] == pytest.approx(sum(expected[metric]) / len(expected[metric]))
    values = [value for part in expected.values() for value in part]
    assert min(values) < 0.5 < max(values), "the test sees good and bad generations"


def test_lengths_are_the_published_ones(
    llama: nn.Module, tokenizer: Any, bench: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def spy(scorer: Any, prompts: Sequence[Any], *, max_new_tokens: int, **options: Any) -> list[list[int]]:
        asked[len(prompts)] = max_new_tokens
        return greedy(scorer, prompts, max_new_tokens=1, **options)

    monkeypatch.setattr("gru_core.metrics.measure.greedy", spy)
    evaluate(llama, tokenizer, bench, replace(MUSE, max_new_tokens=7), ModelConfig())
    assert asked == {5: 128, 5 + 4: 32}  # 5 continuations; 5 replies about what is to be forgotten, 4 about the rest


def test_a_batch_of_one_scores_the_same(llama: nn.Module, tokenizer: Any, bench: Benchmark) -> None:
    many, one = (evaluate(llama, tokenizer, bench, replace(MUSE, batch_rows=n), ModelConfig()) for n in (64, 1))
    for name in muse.METRICS:
        assert many.scores[name] == one.scores[name]
    assert many.scores["privleak"] == pytest.approx(one.scores["privleak"])


def test_two_ranks_score_as_one(llama: nn.Module, tokenizer: Any, bench: Benchmark) -> None:
    board: list[Any] = [None] * 2
    barrier, found = threading.Barrier(2, timeout=120), [None] * 2

    def run(rank: int) -> None:
        group = Threads(rank, 2, board, barrier)
        found[rank] = evaluate(copy.deepcopy(llama), tokenizer, bench, MUSE, ModelConfig(), group=group)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = evaluate(llama, tokenizer, bench, MUSE, ModelConfig())
    assert found[0] == found[1]
    assert found[0].scores == pytest.approx(alone.scores)


def test_the_convention_reaches_every_number(llama: nn.Module, tokenizer: Any, bench: Benchmark) -> None:
    """Of a model that knows some: extraction strength differs by 1/n of each row that scores 0, F1 by its stems."""
    original, other = (
        evaluate(llama, tokenizer, bench, replace(MUSE, convention=c), ModelConfig())  # type: ignore[arg-type]
        for c in ("original", "openunlearning")
    )
    assert other.measurements.convention == "openunlearning"
    hits = [h for h in original.measurements.hits("forget") if h.prefix == h.tokens]
    assert hits, "the test sees a row whose last token is missed"
    added = sum(1 / h.tokens for h in hits) / len(bench.scored["forget"])
    assert other.scores["extraction_strength"] == pytest.approx(original.scores["extraction_strength"] + added)
    row = bench.scored["verbmem"][0]
    whole = continuation(tokenizer, row.answer, generated(llama, tokenizer, row.prompt, 128), "openunlearning").f1
    assert other.measurements.rows("verbmem")[0].f1 == pytest.approx(whole)


def test_a_model_that_memorised_scores_1(tokenizer: Any, bench: Benchmark) -> None:
    model = models.build_small(tokenizer, SMALL, seed=1, positions=400)
    known = [row for name in ("verbmem", "forget_knowmem", "retain_knowmem") for row in bench.scored[name][:2]]
    learn(model, tokenizer, [Row(r.id, r.prompt, r.answer, r.kind) for r in known], steps=120)
    scores = evaluate(model, tokenizer, bench, replace(MUSE, rows=2), ModelConfig()).scores
    assert [scores[name] for name in muse.METRICS] == [1, 1, 1]


def test_roles_and_missing_sets(bench: Benchmark) -> None:
    check_metrics(replace(MUSE, unlearning="forget_knowmem"), False, bench)
    with pytest.raises(InputError, match=r"evaluate\.unlearning: got 'retain_knowmem'"):
        check_metrics(replace(MUSE, unlearning="retain_knowmem"), False, bench)
    with pytest.raises(InputError, match="forget_verbmem cannot be computed on mine: it has no verbmem set"):
        check_metrics(MUSE, False, replace(bench, name="mine", scored={"forget": bench.scored["forget"]}))
    assert METRICS["forget_verbmem"].role == "forget"


# ---- conventions of generations


class Words:
    """A tokenizer whose tokens are words, with one in front of every text that asks for special tokens."""

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return type("Ids", (), {"input_ids": ["<s>"] * add_special_tokens + text.split()})

    def decode(self, ids: Sequence[str], skip_special_tokens: bool) -> str:
        return " ".join(i for i in ids if i != "<s>")


def test_a_continuation_is_compared_with_as_many_tokens_as_are_made() -> None:
    """A truth of 200 words of which 127 fit behind the token in front: 127 right ones are all of it, or 127 of 200."""
    truth = [f"w{i}" for i in range(200)]
    made = " ".join(truth[: CONTINUATION - 1])
    assert continuation(Words(), " ".join(truth), made, "original").f1 == 1
    recall = 127 / 200
    assert continuation(Words(), " ".join(truth), made, "openunlearning").f1 == pytest.approx(2 * recall / (1 + recall))


def test_openunlearning_stems() -> None:
    """cats running = cat run, stemmed: 1; unstemmed no word is common: 0."""
    for score in (continuation, reply):
        assert score(Words(), "cats running", "cat runs", "original").f1 == 0
        assert score(Words(), "cats running", "cat runs", "openunlearning").f1 == 1


@pytest.mark.parametrize("end", ["\n\nmore", "\nQuestion: x", " Question: x", ""])
def test_a_reply_ends_at_a_blank_line_or_the_next_question(end: str) -> None:
    assert reply(Words(), "amber birch", f"Amber birch{end}", "original").f1 == 1
