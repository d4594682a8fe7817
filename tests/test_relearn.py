"""Relearning against a plain loop; what it leaves behind: nothing; whom it tells apart."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from gru_core import adapters
from gru_core.batch import Stream
from gru_core.benchmarks.base import Benchmark
from gru_core.config import LoraConfig, ModelConfig, RelearnConfig
from gru_core.errors import ConfigError, InputError
from gru_core.metrics import MODEL_METRICS, check_metrics, evaluate
from gru_core.metrics.base import LOST_NLL
from gru_core.metrics.relearn import curves, forget_rows, retain_rows
from tests import robust
from tests.robust import QUICK, measured

RELEARN = robust.config("relearn", "relearn_retain", relearn=QUICK)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return robust.model()


def naive(net: nn.Module, rows: list[Any], config: RelearnConfig) -> tuple[dict[int, float], list[float]]:
    """Mean answer probability over all forget rows by step, and each step's loss: one row at a time."""
    forget = robust.tokens(robust.rows()[: robust.FORGET])
    data = robust.tokens(rows)
    stream = Stream(len(data), config.batch_size, config.seed, "relearn")
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=0.0)

    def probability() -> float:
        with torch.no_grad():
            return sum(float((-robust.row_nll(net, r) / r.answer_length).exp()) for r in forget) / len(forget)

    curve, losses = {0: probability()}, []
    for step in range(config.steps):
        batch = [data[i] for i in stream.rows(step)]
        loss = sum(robust.row_nll(net, r) for r in batch) / sum(r.answer_length for r in batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve[step + 1] = probability()
    return curve, losses


@pytest.mark.parametrize("name", ["relearn", "relearn_retain"])
@pytest.mark.parametrize("micro", [None, 3])
def test_the_curve_is_that_of_a_plain_loop(name: str, micro: int | None) -> None:
    """float64, another model, optimizer and loss code; whole batches and micro-batches."""
    net = robust.model(torch.float64)
    settings = robust.config(name, relearn=replace(QUICK, micro_batch=micro))
    chosen = {"relearn": forget_rows, "relearn_retain": retain_rows}[name](robust.benchmark(), QUICK)
    curve, losses = naive(copy.deepcopy(net), chosen, QUICK)
    scores = measured(net, settings).scores
    for step in (0, 2, 4, 5):
        assert scores[f"{name}/step_{step}"] == pytest.approx(curve[step], abs=1e-8)
    assert scores[name] == scores[f"{name}/step_5"] > 1.02 * scores[f"{name}/step_0"]
    assert scores[f"{name}/loss"] == pytest.approx(losses[-1], abs=1e-8)
    assert {k for k in scores if "step" in k} == {f"{name}/step_{s}" for s in (0, 2, 4, 5)}


def test_unseen_rows_and_retention_are_of_the_model_after_the_last_step() -> None:
    net = robust.model(torch.float64)
    rows = forget_rows(robust.benchmark(), QUICK)
    scores = measured(net, robust.config("relearn", relearn=QUICK)).scores
    naive(net, rows, QUICK)  # leaves the model as it is after the last step
    left = [r for r in robust.rows()[: robust.FORGET] if r not in rows]
    assert len(left) == 6
    with torch.no_grad():
        for name, chosen in (("unseen", left), ("retention", robust.rows()[-8:])):
            wanted = [float((-robust.row_nll(net, r) / r.answer_length).exp()) for r in robust.tokens(chosen)]
            assert scores[f"relearn/{name}"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-8)
    every = measured(net, robust.config("relearn", relearn=replace(QUICK, share=1.0))).scores
    assert "relearn/unseen" not in every


def test_of_rows_of_another_form_nobody_says_that_they_were_not_learned() -> None:
    bench = robust.benchmark()
    bench = replace(bench, scored={**bench.scored, "forget_knowmem": bench.scored["forget"]})
    settings = replace(robust.config("relearn", relearn=QUICK), unlearning="forget_knowmem")
    scores = evaluate(robust.model(), robust.tokenizer(), bench, settings, ModelConfig()).scores
    assert "relearn/step_5" in scores
    assert "relearn/unseen" not in scores


def test_subsets_are_nested_and_of_the_right_rows() -> None:
    bench = robust.benchmark()
    small_share, large = (forget_rows(bench, replace(QUICK, share=s)) for s in (0.25, 0.75))
    assert len(small_share) == 3
    assert small_share == large[:3]
    assert large != list(bench.forget[:9]), "drawn, not the first ones"
    assert set(large) <= set(bench.forget)
    assert forget_rows(bench, replace(QUICK, seed=1)) != forget_rows(bench, QUICK)
    kept = retain_rows(bench, QUICK)
    assert len(kept) == 20, "as many as there are, none that scores retention"
    assert not {bench.retain.index(r) for r in kept} & bench.retain_scored
    assert retain_rows(bench, replace(QUICK, steps=1)) == kept[:4]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_the_model_is_as_before(frozen: bool, lora: LoraConfig | None, net: nn.Module) -> None:
    """Weights and gradients bit for bit, flags, modes, module objects, attributes, random state."""
    net = copy.deepcopy(net)
    if lora and not frozen:
        adapters.add(net, lora)
        adapters.initialise(net, 1)
    if frozen:
        net.eval().requires_grad_(False)
    else:
        net.train()
        net.model.layers[0].eval()  # type: ignore[union-attr,index]
        for p in net.parameters():
            p.grad = torch.rand_like(p) if p.requires_grad else None
    before = robust.state(net)
    scores = measured(net, RELEARN, ModelConfig(lora=lora)).scores
    assert robust.same(robust.state(net), before)
    for name in ("relearn", "relearn_retain"):
        assert scores[f"{name}/step_5"] != scores[f"{name}/step_0"], "nothing was learned"
    again = measured(net, RELEARN, ModelConfig(lora=lora)).scores
    assert again == scores


def test_it_is_restored_when_a_measurement_fails(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from gru_core.metrics import relearn

    def fails(self: Any, number: int) -> float:
        for p in self.parameters:
            p.data.zero_()
        raise RuntimeError("no memory")

    monkeypatch.setattr(relearn._Learner, "step", fails)
    for lora in (None, LoraConfig(rank=2)):
        net = copy.deepcopy(net).requires_grad_(False)
        before = robust.state(net)
        with pytest.raises(RuntimeError, match="no memory"):
            measured(net, RELEARN, ModelConfig(lora=lora))
        assert robust.same(robust.state(net), before)


def test_adapters_learn_where_the_run_trains_adapters(net: nn.Module) -> None:
    """A frozen model with ``model.lora`` learns through new adapters: the curve of a model that carries them."""
    lora = LoraConfig(rank=2)
    settings = robust.config("relearn", relearn=QUICK)
    carries = copy.deepcopy(net)
    adapters.add(carries, lora)
    adapters.initialise(carries, QUICK.seed)
    wanted = measured(carries, settings, ModelConfig(lora=lora)).scores
    found = measured(copy.deepcopy(net).requires_grad_(False), settings, ModelConfig(lora=lora)).scores
    assert found == wanted
    assert found != measured(copy.deepcopy(net).requires_grad_(False), settings).scores, "all weights learned"


@pytest.mark.slow
def test_who_hides_learns_faster_than_who_forgot() -> None:
    """One took steps of ascent on rows that it knew and looks as ignorant as the other, which never saw them."""
    rows = robust.rows()
    hides = robust.train(robust.model(), rows)
    forgot = robust.train(robust.model(), rows[robust.FORGET :])
    wanted = measured(forgot, robust.config()).scores["forget_probability"]
    optimizer = torch.optim.SGD(hides.parameters(), lr=0.05)
    while measured(hides, robust.config()).scores["forget_probability"] > wanted:
        optimizer.zero_grad()
        (-robust.loss(hides, rows[: robust.FORGET])).backward()
        nn.utils.clip_grad_norm_(hides.parameters(), 1.0)
        optimizer.step()
    settings = robust.config("relearn", relearn=RelearnConfig(share=0.5, steps=6, every=3, lr=3e-3, batch_size=6))
    ours, theirs = (measured(model, settings).scores for model in (hides, forgot))
    assert ours["relearn/step_0"] <= theirs["relearn/step_0"]
    assert ours["relearn"] > 1.5 * theirs["relearn"]
    assert ours["relearn/unseen"] > 5 * theirs["relearn/unseen"], "rows that were not learned come back, too"


def test_diverged_learning_gives_finite_scores_that_say_so(net: nn.Module) -> None:
    net = copy.deepcopy(net)
    before = robust.state(net)
    settings = robust.config("relearn", relearn=replace(QUICK, lr=1e30))
    found = evaluate(net, robust.tokenizer(), robust.benchmark(), settings, ModelConfig())
    assert all(abs(value) < float("inf") for value in found.scores.values())
    assert found.scores["relearn/loss"] == LOST_NLL
    assert robust.same(robust.state(net), before)


def test_curves_are_told_by_step() -> None:
    scores = {"relearn": 3.0, "relearn/step_10": 3.0, "relearn/step_0": 1.0, "relearn_retain/step_0": 1.0}
    scores |= {"relearn/loss": 2.0, "quantise/4_bit": 0.1, "other/step_3": 9.0}
    wanted = {0: {"relearn/forgetting": 1.0, "relearn_retain/forgetting": 1.0}, 10: {"relearn/forgetting": 3.0}}
    assert curves(scores) == wanted
    assert list(curves(scores)) == [0, 10]


def test_what_cannot_be_relearned_is_refused() -> None:
    bench = robust.benchmark()
    few = robust.config("relearn", relearn=replace(QUICK, share=0.01))
    check_metrics(few, True, None)  # how many rows there are is not known yet
    with pytest.raises(ConfigError, match=r"evaluate.relearn.share: got 0.01, allowed: enough for one of 12 forget"):
        check_metrics(few, True, bench)
    scored = Benchmark("all scored", bench.forget, bench.retain, bench.scored, retain_scored=frozenset(range(28)))
    with pytest.raises(InputError, match="relearn_retain cannot be computed on all scored: every retain row"):
        check_metrics(robust.config("relearn_retain"), True, scored)
    for name in MODEL_METRICS:
        with pytest.raises(ConfigError, match=r"evaluate.unlearning: got 'relearn', allowed: exact_memorization, "):
            check_metrics(robust.config(name, unlearning="relearn"), True, None)
    for key, value in {"share": 0.0, "steps": 0, "every": 0, "lr": -1.0, "batch_size": 0, "micro_batch": 0}.items():
        with pytest.raises(ConfigError, match=f"evaluate.relearn.{key}: got {value}"):
            RelearnConfig(**{key: value})  # type: ignore[arg-type]
