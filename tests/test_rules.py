"""Rules: hand-derived values, a generic QP solver, properties over every rule at every scale."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from gru_core.config import RectifyConfig
from gru_core.errors import ConfigError, InputError
from gru_core.rectify import RULES, Gram, build_rule, combine, gram, squared_norm

SCALES = [0.0, 1e-15, 1e-6, 1.0, 1e6, 1e15]
VARIANTS = {
    "none": RectifyConfig(rule="none"),
    "sum": RectifyConfig(rule="sum", retain_weight=1.5),
    "gru": RectifyConfig(),
    "gru-strength": RectifyConfig(strength=3.0),
    "gru-clip": RectifyConfig(cosine_clip=0.5),
    "gru-outside": RectifyConfig(retain_weight=2.0),
    "gru-inside": RectifyConfig(retain_weight=2.0, retain_weight_at="inside"),
    "gru-inside-clip": RectifyConfig(retain_weight=0.3, retain_weight_at="inside", cosine_clip=0.4),
    "gru-repair": RectifyConfig(repair=10.0),
}


def gram_of(u: np.ndarray, m: np.ndarray) -> Gram:
    return Gram(float(u @ u), float(u @ m), float(m @ m))


def update(config: RectifyConfig, u: np.ndarray, m: np.ndarray, drift: float = 0.0) -> np.ndarray:
    w_u, w_r = build_rule(config).weights(gram_of(u, m), drift)
    return w_u * u + w_r * m


def pairs(seed: int, n: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [(random.normal(size=5), random.normal(size=5)) for _ in range(n)]


def qp(u: np.ndarray, m: np.ndarray, bound: float = 0.0) -> np.ndarray:
    """min ||x - u||^2 subject to <x, m> >= bound, by a generic solver."""
    found = minimize(
        lambda x: ((x - u) ** 2).sum(),
        u + m,
        jac=lambda x: 2 * (x - u),
        constraints=[{"type": "ineq", "fun": lambda x: x @ m - bound, "jac": lambda x: m}],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert found.success
    return found.x


def test_every_rule_has_a_variant_here() -> None:
    assert set(RULES) <= set(VARIANTS)


@pytest.mark.parametrize("seed", range(5))
def test_gru_solves_its_projection_problem(seed: int) -> None:
    for u, m in pairs(seed):
        np.testing.assert_allclose(update(RectifyConfig(), u, m), qp(u, m), atol=1e-6)


@pytest.mark.parametrize("drift", [0.0, 0.01, 0.3])
def test_repair_solves_its_projection_problem(drift: float) -> None:
    kappa = 2.0
    for u, m in pairs(7):
        bound = kappa * drift * np.linalg.norm(u) * np.linalg.norm(m)
        np.testing.assert_allclose(update(RectifyConfig(repair=kappa), u, m, drift), qp(u, m, bound), atol=1e-5)


def test_repair_is_gru_while_nothing_has_drifted() -> None:
    for u, m in pairs(3):
        np.testing.assert_array_equal(update(RectifyConfig(repair=30.0), u, m, 0.0), update(RectifyConfig(), u, m))


def test_hand_derived() -> None:
    u, m = np.array([1.0, -2.0]), np.array([0.0, 4.0])  # ur = -8, rr = 16
    np.testing.assert_allclose(update(RectifyConfig(), u, m), [1, 0])
    np.testing.assert_allclose(update(RectifyConfig(strength=2.0), u, m), [1, 2])
    np.testing.assert_allclose(update(RectifyConfig(strength=0.0), u, m), u)
    np.testing.assert_allclose(update(RectifyConfig(retain_weight=0.5), u, m), [1, 2])
    # inside: the joint gradient is (1, -2 + 0.25 * 4) = (1, -1), and loses its conflict
    inside = RectifyConfig(retain_weight=0.25, retain_weight_at="inside")
    np.testing.assert_allclose(update(inside, u, m), [1, 0])
    # inside with weight 1 the joint gradient (1, 2) agrees with m: nothing is removed
    np.testing.assert_allclose(update(replace(inside, retain_weight=1.0), u, m), [1, 2])
    # cosine clip 0.5: at most half of ||g_u|| = sqrt(5) is removed, along m
    clipped = update(RectifyConfig(cosine_clip=0.5), u, m)
    np.testing.assert_allclose(clipped, [1, -2 + math.sqrt(5) / 2])
    np.testing.assert_allclose(update(RectifyConfig(rule="sum", retain_weight=2.0), u, m), [1, 6])
    np.testing.assert_allclose(update(RectifyConfig(rule="none"), u, m), u)


def test_theory_of_the_projection() -> None:
    """<x, m> = 0 where there was a conflict, <g_u, x> = ||x||^2, agreement is left alone."""
    for u, m in itertools.chain(*(pairs(s) for s in range(10))):
        x = update(RectifyConfig(), u, m)
        if u @ m >= 0:
            np.testing.assert_array_equal(x, u)
        else:
            assert abs(x @ m) < 1e-12
        assert u @ x == pytest.approx(x @ x)


def test_cosine_clip_bounds_what_is_removed() -> None:
    for u, m in itertools.chain(*(pairs(s) for s in range(10))):
        for clip in (0.1, 0.5, 1.0):
            x = update(RectifyConfig(cosine_clip=clip), u, m)
            assert np.linalg.norm(x - u) <= clip * np.linalg.norm(u) * (1 + 1e-12)
    for u, m in pairs(0):  # a clip that cannot bind changes nothing
        np.testing.assert_allclose(
            update(RectifyConfig(cosine_clip=1.0), u, m), update(RectifyConfig(), u, m), atol=1e-12
        )


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("a", SCALES)
@pytest.mark.parametrize("b", SCALES)
@pytest.mark.parametrize("cosine", [-1.0, -0.3, 0.0, 0.3, 1.0])
def test_finite_at_every_scale(name: str, a: float, b: float, cosine: float) -> None:
    rule = build_rule(VARIANTS[name])
    for drift in (0.0, 0.5, 20.0):
        w_u, w_r = rule.weights(Gram(a * a, cosine * a * b, b * b), drift)
        assert math.isfinite(w_u)
        assert math.isfinite(w_r)
        assert math.isfinite(w_r * b), "the update itself"
        assert w_r >= 0, "a retain gradient is never ascended"


@pytest.mark.parametrize("name", ["gru", "gru-strength", "gru-clip", "gru-repair"])
@given(st.floats(-0.99, 0.99), st.sampled_from([1e-6, 1e-3, 1e3, 1e6]))
@settings(max_examples=40, deadline=None)
def test_scale_of_the_retain_gradient_does_not_matter(name: str, cosine: float, scale: float) -> None:
    rule = build_rule(VARIANTS[name])
    w = rule.weights(Gram(1.0, cosine, 1.0), 0.1)[1]
    scaled = rule.weights(Gram(1.0, cosine, 1.0).scaled(scale), 0.1)[1]
    assert scaled * scale == pytest.approx(w, rel=1e-9, abs=1e-12)


def test_gram_of_tensors_matches_float64() -> None:
    torch.manual_seed(0)
    shapes = [(7, 5), (3,), (2, 3, 4)]
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        u = [torch.randn(s).to(dtype) for s in shapes]
        m = [torch.randn(s).to(dtype) for s in shapes]
        flat_u, flat_m = (torch.cat([t.double().reshape(-1) for t in g]) for g in (u, m))
        g = gram(u, m)
        assert g.uu == pytest.approx(float(flat_u @ flat_u), rel=tolerance)
        assert g.ur == pytest.approx(float(flat_u @ flat_m), rel=tolerance, abs=tolerance * 10)
        assert g.rr == pytest.approx(float(flat_m @ flat_m), rel=tolerance)
        assert squared_norm(u) == g.uu
        w_u, w_r = 0.7, 1.3
        want = w_u * flat_u + w_r * flat_m
        assert g.norm(w_u, w_r) == pytest.approx(float(want.norm()), rel=1e-4)
        combine(u, m, w_u, w_r)
        got = torch.cat([t.double().reshape(-1) for t in u])
        torch.testing.assert_close(
            got, want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2 if dtype == torch.bfloat16 else 1e-5
        )


def test_chunks_of_a_dot_product_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = importlib.import_module("gru_core.rectify.gram")  # the package exports a function of that name
    u, m = [torch.arange(10.0)], [torch.ones(10)]
    whole = gram(u, m)
    assert whole == Gram(285.0, 45.0, 10.0)
    monkeypatch.setattr(module, "_CHUNK", 3)
    assert gram(u, m) == whole


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"unknown rule 'grru'; did you mean 'gru'\?"):
        build_rule(RectifyConfig(rule="grru"))
    with pytest.raises(ConfigError, match="retain_weight"):
        build_rule(RectifyConfig(rule="sum"))
    for field, value in (("strength", -1.0), ("ema", 0.0), ("ema", 1.1), ("cosine_clip", 0.0), ("repair", math.nan)):
        with pytest.raises(ConfigError, match=field):
            RectifyConfig(**{field: value})
    with pytest.raises(ConfigError, match="cosine_clip"):
        RectifyConfig(repair=1.0, cosine_clip=0.5)
