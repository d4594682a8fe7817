"""The step: against an independent implementation, and as whole trajectories."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gru_core.batch import collate
from gru_core.config import UnlearnConfig
from gru_core.errors import NonFiniteError
from gru_core.loop import Hooks
from gru_core.objectives import OBJECTIVES
from gru_core.rectify import RULES
from gru_core.step import Stream, learning_rate
from tests import small


def naive_gru(cfg: Any, net: torch.nn.Module, steps: int) -> list[dict[str, float]]:
    """GRU on flattened float64 vectors with ``torch.autograd.grad`` and an explicit EMA: another way entirely."""
    rows = small.token_rows()
    forget, retain = rows[:12], rows[12:]
    parameters = [p for p in net.parameters() if p.requires_grad]
    decay = cfg.unlearn.weight_decay
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=cfg.unlearn.lr,
    )

    def nll_sums(batch_rows: list[Any]) -> tuple[torch.Tensor, int]:
        batch = collate(batch_rows, range(len(batch_rows)), 0)
        logits = net(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits.double()
        logp = torch.log_softmax(logits[:, :-1], -1)
        sums = []
        for b, row in enumerate(batch_rows):
            places = range(row.prompt_length, len(row.ids))
            sums.append(-sum(logp[b, t - 1, row.ids[t]] for t in places))
        return torch.stack(sums), sum(r.answer_length for r in batch_rows)

    def flat(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.reshape(-1).double() for g in torch.autograd.grad(loss, parameters)])

    with torch.no_grad():
        reference = nll_sums(forget)[0]
    streams = [Stream(len(d), cfg.unlearn.batch_size, 0, n) for d, n in ((forget, "forget"), (retain, "retain"))]
    gamma, m, history = cfg.rectify.ema, None, []
    for step in range(steps):
        places_f, places_r = streams[0].rows(step), streams[1].rows(step)
        sums, count = nll_sums([retain[i] for i in places_r])
        g_r = flat(sums.sum() / count)
        m = gamma * g_r + (1 - gamma) * (m if m is not None else torch.zeros_like(g_r))
        sums, count = nll_sums([forget[i] for i in places_f])
        margin = 0.1 * (sums - reference[places_f])
        g_u = flat(-20 * torch.nn.functional.logsigmoid(margin).mean())
        x = g_u + cfg.rectify.strength * torch.clamp(-(g_u @ m), min=0) / (m @ m) * m
        x = x * min(1.0, cfg.unlearn.clip / (float(x.norm()) + 1e-6))
        place = 0
        for p in parameters:
            p.grad = x[place : place + p.numel()].view_as(p).to(p.dtype)
            place += p.numel()
        optimizer.step()
        history.append({"cosine": float(g_u @ m / (g_u.norm() * m.norm())), "update_norm": float(x.norm())})
    return history


@pytest.mark.parametrize("rectify", [{}, {"strength": 3.0, "ema": 1.0}, {"ema": 0.3}])
def test_equals_an_independent_implementation(rectify: dict[str, float]) -> None:
    cfg = small.config(8, rectify=rectify)
    ours, theirs = small.model(torch.float64), small.model(torch.float64)
    seen: list[dict[str, float]] = []
    small.build(cfg, ours, hooks=Hooks(log=lambda step, metrics: seen.append(metrics)))()
    history = naive_gru(cfg, theirs, 8)
    for mine, want in zip(seen, history, strict=True):
        assert mine["cosine"] == pytest.approx(want["cosine"], rel=1e-8)
        assert mine["update_norm"] == pytest.approx(want["update_norm"], rel=1e-8)
    # Llama's norms compute in float32 whatever the weights are, and scaling a loss moves their rounding.
    difference = (small.weights(ours) - small.weights(theirs)).norm()
    assert difference < 1e-4 * (small.weights(theirs) - small.weights(small.model(torch.float64))).norm()


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_strength_0_is_plain_unlearning_bit_for_bit(objective: str) -> None:
    plain, zero = small.model(), small.model()
    small.build(small.config(20, objective=objective, rectify={"rule": "none"}), plain)()
    small.build(small.config(20, objective=objective, rectify={"strength": 0.0}), zero)()
    assert torch.equal(small.weights(plain), small.weights(zero))
    assert not torch.equal(small.weights(plain), small.weights(small.model())), "the run changed nothing"


@pytest.mark.parametrize("rule", ["gru", "sum", "none"])
def test_accumulation_8x1_is_1x8(rule: str) -> None:
    rectify = {"rule": rule, "retain_weight": 1.0 if rule == "sum" else 0.0}
    whole, split, uneven = (small.model(torch.float64) for _ in range(3))
    for net, micro in ((whole, None), (split, 1), (uneven, 3)):
        small.build(small.config(20, rectify=rectify, train={"micro_batch": micro}), net)()
    for net in (split, uneven):
        torch.testing.assert_close(small.weights(whole), small.weights(net), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_all_combinations_run(rule: str, objective: str) -> None:
    net = small.model()
    before = small.weights(net).clone()
    rectify = {"rule": rule, "retain_weight": 1.0 if rule == "sum" else 0.0}
    outcome = small.build(small.config(3, objective=objective, rectify=rectify), net)()
    assert outcome.steps == 3
    after = small.weights(net)
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "rectify",
    [
        {"cosine_clip": 0.5},
        {"retain_weight": 1.0},
        {"retain_weight": 1.0, "retain_weight_at": "inside"},
        {"repair": 30.0},
        {"strength": 5.0, "cosine_clip": 0.5, "retain_weight": 0.5},
    ],
)
def test_options_of_gru_change_the_run(rectify: dict[str, Any]) -> None:
    base, other = small.model(), small.model()
    small.build(small.config(10, objective="ga"), base)()
    small.build(small.config(10, objective="ga", rectify=rectify), other)()
    assert not torch.equal(small.weights(base), small.weights(other))


def test_debiased_average_makes_the_first_sum_step_exact() -> None:
    """m_1 = gamma g_r, so without debiasing a retain weight would start at gamma times its value."""
    weights = []
    for ema in (1.0, 0.2):
        net = small.model(torch.float64)
        small.build(small.config(1, rectify={"rule": "sum", "retain_weight": 2.0, "ema": ema}), net)()
        weights.append(small.weights(net))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-7)  # AdamW amplifies rounding


def test_clipping_comes_after_rectification() -> None:
    seen: list[dict[str, float]] = []
    cfg = small.config(5, objective="ga", clip=0.01)
    small.build(cfg, small.model(), hooks=Hooks(log=lambda s, m: seen.append(m)))()
    assert all(m["update_norm"] == pytest.approx(0.01, rel=1e-3) for m in seen)
    assert any(m["weight_retain"] > 0 for m in seen), "nothing was rectified"


def test_norm_where_nearly_everything_cancels() -> None:
    """Forget rows and retain rows the same: g_u = -g_r for ga, and GRU leaves (almost) nothing."""
    from gru_core.loop import Run
    from gru_core.losses import Rows
    from gru_core.objectives import build_objective
    from gru_core.parallel import Group

    rows, cfg = small.token_rows()[:8], small.config(3, objective="ga", rectify={"ema": 1.0}, weight_decay=0.0)
    seen: list[dict[str, float]] = []
    net = small.model(torch.float64)
    Run(
        net, cfg, build_objective(cfg.unlearn), Rows(rows), Rows(rows), Group(), Hooks(log=lambda s, m: seen.append(m))
    )()
    assert all(m["cosine"] == pytest.approx(-1, abs=1e-9) for m in seen)
    assert all(m["update_norm"] < 1e-10 for m in seen)


def test_retain_loss_rises_less_than_under_plain_unlearning() -> None:
    """2503.09117, theorem: with gamma 1 and a small step the rectified update hurts retention less."""
    from gru_core.losses import Losses, Rows
    from gru_core.models import set_dropout
    from gru_core.parallel import Group
    from gru_core.rectify import gram
    from gru_core.retain import build_retain_loss

    rows, cfg = small.token_rows(), small.config(1)
    places_f, places_r = range(12), range(28)
    loss = build_retain_loss("nll")

    def retain_after(strength: float) -> float:
        net = small.model(torch.float64)
        set_dropout(net, False)
        losses = Losses(net, cfg.model, Group(), None)
        parameters = list(net.parameters())

        def gradient(data: list[Any], places: range, sign: float) -> list[torch.Tensor]:
            net.zero_grad()
            losses.accumulate(Rows(data), places, loss.loss_sum, "token", sign)
            return [p.grad.clone() for p in parameters]  # type: ignore[union-attr]

        u, m = gradient(rows[:12], places_f, -1.0), gradient(rows[12:], places_r, 1.0)
        g = gram(u, m)
        assert g.ur < 0
        w = strength * -g.ur / g.rr
        with torch.no_grad():
            for p, a, b in zip(parameters, u, m, strict=True):
                p -= 1e-3 * (a + w * b)
        return losses.mean(Rows(rows[12:]), places_r, loss)

    plain, rectified, repaired = retain_after(0.0), retain_after(1.0), retain_after(2.0)
    assert rectified < plain
    assert repaired < rectified


def test_non_finite_stops_before_a_weight_changes() -> None:
    net = small.model()
    run = small.build(small.config(5, rectify={"rule": "gru"}), net)
    with torch.no_grad():
        next(iter(net.parameters()))[5] = math.nan
    before = small.weights(net).clone()
    with pytest.raises(NonFiniteError, match=r"step 1: the retain loss is nan; no weight was changed"):
        run()
    assert torch.equal(before.nan_to_num(), small.weights(net).nan_to_num())
    assert not run.step.optimizer.state


@pytest.mark.parametrize("rule", ["none", "gru"])
def test_collapse_is_a_result(rule: str) -> None:
    rectify = {"rule": rule, "strength": 0.0} if rule == "gru" else {"rule": "none"}
    evaluated: list[int] = []
    cfg = small.config(200, objective="ga", lr=0.3, collapse=1.5, clip=None, rectify=rectify)
    outcome = small.build(cfg, small.model(), hooks=Hooks(evaluate=lambda step, last: evaluated.append(step)))()
    assert outcome.status == "collapsed"
    assert outcome.steps < 200
    assert evaluated[-1] == outcome.steps, "a collapsed run is evaluated where it ends"


def test_learning_rate_schedules() -> None:
    def at(step: int, **kw: Any) -> float:
        return learning_rate(UnlearnConfig(lr=1.0, steps=10, **kw), step)

    assert [at(s, warmup=4) for s in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert [at(s, schedule="linear") for s in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])
    assert [at(s, schedule="cosine") for s in (0, 5)] == pytest.approx([1.0, 0.5])
    from transformers import get_scheduler

    for name in ("linear", "cosine", "constant_with_warmup"):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=10)
        for step in range(10):
            ours = at(step, schedule={"constant_with_warmup": "constant"}.get(name, name))
            assert ours == pytest.approx(theirs.get_last_lr()[0])
            optimizer.step()
            theirs.step()


def test_stream_order() -> None:
    stream = Stream(10, 4, 0, "forget")
    first = [i for step in range(5) for i in stream.rows(step)]
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10)), "two whole epochs, no row dropped"
    assert first[:10] != first[10:]
    assert Stream(10, 4, 0, "forget").rows(3) == first[12:16], "any step, without the steps before"
    assert Stream(10, 4, 0, "retain").rows(0) != stream.rows(0)
    assert Stream(10, 4, 1, "forget").rows(0) != stream.rows(0)
    assert len(Stream(2, 5, 0, "forget").rows(0)) == 5


def test_bf16_compute_keeps_float32_state() -> None:
    from dataclasses import replace

    from gru_core.config import ModelConfig

    cfg = replace(small.config(3), model=ModelConfig(dtype="bfloat16"))
    net, exact = small.model(), small.model()
    run = small.build(cfg, net)
    run()
    small.build(small.config(3), exact)()
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert run.step.momentum is not None
    assert all(m.dtype == torch.float32 for m in run.step.momentum)
    assert all(s["exp_avg"].dtype == torch.float32 for s in run.step.optimizer.state.values())
    difference = (small.weights(net) - small.weights(exact)).abs().max()
    assert 0 < difference < 0.01, "bf16 was not used, or changed the run beyond rounding"
