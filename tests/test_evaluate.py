"""The measuring: hand-derived models, a one-row float64 reference, Hugging Face's generation, two ranks."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import threading
import zlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gru_core import models
from gru_core.batch import Row, encode
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.config import EvaluateConfig, ModelConfig, PrepareConfig
from gru_core.errors import InputError
from gru_core.metrics import METRICS, Evaluation, evaluate, muse
from gru_core.metrics.generate import greedy
from gru_core.metrics.scorer import Scorer
from gru_core.metrics.truth_ratio import log_truth_ratio
from gru_core.parallel import Group, wrap

OURS = tuple(name for name in METRICS if name not in muse.METRICS)  # MUSE's score rows of their own: test_muse.py
EVERYTHING = EvaluateConfig(metrics=OURS, max_new_tokens=12)
SMALL = PrepareConfig(hidden=32, layers=2, heads=4, intermediate=48, vocab_size=400)
WORDS = ["amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath"]
WORDS += ["islet", "jetty", "knoll", "loch", "mesa", "north", "oasis", "peak"]


def qa_benchmark(rows: int = 7) -> Benchmark:
    """Short rows of every kind of set, ragged; paraphrases on some rows only."""

    def answer(seed: int, length: int) -> str:
        return " ".join(WORDS[(seed * 5 + i * i + i) % len(WORDS)] for i in range(length))

    def make(name: str, wrong: int, paraphrase: bool) -> tuple[EvalRow, ...]:
        return tuple(
            EvalRow(
                f"{name}:{i}",
                f"What of {WORDS[i % len(WORDS)]}" + " indeed" * (i % 3) + "?",
                answer(i + len(name), 4 + i % 5),
                paraphrase=answer(i + 1, 3 + i % 4) if paraphrase and i % 3 else None,
                perturbed=tuple(answer(i + 2 + w, 2 + (i + w) % 4) for w in range(wrong)),
            )
            for i in range(rows)
        )

    scored = {"forget": make("forget", 5, True), "retain": make("retain", 5, True)}
    scored |= {
        "authors": make("authors", 3, False),
        "facts": make("facts", 3, False),
        "holdout": make("holdout", 0, False),
    }
    rows_of = {name: tuple(Row(r.id, r.prompt, r.answer) for r in scored[name]) for name in ("forget", "retain")}
    return Benchmark("mine", rows_of["forget"], rows_of["retain"], scored)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bench() -> Benchmark:
    return qa_benchmark()


@pytest.fixture(scope="module")
def tokenizer(bench) -> Any:
    texts = [t for rows in bench.scored.values() for r in rows for t in (r.prompt, r.answer)]
    return models.build_tokenizer([*texts, "Question: Answer:\n", " ".join(WORDS)], SMALL)


@pytest.fixture(scope="module")
def llama(bench, tokenizer) -> nn.Module:
    """Trained until it knows some tokens and not others: arg-max hits and misses, EOS sooner and later."""
    model = models.build_small(tokenizer, SMALL, seed=3, positions=64)
    rows = [encode(tokenizer, row, 64) for row in bench.forget]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(28):
        for row in rows:
            ids = torch.tensor([row.ids])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def gpt2(tokenizer) -> nn.Module:
    """Learned positions, few of them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(5)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_positions=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4)
        ).eval()


@pytest.fixture(scope="module")
def found(llama, tokenizer, bench) -> Evaluation:
    return evaluate(llama, tokenizer, bench, replace(EVERYTHING, batch_rows=8), ModelConfig())


# --- against a loop over rows in float64 -----------------------------------------------------------------


def naive_row(model: nn.Module, tokenizer: Any, row: EvalRow, answer: str) -> tuple[float, int, list[bool]]:
    """NLL, |y| and hits of the tokens before the closing one: one row, no padding, float64, by hand."""
    prompt = [tokenizer.bos_token_id, *tokenizer.encode(f"Question: {row.prompt}\nAnswer:", add_special_tokens=False)]
    told = [*tokenizer.encode(f" {answer}", add_special_tokens=False), tokenizer.eos_token_id]
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([prompt + told])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(told) - 1)
    nll = -sum(float(logp[p, t]) for p, t in zip(places, told, strict=True))
    hits = [int(logp[p].argmax()) == t for p, t in zip(places, told[:-1], strict=False)]
    return nll, len(told), hits


def test_every_row_equals_a_float64_loop(llama, tokenizer, bench, found):
    exact = copy.deepcopy(llama).double()
    strengths: dict[str, list[float]] = {}
    for name, rows in bench.scored.items():
        for row, got in zip(rows, found.measurements.rows(name), strict=True):
            assert got.id == row.id
            nll, tokens, hits = naive_row(exact, tokenizer, row, row.answer)
            assert got.answer == (pytest.approx(nll, rel=1e-5, abs=1e-5), tokens)
            assert got.answer.probability == pytest.approx(math.exp(-nll / tokens), rel=1e-5)
            rest = [k for k in range(len(hits)) if all(hits[k:])]
            k = min(rest, default=len(hits))
            assert got.hits == (sum(hits), k, len(hits))
            strengths[name] = [*strengths.get(name, []), 1 - k / len(hits)]
            others = [row.paraphrase] if row.paraphrase else []
            expected = [naive_row(exact, tokenizer, row, text)[:2] for text in (*others, *row.perturbed)]
            measured = ([got.paraphrase] if got.paraphrase else []) + list(got.perturbed)
            assert [m.nll for m in measured] == pytest.approx([e[0] for e in expected], rel=1e-5)
            assert [m.tokens for m in measured] == [e[1] for e in expected]
    for name, score in (("forget", "extraction_strength"), ("retain", "retain_extraction_strength")):
        assert found.scores[score] == pytest.approx(sum(strengths[name]) / len(strengths[name]))
    # the model knows some rows in part, else this shows little
    assert len({round(s, 3) for values in strengths.values() for s in values}) > 3


def test_truth_ratio_scores_equal_the_loop(llama, tokenizer, bench, found):
    exact = copy.deepcopy(llama).double()

    def per_token(row: EvalRow, text: str) -> float:
        nll, tokens, _ = naive_row(exact, tokenizer, row, text)
        return nll / tokens

    ratios = []
    for row, got in zip(bench.scored["forget"], found.measurements.rows("forget"), strict=True):
        wrong = math.exp(-sum(per_token(row, p) for p in row.perturbed) / len(row.perturbed))
        ratios.append(wrong / math.exp(-per_token(row, row.paraphrase or row.answer)))
        assert math.exp(log_truth_ratio(got)) == pytest.approx(ratios[-1], rel=1e-5)
    expected = sum(min(r, 1 / r) for r in ratios) / len(ratios)
    assert found.scores["forget_truth_ratio"] == pytest.approx(expected, rel=1e-5)


def test_tails_and_gradients_equal_the_loop(llama, tokenizer, bench, found):
    """Membership inference as its papers have it, one row at a time in float64."""
    exact = copy.deepcopy(llama).double()
    scores: dict[str, dict[str, list[float]]] = {}
    for name in ("forget", "holdout"):
        for row, got in zip(bench.scored[name], found.measurements.rows(name), strict=True):
            question = f"Question: {row.prompt}\nAnswer:"
            prompt = [tokenizer.bos_token_id, *tokenizer.encode(question, add_special_tokens=False)]
            told = tokenizer.encode(f" {row.answer}", add_special_tokens=False)
            logp = exact(input_ids=torch.tensor([prompt + told])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            target = logp[range(len(told)), told]
            mu = (logp.exp() * logp).sum(-1)
            sigma = ((logp.exp() * logp.square()).sum(-1) - mu.square()).clamp(min=1e-6).sqrt()
            k = max(1, int(0.4 * len(told)))
            tail = [-float(x.detach().sort().values[:k].mean()) for x in (target, (target - mu) / sigma)]
            assert got.tail == (
                *map(lambda x: pytest.approx(x, rel=1e-4), tail),
                len(zlib.compress(row.answer.encode())),
            )
            exact.zero_grad()
            (-target.mean()).backward()
            norms = [float(p.grad.norm()) for p in exact.parameters()]
            assert got.gradient == pytest.approx(sum(norms) / len(norms), rel=1e-3)
            nll, tokens, _ = naive_row(exact, tokenizer, row, row.answer)
            loss = nll / tokens
            attacks = {"loss": loss, "zlib": loss / len(zlib.compress(row.answer.encode())), "min_k": tail[0]}
            attacks |= {"min_k_plus_plus": tail[1], "gradnorm": got.gradient}
            for attack, value in attacks.items():
                scores.setdefault(attack, {}).setdefault(name, []).append(value)
    for attack, of in scores.items():
        pairs = [float(f < h) for f in of["forget"] for h in of["holdout"]]
        assert found.scores[f"mia_{attack}"] == pytest.approx(sum(pairs) / len(pairs)), attack
    assert found.scores["mia_loss"] == 1  # it learned the forget rows
    assert found.scores["privleak"] == pytest.approx(100 * (1 - found.scores["mia_min_k"] - 0.5) / 0.5)
    assert "privleak: an AUC of 0.5 for the retain model, there is none to compare with" in found.notes


def test_gradients_leave_the_model_as_it_was(llama, tokenizer, bench):
    model = copy.deepcopy(llama).train()
    first, *rest = model.parameters()
    first.requires_grad_(False)
    for p in rest:
        p.grad = torch.ones_like(p)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    settings = EvaluateConfig(
        metrics=("mia_gradnorm",), unlearning="forget_probability", retention="retain_probability"
    )
    all_of_them = evaluate(model, tokenizer, bench, settings, ModelConfig()).scores
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.requires_grad
    assert first.grad is None
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in rest)
    assert model.training
    assert evaluate(llama, tokenizer, bench, settings, ModelConfig()).scores == all_of_them


def test_the_reference_attack_is_the_difference_of_losses(llama, tokenizer, bench, found):
    other = models.build_small(tokenizer, SMALL, seed=9, positions=64)
    reference = evaluate(other, tokenizer, bench, EVERYTHING, ModelConfig()).measurements
    scores = evaluate(llama, tokenizer, bench, EVERYTHING, ModelConfig(), reference=reference).scores
    gap = {
        name: [
            a.mean_nll - b.mean_nll
            for a, b in zip(found.measurements.answers(name), reference.answers(name), strict=True)
        ]
        for name in ("forget", "holdout")
    }
    assert scores["mia_reference"] == sum(f < h for f in gap["forget"] for h in gap["holdout"]) / 49
    retain = METRICS["mia_min_k"].compute(reference, None)
    assert 0 < retain < 1
    assert scores["privleak"] == pytest.approx(100 * (retain - scores["mia_min_k"]) / (1 - retain))


# --- models whose scores are known by hand ---------------------------------------------------------------


class Bigram(nn.Module):
    """The next token depends on the last one alone: logits are a table, so every score can be derived by hand."""

    def __init__(self, vocabulary: int, links: dict[int, int] | None = None) -> None:
        super().__init__()
        table = torch.zeros(vocabulary, vocabulary)
        for a, b in (links or {}).items():
            table[a, b] = 200.0
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.rows = 0

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        self.rows += len(input_ids)
        return SimpleNamespace(logits=self.table[input_ids], past_key_values=past_key_values)


@pytest.fixture
def chain(tokenizer) -> tuple[Benchmark, list[int]]:
    """One completion row a set: ``amber`` goes on with six distinct words."""
    row = EvalRow("forget:0", WORDS[0] + " ", " ".join(WORDS[1:7]), kind="completion", perturbed=(WORDS[9], WORDS[10]))
    scored = {name: (replace(row, id=f"{name}:0"),) for name in ("forget", "retain", "authors", "facts", "holdout")}
    token = encode(tokenizer, Row("x", row.prompt, row.answer, "completion"), 64)
    ids = list(token.ids[token.prompt_length - 1 :])
    assert len(ids) == 8  # last prompt token, six words, closing token
    assert len(set(ids)) == 8
    return Benchmark("chain", (), (), scored), ids


def test_uniform_model(chain, tokenizer):
    benchmark, _ = chain
    V = len(tokenizer)
    scores = evaluate(Bigram(V), tokenizer, benchmark, EVERYTHING, ModelConfig()).scores
    assert scores["forget_probability"] == pytest.approx(1 / V, rel=1e-5)
    assert scores["extraction_strength"] == scores["exact_memorization"] == scores["forget_rouge"] == 0
    assert scores["forget_truth_ratio"] == pytest.approx(1, abs=1e-5)  # wrong and right alike
    assert scores["model_utility"] == 0


def test_perfect_memoriser(chain, tokenizer):
    benchmark, ids = chain
    model = Bigram(len(tokenizer), dict(itertools.pairwise(ids)))
    result = evaluate(model, tokenizer, benchmark, EVERYTHING, ModelConfig())
    for name in ("forget_probability", "retain_probability", "forget_rouge", "extraction_strength",
                 "exact_memorization", "retain_extraction_strength", "retain_exact_memorization", "model_utility",
                 "retain_truth_ratio"):  # fmt: skip
        assert result.scores[name] == pytest.approx(1, abs=1e-6), name
    assert result.scores["forget_truth_ratio"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("missed", "es", "em", "rouge"),
    [
        (0, 5 / 6, 5 / 6, 0.0),  # the first word: generation leaves the track at once
        (3, 2 / 6, 5 / 6, 3 / 6),  # k = 4 of 6
        (5, 0.0, 5 / 6, 5 / 6),  # the last word: nothing can be extracted
        (6, 1.0, 1.0, 1.0),  # the closing token alone: left out of both
    ],
)
def test_one_broken_link_by_hand(chain, tokenizer, missed, es, em, rouge):
    benchmark, ids = chain
    links = dict(itertools.pairwise(ids))
    links[ids[missed]] = astray = tokenizer.convert_tokens_to_ids("▁" + WORDS[12])
    links[astray] = astray
    scores = evaluate(Bigram(len(tokenizer), links), tokenizer, benchmark, EVERYTHING, ModelConfig()).scores
    assert scores["extraction_strength"] == pytest.approx(es)
    assert scores["exact_memorization"] == pytest.approx(em)
    assert scores["forget_rouge"] == pytest.approx(rouge)
    # the wrong word has 200 nats less: p = exp(-200/7); the closing token counts here
    assert scores["forget_probability"] == pytest.approx(math.exp(-200 / 7), rel=1e-4)


def test_a_diverged_model_has_finite_honest_scores(chain, tokenizer):
    benchmark, ids = chain
    model = Bigram(len(tokenizer), dict(itertools.pairwise(ids)))
    with torch.no_grad():
        model.table.fill_(math.nan)
    result = evaluate(model, tokenizer, benchmark, EVERYTHING, ModelConfig())
    json.dumps(result.to_json(), allow_nan=False)
    attacks = {name: score for name, score in result.scores.items() if name.startswith("mia_")}
    assert len(attacks) == 5
    assert set(attacks.values()) == {0.5}  # one row of each, both lost: nothing told apart
    zero = set(result.scores) - {"forget_truth_ratio", *attacks}
    assert {name: result.scores[name] for name in zero} == dict.fromkeys(zero, 0.0)
    assert result.scores["forget_truth_ratio"] == 1  # right and wrong cannot be told apart


def test_one_token_that_is_not_a_number_costs_the_row_its_probability(chain, tokenizer):
    benchmark, ids = chain
    model = Bigram(len(tokenizer), dict(itertools.pairwise(ids)))
    with torch.no_grad():
        model.table[ids[2]] = math.nan  # predicts the third word
    scores = evaluate(model, tokenizer, benchmark, EVERYTHING, ModelConfig()).scores
    assert scores["forget_probability"] == 0
    assert scores["exact_memorization"] == pytest.approx(5 / 6)
    assert scores["extraction_strength"] == pytest.approx(3 / 6)
    assert scores["forget_rouge"] == pytest.approx(2 / 6)  # generation ends there


# --- what may not matter ---------------------------------------------------------------------------------


def same(a: Evaluation, b: Evaluation) -> None:
    assert a.scores == pytest.approx(b.scores, rel=1e-5, abs=1e-6)
    for name, rows in a.measurements.sets.items():
        for x, y in zip(rows, b.measurements.rows(name), strict=True):
            assert (x.id, x.hits, x.rouge) == (y.id, y.hits, y.rouge)
            if x.answer is not None:
                assert x.answer.nll == pytest.approx(y.answer.nll, rel=1e-5, abs=1e-5)
            assert x.tail == (pytest.approx(y.tail, rel=1e-4) if y.tail else None)
            assert [p.nll for p in x.perturbed] == pytest.approx([p.nll for p in y.perturbed], rel=1e-5)


@pytest.mark.parametrize("batch_rows", [1, 3, 1000])
def test_batch_size_changes_nothing(llama, tokenizer, bench, found, batch_rows):
    same(found, evaluate(llama, tokenizer, bench, replace(EVERYTHING, batch_rows=batch_rows), ModelConfig()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_rows", [1, 4, 1000])
def test_sharing_prompts_changes_the_work_and_no_number(
    request, tokenizer, bench, monkeypatch, family, batch_rows
) -> None:
    model = request.getfixturevalue(family)
    names = ("forget_truth_ratio", "retain_truth_ratio", "extraction_strength", "mia_min_k", "authors_probability")
    settings = EvaluateConfig(metrics=names, retention="retain_probability", batch_rows=batch_rows)
    tokens: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: tokens.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        shared = evaluate(model, tokenizer, bench, settings, ModelConfig())
        count = sum(tokens)
        monkeypatch.setattr(Scorer, "continues", lambda self: False)
        same(shared, evaluate(model, tokenizer, bench, settings, ModelConfig()))
    finally:
        hook.remove()
    assert count < 0.8 * (sum(tokens) - count)


def test_prompts_are_not_shared_behind_a_window(llama) -> None:
    assert Scorer.of(llama).continues()
    windowed = copy.copy(llama)
    windowed.config = copy.copy(llama.config)
    windowed.config.sliding_window = 8
    assert not Scorer.of(windowed).continues()
    assert not Scorer.of(Bigram(4)).continues()


def test_row_order_changes_nothing(llama, tokenizer, bench, found):
    turned = replace(bench, scored={name: rows[::-1] for name, rows in bench.scored.items()})
    result = evaluate(llama, tokenizer, turned, EVERYTHING, ModelConfig())
    back = {name: rows[::-1] for name, rows in result.measurements.sets.items()}
    same(found, replace(result, measurements=replace(result.measurements, sets=back)))


class Threads(Group):
    """Ranks as threads of this process: a gather meets at a barrier."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "board", board)
        object.__setattr__(self, "meet", barrier)

    def gather(self, value):
        self.board[self.rank] = value
        self.meet.wait()
        parts = list(self.board)
        self.meet.wait()
        return parts


@pytest.mark.parametrize("size", [2, 3, 40])  # 40: more ranks than rows
def test_number_of_ranks_changes_nothing(llama, tokenizer, bench, found, size):
    board: list[Any] = [None] * size
    barrier, results = threading.Barrier(size, timeout=120), [None] * size

    def run(rank: int) -> None:
        group = Threads(rank, size, board, barrier)
        results[rank] = evaluate(copy.deepcopy(llama), tokenizer, bench, EVERYTHING, ModelConfig(), group=group)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert result == results[0]  # every rank has the same, to the last bit
    same(found, results[0])


def _gloo_rank(rank: int, size: int, init: str, model, tokenizer, bench, queue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=size)
    group = Group(rank, size)
    result = evaluate(wrap(model, group), tokenizer, bench, EVERYTHING, ModelConfig(), group=group)
    queue.put((rank, result.to_json()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_gloo_processes_under_ddp_equal_one(llama, tokenizer, bench, found, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    arguments = (2, f"file://{tmp_path}/meet", llama, tokenizer, bench, queue)
    processes = [context.Process(target=_gloo_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert results[0] == results[1]
    same(found, Evaluation.from_json(results[0]))


def test_modes_and_random_state_stay_and_dropout_is_off(gpt2, tokenizer, bench):
    model = copy.deepcopy(gpt2)  # GPT-2 drops 10% in train mode
    model.train()
    model.transformer.h[0].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    state = torch.get_rng_state()
    config = replace(EVERYTHING, rows=3)
    first = evaluate(model, tokenizer, bench, config, ModelConfig())
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert first == evaluate(gpt2, tokenizer, bench, config, ModelConfig())
    assert all(p.grad is None for p in model.parameters())


# --- only what is asked for ------------------------------------------------------------------------------


def test_only_what_the_metrics_need_is_measured(chain, tokenizer, monkeypatch):
    benchmark, _ = chain

    def refuse(*args, **kwargs):
        raise AssertionError("generated without a ROUGE metric")

    monkeypatch.setattr("gru_core.metrics.measure.greedy", refuse)
    model = Bigram(len(tokenizer))
    config = EvaluateConfig(metrics=("extraction_strength",), retention="retain_extraction_strength")
    result = evaluate(model, tokenizer, benchmark, config, ModelConfig())
    assert model.rows == 2  # one answer of forget, one of retain
    assert set(result.scores) == {"extraction_strength", "retain_extraction_strength"}
    assert set(result.measurements.sets) == {"forget", "retain"}
    assert all(not r.perturbed and r.rouge is None for rows in result.measurements.sets.values() for r in rows)


def test_the_trade_off_metrics_are_always_measured(llama, tokenizer, bench):
    config = EvaluateConfig(
        metrics=("forget_rouge",), unlearning="forget_probability", retention="retain_rouge", rows=2
    )
    result = evaluate(llama, tokenizer, bench, replace(config, max_new_tokens=3), ModelConfig())
    assert set(result.scores) == {"forget_rouge", "forget_probability", "retain_rouge"}
    assert {name: len(rows) for name, rows in result.measurements.sets.items()} == {"forget": 2, "retain": 2}
    assert result.measurements.rows("retain")[0].answer is None


def test_forget_quality_against_a_reference(llama, tokenizer, bench, found):
    assert "forget_quality" not in found.scores
    assert any("forget_quality" in note for note in found.notes)
    again = evaluate(llama, tokenizer, bench, EVERYTHING, ModelConfig(), reference=found.measurements)
    assert again.scores["forget_quality"] == 1
    assert again.scores["forget_quality_log10"] == 0
    assert again.notes == ()
    assert set(again.scores) == {*OURS, "forget_quality_log10"}


def test_a_benchmark_of_ones_own_has_a_smaller_model_utility(llama, tokenizer, bench):
    bare = {n: tuple(replace(r, perturbed=(), paraphrase=None) for r in bench.scored[n]) for n in ("forget", "retain")}
    own = replace(bench, scored=bare)
    config = EvaluateConfig(metrics=("extraction_strength", "retain_probability", "retain_rouge"), max_new_tokens=8)
    result = evaluate(llama, tokenizer, own, config, ModelConfig())
    p, r = result.scores["retain_probability"], result.scores["retain_rouge"]
    assert result.scores["model_utility"] == pytest.approx(2 * p * r / (p + r))
    assert any("2 of 9" in note for note in result.notes)
    with pytest.raises(InputError, match="forget_quality cannot be computed on mine"):
        evaluate(llama, tokenizer, own, EvaluateConfig(metrics=("forget_quality",)), ModelConfig())


def test_documents_hold_no_texts(found, bench):
    text = json.dumps(found.to_json())
    assert not [word for word in (*WORDS, "Question", "What") if word in text]
    assert Evaluation.from_json(json.loads(text)) == found
    assert pickle.loads(pickle.dumps(found)) == found  # travels between Ray processes


def test_a_row_cut_at_the_models_length_has_no_closing_token(gpt2, tokenizer, bench):
    long = EvalRow("forget:9", "amber", " ".join(WORDS * 4))
    config = EvaluateConfig(metrics=("extraction_strength",), retention="retain_extraction_strength", rows=1)
    scored = {**bench.scored, "forget": (long,)}
    result = evaluate(gpt2, tokenizer, replace(bench, scored=scored), config, ModelConfig())
    (row,) = result.measurements.rows("forget")
    assert row.answer.tokens == row.hits.tokens < len(WORDS * 4)
    too_long = replace(long, prompt=" ".join(WORDS * 4))
    with pytest.raises(InputError, match="row forget:9: no answer token within 40"):
        evaluate(gpt2, tokenizer, replace(bench, scored={**scored, "forget": (too_long,)}), config, ModelConfig())


def test_bfloat16_computes_in_bfloat16_over_float32_weights(llama, tokenizer, bench, found):
    kinds = set()
    model = copy.deepcopy(llama)
    model.lm_head.register_forward_hook(lambda _m, _i, out: kinds.add(out.dtype))
    config = EvaluateConfig(metrics=("forget_probability",), retention="retain_probability")
    half = evaluate(model, tokenizer, bench, config, ModelConfig(dtype="bfloat16"))
    assert kinds == {torch.bfloat16}
    assert half.scores["forget_probability"] == pytest.approx(found.scores["forget_probability"], rel=0.05)
    assert half.scores["forget_probability"] != found.scores["forget_probability"]
    assert all(p.dtype == torch.float32 for p in model.parameters())


# --- generation ------------------------------------------------------------------------------------------


def hugging_face(model: nn.Module, prompt: list[int], stop: set[int], limit: int) -> list[int]:
    """Its own greedy search, one prompt, no padding."""
    out = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False, max_new_tokens=limit, eos_token_id=sorted(stop), pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    cut = [i for i, token in enumerate(out) if token in stop]
    return out[: cut[0]] if cut else out


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_rows", [1, 4, 64])
def test_batched_generation_equals_hugging_face_row_by_row(kind, batch_rows, llama, gpt2, tokenizer, request):
    model = request.getfixturevalue(kind)
    draw = torch.Generator().manual_seed(11)
    lengths = [3, 9, 4, 14, 1, 7, 7, 11, 2, 5]
    prompts = [torch.randint(4, len(tokenizer), (n,), generator=draw).tolist() for n in lengths]
    free = [hugging_face(model, p, {tokenizer.eos_token_id}, 20) for p in prompts]
    # stop tokens that end some rows early, some late, some never
    stop = {tokenizer.eos_token_id, free[1][2], free[5][9]} if kind == "gpt2" else {tokenizer.eos_token_id}
    expected = [hugging_face(model, p, stop, 20) for p in prompts]
    assert len({len(e) for e in expected}) > 2
    made = greedy(Scorer.of(model), prompts, stop=stop, pad_id=0, max_new_tokens=20, batch_rows=batch_rows)
    assert made == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("limit", [2, 5, 30])
def test_generation_from_where_it_leaves_the_answer_is_hugging_faces(
    kind, limit, llama, gpt2, tokenizer, bench, request, monkeypatch
) -> None:
    """Rows known by heart are not generated at all, and the others from their first wrong token on."""
    model = request.getfixturevalue(kind)
    passes: list[int] = []
    whole = greedy

    def counted(scorer, prompts, **rest):
        passes.append(sum(len(b) > 1 for b in rest["begun"]))
        return whole(scorer, prompts, **rest)

    monkeypatch.setattr("gru_core.metrics.measure.greedy", counted)
    settings = EvaluateConfig(metrics=("forget_rouge", "retain_rouge"), max_new_tokens=limit,
                              unlearning="forget_probability", retention="retain_probability")  # fmt: skip
    result = evaluate(model, tokenizer, bench, settings, ModelConfig(), texts=True)
    for name in ("forget", "retain"):
        for row, got in zip(bench.scored[name], result.measurements.rows(name), strict=True):
            ids = encode(tokenizer, Row(row.id, row.prompt, row.answer), 40 if kind == "gpt2" else 64)
            prompt = list(ids.ids[: ids.prompt_length])
            expected = hugging_face(model, prompt, {tokenizer.eos_token_id}, limit)
            assert got.generation == tokenizer.decode(expected, skip_special_tokens=True)
    assert (passes[0] > 3) is (kind == "llama"), "the trained one follows some answers for a while"


def test_generation_ends_where_the_positions_end(gpt2, tokenizer):
    prompts = [[5] * 38, [6, 7, 8], [9] * 30]
    alone = [greedy(Scorer.of(gpt2), [p], stop=(), pad_id=0, max_new_tokens=30, batch_rows=1)[0] for p in prompts]
    # 40 positions: the token that follows the last one can still be read off
    assert [len(a) for a in alone] == [3, 30, 11]
    assert greedy(Scorer.of(gpt2), prompts, stop=(), pad_id=0, max_new_tokens=30, batch_rows=3) == alone


def test_generation_of_nothing_and_without_a_cache(gpt2, tokenizer):
    assert greedy(Scorer.of(gpt2), [], stop=(), pad_id=0, max_new_tokens=3, batch_rows=2) == []

    class NoCache(Bigram):
        def forward(self, input_ids):
            raise AssertionError

    with pytest.raises(InputError, match="key-value cache, got NoCache"):
        greedy(Scorer.of(NoCache(9)), [[1]], stop=(), pad_id=0, max_new_tokens=3, batch_rows=2)


def test_every_end_token_of_the_model_stops(llama, tokenizer):
    from gru_core.metrics.measure import stop_tokens

    model = Bigram(9)
    assert stop_tokens(model, tokenizer) == {tokenizer.eos_token_id}
    model.generation_config.eos_token_id = [7, 8]
    assert stop_tokens(model, tokenizer) == {7, 8, tokenizer.eos_token_id}
