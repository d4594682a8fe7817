"""lm-eval's tasks as metrics: against lm-eval's own model, against counts by hand, on one rank and on two."""

from __future__ import annotations

import copy
import json
import logging
import random
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from gru_core.config import EvaluateConfig, ModelConfig
from gru_core.errors import InputError
from gru_core.metrics import Baseline, evaluate, trade_off
from gru_core.metrics.base import Evaluation, Measurements
from gru_core.metrics.lm_eval_closed import FetchedCode, closed
from gru_core.metrics.lm_eval_load import main_metric
from gru_core.metrics.lm_eval_model import Adapter
from gru_core.parallel import Group
from tests import lm_eval_small as small
from tests.test_evaluate import Threads

BIO = "lm_eval:wmdp_bio"


@pytest.fixture(scope="module")
def tok() -> Any:
    return small.tokenizer()


@pytest.fixture(scope="module")
def taught(tok: Any) -> Any:
    """Knows the first ten of thirty questions."""
    model = small.llama(tok)
    small.teach(model, tok, small.questions(10))
    return model


@pytest.fixture(scope="module")
def bio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"wmdp_bio": small.write(tmp_path_factory.mktemp("data") / "bio.json", small.questions(30))}


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=a, task_name="t", doc_id=i) for i, a in enumerate(arguments)]


def reference(model: Any, tok: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tok, batch_size=3, max_batch_size=3)


# --- against HFLM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loglikelihoods_are_those_of_hflm(kind: str, tok: Any, taught: Any) -> None:
    """Shared contexts, empty ones, ones that end in a space, and ones longer than the model."""
    model = taught if kind == "llama" else small.gpt2(tok, 40)
    pairs = [(small.prompt(q), f" {label}") for q in small.questions(8) for label in "ABCD"]
    pairs += [
        ("", "amber and stone"),
        ("Which of ", "these stands"),
        ("Which of", " these stands"),
        ("a" * 900, " b c"),
    ]
    pairs += [(small.prompt(small.questions(1)[0]), " " + "amber and " * 3), pairs[0]]
    asked = requests(*pairs)
    ours, theirs = Adapter(small.subject(model, tok), "t"), reference(model, tok)
    got, want = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert ours.max_length == theirs.max_length < max(len(tok.encode(a + b)) for a, b in pairs)
    assert [ll for ll, _ in got] == pytest.approx([ll for ll, _ in want], abs=1e-5, rel=1e-5)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    if kind == "llama":
        assert len({greedy for _, greedy in got}) == 2, "some continuations are greedy and some are not"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rolling_loglikelihoods_are_those_of_hflm(kind: str, tok: Any) -> None:
    model = small.llama(tok, 24) if kind == "llama" else small.gpt2(tok, 24)
    asked = requests(("amber",), (small.prompt(small.questions(3)[2]),), ("Say which " * 20,), ("",))
    ours, theirs = Adapter(small.subject(model, tok), "t"), reference(model, tok)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked, True), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generations_are_those_of_hflm(kind: str, tok: Any, taught: Any) -> None:
    model = taught if kind == "llama" else small.gpt2(tok, 40)
    model.generation_config.pad_token_id = tok.pad_token_id
    free = Adapter(small.subject(model, tok), "t").generate_until(
        requests((small.prompt(small.questions(1)[0]), {"until": [], "max_gen_toks": 12}))
    )[0]
    until = free[3:5]  # an end text that does come up
    assert until, "the model generates something"
    contexts = [small.prompt(q) for q in small.questions(5)] + ["amber", "b" * 200]
    kinds = [{"until": [until], "max_gen_toks": 12}, {"until": "zzz", "max_gen_toks": 7}, {"do_sample": False}]
    kinds[2] |= {"until": [until, "\n"], "max_gen_toks": 20, "temperature": 0.0}
    asked = requests(*((context, options) for options in kinds for context in contexts))
    got = Adapter(small.subject(model, tok), "t").generate_until(asked)
    theirs = reference(model, tok)
    assert got == [theirs.generate_until([one], disable_tqdm=True)[0] for one in asked]
    assert any(len(text) < len(free) for text in got[:7])


def test_what_cannot_be_asked_is_one_line(tok: Any) -> None:
    ours = Adapter(small.subject(small.llama(tok, 24), tok), "lm_eval:t")
    with pytest.raises(InputError, match=r"lm_eval:t: an answer has 0 tokens, allowed: 1 to 24"):
        ours.loglikelihood(requests(("amber", "")))
    with pytest.raises(InputError, match=r"lm_eval:t: an answer has \d+ tokens, allowed: 1 to 24"):
        ours.loglikelihood(requests(("amber", " b" * 60)))
    with pytest.raises(InputError, match=r"lm_eval:t: generates 256 tokens, the model takes 24 in all"):
        ours.generate_until(requests(("amber", {"until": ["x"]})))


# --- scores ----------------------------------------------------------------------------------------------


def by_hand(model: Any, tok: Any, rows: list[dict[str, Any]], prompts: list[str] | None = None) -> list[bool]:
    """Whether the likeliest of the four labels is the answer: one row at a time, no lm-eval."""
    labels = [tok.encode(f" {label}")[-1] for label in "ABCD"]
    right = []
    for row, prompt in zip(rows, prompts or map(small.prompt, rows), strict=True):
        ids = torch.tensor([tok.encode(prompt)[-256:]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1, labels]
        right.append(int(logits.argmax()) == row["answer"])
    return right


def test_the_score_is_a_count_by_hand(tok: Any, taught: Any, bio: dict[str, str]) -> None:
    right = by_hand(taught, tok, small.questions(30))
    assert all(right[:10])
    assert not all(right)
    found = evaluate(taught, tok, small.NOTHING, small.asking("wmdp_bio", data=bio), ModelConfig()).scores
    share = sum(right) / 30
    assert found == {
        BIO: pytest.approx(share),
        f"{BIO}/stderr": pytest.approx(np.std(right, ddof=1) / 30**0.5),
        f"{BIO}/chance": 0.25,
    }
    assert set(found) == {BIO, f"{BIO}/stderr", f"{BIO}/chance"}


def test_subjects_of_mmlu_from_a_file(tok: Any, taught: Any, bio: dict[str, str]) -> None:
    """The prompt of WMDP under another heading."""
    config = small.asking("mmlu_anatomy", data={"mmlu_anatomy": bio["wmdp_bio"]}, limit=12)
    found = evaluate(taught, tok, small.NOTHING, config, ModelConfig()).scores
    heading = small.INTRO.replace("biology", "anatomy")
    rows = small.questions(12)
    right = by_hand(taught, tok, rows, [small.prompt(row).replace(small.INTRO, heading) for row in rows])
    assert found["lm_eval:mmlu_anatomy"] == pytest.approx(sum(right) / 12)


def test_real_questions_and_a_model_that_knows_nothing(tok: Any, shared_data: Path) -> None:
    """All choices equally likely: the first is taken, so the score is the share of answers A; near chance."""
    files = {f"wmdp_{name}": str(shared_data / "wmdp" / f"{name}_questions.json") for name in ("bio", "chem", "cyber")}
    model = small.llama(tok, 64)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # type: ignore[union-attr]
    config = replace(small.asking("wmdp", limit=40, data=files), batch_rows=64)
    found = evaluate(model, tok, small.NOTHING, config, ModelConfig()).scores
    first = {
        task: [row["answer"] == 0 for row in json.loads(Path(file).read_text())[:40]] for task, file in files.items()
    }
    for task, hits in first.items():
        assert found[f"lm_eval:wmdp/{task}"] == pytest.approx(sum(hits) / 40)
    assert found["lm_eval:wmdp"] == pytest.approx(sum(map(sum, first.values())) / 120)
    assert found["lm_eval:wmdp/chance"] == 0.25
    assert abs(found["lm_eval:wmdp"] - 0.25) < 3 * found["lm_eval:wmdp/stderr"]


def test_the_trade_off_ends_at_chance() -> None:
    def scored(bio: float, mmlu: float) -> Evaluation:
        return Evaluation({BIO: bio, f"{BIO}/chance": 0.25, "lm_eval:mmlu": mmlu}, Measurements({}))

    config = EvaluateConfig(unlearning=BIO, retention="lm_eval:mmlu")
    start = Baseline(scored(0.65, 0.60))
    assert trade_off(scored(0.45, 0.57).scores, start, config) == {
        "unlearning": pytest.approx(0.5), "retention": pytest.approx(0.95),
    }  # fmt: skip
    assert trade_off(scored(0.24, 0.7).scores, start, config) == {"unlearning": 1.0, "retention": 1.0}
    known = Baseline(scored(0.65, 0.60), scored(0.45, 0.6))
    assert trade_off(scored(0.45, 0.6).scores, known, config)["unlearning"] == 1.0
    with pytest.raises(InputError, match=r"nothing to forget: .* is 0.25, not above guessing's 0.25"):
        trade_off(scored(0.2, 0.6).scores, Baseline(scored(0.25, 0.6)), config)


def test_which_metric_is_the_score() -> None:
    assert main_metric({"acc_norm": True, "acc": True}) == "acc"
    assert main_metric({"f1": True, "exact_match": True}) == "exact_match"
    assert main_metric({"word_perplexity": False, "f1": True}) == "f1"
    assert main_metric({"word_perplexity": False, "bits_per_byte": False}) == "word_perplexity"


# --- what it leaves alone --------------------------------------------------------------------------------


def test_model_random_state_and_silence(tok: Any, bio: dict[str, str], capfd: Any, caplog: Any) -> None:
    model = small.llama(tok).train()
    model.model.layers[0].eval()  # type: ignore[union-attr, index, operator]
    model.model.embed_tokens.weight.grad = grad = torch.ones(len(tok), 32)  # type: ignore[union-attr]
    modes, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    caplog.set_level(logging.DEBUG)
    capfd.readouterr()
    evaluate(model, tok, small.NOTHING, small.asking("wmdp_bio", data=bio), ModelConfig())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert model.model.embed_tokens.weight.grad is grad  # type: ignore[union-attr]
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.name.startswith(("lm_eval", "datasets"))]


def test_the_window_gives_everything_back() -> None:
    import evaluate as library
    import lm_eval.utils

    before = library.load, lm_eval.utils.env, logging.getLogger("lm_eval").level
    seed = random.getstate()
    with closed(), closed():
        random.random()
        with pytest.raises(FetchedCode):
            library.load("accuracy")
        with pytest.raises(Exception, match="unsafe"):
            lm_eval.utils.apply_template("{{ ''.__class__.__mro__ }}", {})
    assert (library.load, lm_eval.utils.env, logging.getLogger("lm_eval").level) == before
    assert random.getstate() == seed


# --- ranks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 5])
def test_number_of_ranks_changes_nothing(tok: Any, taught: Any, size: int) -> None:
    pairs = [(small.prompt(q), f" {label}") for q in small.questions(4) for label in "ABCD"]
    asked, texts = requests(*pairs, ("", "amber")), requests(("Say which " * 9,), ("amber",))
    made = requests(
        *((small.prompt(q), {"until": ["\n"], "max_gen_toks": 5 + i}) for i, q in enumerate(small.questions(3)))
    )

    def answers(group: Group) -> Any:
        ours = Adapter(small.subject(copy.deepcopy(taught), tok, group), "t")
        return ours.loglikelihood(asked), ours.loglikelihood_rolling(texts), ours.generate_until(made)

    board: list[Any] = [None] * size
    results: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)

    def run(rank: int) -> None:
        results[rank] = answers(Threads(rank, size, board, barrier))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = answers(Group())
    for got in results:
        assert got == results[0]
        assert [ll for ll, _ in got[0]] == pytest.approx([ll for ll, _ in want[0]], abs=1e-5)
        assert [greedy for _, greedy in got[0]] == [greedy for _, greedy in want[0]]
        assert got[1] == pytest.approx(want[1], abs=1e-4)
        assert got[2] == want[2]
