"""Objectives against hand-derived values and against each other's limits."""

from __future__ import annotations

import math

import pytest
import torch

from gru_core.config import UnlearnConfig
from gru_core.errors import ConfigError, InputError
from gru_core.objectives import OBJECTIVES, AnswerLosses, build_objective
from gru_core.retain import RETAIN_LOSSES, build_retain_loss

NLL_BT1 = [[0.5, 1.0, 0.0], [0.0, 2.0, 3.0]]
TOKENS_B = [2, 2]
REFERENCE_B = [1.0, 6.0]


def losses(requires_grad: bool = False) -> AnswerLosses:
    nll = torch.tensor(NLL_BT1, dtype=torch.float64, requires_grad=requires_grad)
    return AnswerLosses(nll, torch.tensor(TOKENS_B), torch.tensor(REFERENCE_B, dtype=torch.float64))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


WANT = {
    "ga": -6.5,
    "wga": -sum(math.exp(-n) * n for row in NLL_BT1 for n in row),
    "npo": -20 * (log_sigmoid(0.1 * (1.5 - 1.0)) + log_sigmoid(0.1 * (5.0 - 6.0))),
    "simnpo": -(2 / 4.5) * (log_sigmoid(4.5 * 0.75) + log_sigmoid(4.5 * 2.5)),
}


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_hand_derived(name: str) -> None:
    value = build_objective(UnlearnConfig(objective=name)).loss_sum(losses())
    assert float(value) == pytest.approx(WANT[name], rel=1e-12)


def test_settings_reach_the_loss() -> None:
    sim = build_objective(UnlearnConfig(objective="simnpo", beta=2.5, delta=0.5)).loss_sum(losses())
    want = -(2 / 2.5) * (log_sigmoid(2.5 * 0.25) + log_sigmoid(2.5 * 2.0))
    assert float(sim) == pytest.approx(want)
    wga = build_objective(UnlearnConfig(objective="wga", beta=2.0)).loss_sum(losses())
    assert float(wga) == pytest.approx(-sum(math.exp(-2 * n) * n for row in NLL_BT1 for n in row))


def test_wga_weights_carry_no_gradient() -> None:
    given = losses(requires_grad=True)
    build_objective(UnlearnConfig(objective="wga")).loss_sum(given).backward()
    torch.testing.assert_close(given.nll_BT1.grad, -torch.exp(-given.nll_BT1.detach()))


def test_npo_starts_as_gradient_ascent() -> None:
    """Where model and reference agree, the gradient of npo is that of -NLL (2404.05868, section 3)."""
    given = losses(requires_grad=True)
    same = AnswerLosses(given.nll_BT1, given.tokens_B, given.nll_B.detach())
    build_objective(UnlearnConfig(objective="npo")).loss_sum(same).backward()
    torch.testing.assert_close(given.nll_BT1.grad, -torch.ones_like(given.nll_BT1))


def test_retain_nll_is_the_sum_over_tokens() -> None:
    loss = build_retain_loss("nll")
    assert loss.unit == "token"
    assert float(loss.loss_sum(losses())) == 6.5
    assert sorted(RETAIN_LOSSES) == ["kl", "nll"]


def test_refusals() -> None:
    with pytest.raises(
        InputError, match=r"unknown objective 'npoo'; did you mean 'npo'\? \(valid: ga, npo, simnpo, wga\)"
    ):
        build_objective(UnlearnConfig(objective="npoo"))
    with pytest.raises(ConfigError, match="beta"):
        build_objective(UnlearnConfig(objective="ga", beta=1.0))
    with pytest.raises(ConfigError, match="delta"):
        build_objective(UnlearnConfig(objective="npo", delta=0.1))
    with pytest.raises(InputError, match="unknown retain loss"):
        build_retain_loss("kll")
