"""Label shift, masks and NLL against a float64 loop that shares no code with them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from gru_core import logprobs
from gru_core.batch import IGNORE

B, T, V = 4, 9, 13


@pytest.fixture
def labels() -> torch.Tensor:
    """Ragged answers: whole row, middle, last token only, none at all."""
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    labels[1, :3] = IGNORE
    labels[1, 7:] = IGNORE
    labels[2, :-1] = IGNORE
    labels[3] = IGNORE
    return labels


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(2))


def naive(logits: torch.Tensor, labels: torch.Tensor) -> tuple[list[list[float]], list[list[bool]]]:
    """NLL and arg-max hits, one token at a time in Python floats."""
    nll = [[0.0] * (T - 1) for _ in range(B)]
    hit = [[False] * (T - 1) for _ in range(B)]
    for b in range(B):
        for t in range(1, T):  # the token at t is predicted by the logits at t - 1
            if (token := int(labels[b, t])) == IGNORE:
                continue
            row = logits[b, t - 1].double().tolist()
            top = max(row)
            nll[b][t - 1] = top + math.log(sum(math.exp(x - top) for x in row)) - row[token]
            hit[b][t - 1] = row.index(top) == token
    return nll, hit


def test_nll_counts_hits_equal_a_python_loop(logits, labels):
    logits[0, 3, labels[0, 4]] = 50.0  # at least one hit
    nll, hit = naive(logits, labels)
    assert logprobs.answer_nll(logits, labels).tolist() == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in nll]
    assert logprobs.answer_hits(logits, labels).tolist() == hit
    assert any(map(any, hit))
    # row 0 is all answer, but its first token has no predictor
    assert logprobs.answer_counts(labels).tolist() == [T - 1, 4, 1, 0]
    assert logprobs.answer_mask(labels).sum(1).tolist() == [T - 1, 4, 1, 0]
    sums = logprobs.sequence_nll(logprobs.answer_nll(logits, labels))
    assert sums.tolist() == pytest.approx([sum(row) for row in nll], rel=1e-5)


def test_one_gather_gives_the_same_as_two(logits, labels):
    spent = logits[:, :-1].flatten(0, 1)[logprobs.answer_places(labels)]
    nll, hits, top, _ = logprobs.answer_tokens(spent, labels)
    torch.testing.assert_close(nll, logprobs.answer_nll(logits, labels), rtol=1e-6, atol=1e-6)
    assert torch.equal(hits, logprobs.answer_hits(logits, labels))
    answers = logprobs.answer_mask(labels)
    assert torch.equal(top[answers], logits[:, :-1][answers].argmax(-1))


def test_gradient_equals_the_hugging_face_style_loss(logits, labels):
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    logprobs.answer_nll(ours, labels).sum().backward()
    flat = theirs[:, :-1].reshape(-1, V)
    F.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=IGNORE, reduction="sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad[3].abs().sum() == 0  # no answer token, no gradient


def test_weights_on_tokens_pass_through(logits, labels):
    """Objectives weigh tokens (wga) and rows (npo): the graph must hold for any function of the NLL."""
    ours = logits.clone().double().requires_grad_()

    def weighted(x: torch.Tensor) -> torch.Tensor:
        nll = logprobs.answer_nll(x, labels)
        return (torch.exp(-nll) * nll * logprobs.answer_mask(labels)).sum()

    weighted(ours).backward()
    b, t, v, step = 1, 4, 5, 1e-2
    up, down = ours.detach().clone(), ours.detach().clone()
    up[b, t, v] += step
    down[b, t, v] -= step
    slope = (weighted(up) - weighted(down)) / (2 * step)
    assert float(ours.grad[b, t, v]) == pytest.approx(float(slope), rel=1e-2, abs=1e-4)


def test_bf16_logits_give_float32_nll_over_answer_tokens_only(logits, labels, monkeypatch):
    half = logits.bfloat16().requires_grad_()
    shapes = []
    real = F.cross_entropy

    def watch(x: torch.Tensor, *args, **kwargs):
        shapes.append((x.dtype, tuple(x.shape)))
        return real(x, *args, **kwargs)

    monkeypatch.setattr(logprobs.F, "cross_entropy", watch)
    nll = logprobs.answer_nll(half, labels)
    assert nll.dtype == torch.float32
    assert shapes == [(torch.float32, (T - 1 + 4 + 1, V))]  # never B x T x V
    expected, _ = naive(half.detach(), labels)
    assert nll.tolist() == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in expected]
    nll.sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_a_batch_without_answer_tokens_is_zero_with_a_graph(logits):
    inputs = logits.requires_grad_()
    labels = torch.full((B, T), IGNORE)
    nll = logprobs.answer_nll(inputs, labels)
    nll.sum().backward()
    assert nll.abs().sum() == 0
    assert inputs.grad.abs().sum() == 0
    assert not logprobs.answer_hits(inputs, labels).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_hits(value):
    logits = torch.full((1, 3, V), value)
    labels = torch.tensor([[IGNORE, 0, 0]])
    assert not logprobs.answer_hits(logits, labels).any()


@pytest.mark.parametrize("size", [24, 7, 97, 2 * 131, 1000, 4096])
def test_the_arg_max_is_the_first_of_equals_whatever_the_size_of_the_vocabulary(size: int) -> None:
    """Also of rows with a value that is not finite, which have none."""
    made = torch.Generator().manual_seed(size)
    logits = torch.randint(0, 6, (40, size), generator=made).float()  # many equals
    logits[0] = 1.0
    for row, value in enumerate((torch.inf, torch.nan), start=1):
        logits[row, size // 2] = value
    logits[3] = -torch.inf
    logits[4, : size // 2] = -torch.inf
    rows = logits.tolist()
    expected = [-1 if n in (1, 2, 3) else row.index(max(row)) for n, row in enumerate(rows)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert logprobs._top(logits.to(dtype)).tolist() == expected


def test_tokens_in_any_order_as_in_a_loop(logits, labels, monkeypatch):
    """More than once, too, in slices of two, and none at all."""
    nll, hit = naive(logits, labels)
    places = [(1, 4), (0, 0), (2, T - 2), (1, 4), (0, 3)]
    logits_NV = torch.stack([logits[b, t] for b, t in places])
    targets_N = torch.stack([labels[b, t + 1] for b, t in places])
    looked_N = torch.tensor([True, True, False, True, True])
    monkeypatch.setattr(logprobs, "CACHED", 2 * V)
    found = logprobs.token_numbers(logits_NV.clone(), targets_N, looked_N=looked_N)
    assert found.nll.tolist() == pytest.approx([nll[b][t] for b, t in places], rel=1e-5)
    assert found.hits.tolist() == [hit[b][t] and look for (b, t), look in zip(places, looked_N.tolist(), strict=True)]
    assert found.top.tolist()[2] == -1
    assert found.standard is None
    none = logprobs.token_numbers(logits_NV[:0], targets_N[:0], standard=True)
    assert none.nll.shape == none.hits.shape == none.standard.shape == (0,)


def test_kl_by_hand_and_masked_to_the_answer() -> None:
    """Two tokens, one of them answer: p = (3/4, 1/4) frozen, q = (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2."""
    p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    other = torch.tensor([5.0, -3.0])
    frozen_BTV = torch.stack([other, p, other])[None]
    logits_BTV = torch.stack([-other, q, -other])[None].requires_grad_()
    labels_BT = torch.tensor([[-100, -100, 1]])
    kl_BT1 = logprobs.answer_kl(frozen_BTV, logits_BTV, labels_BT)
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_BT1[0].tolist() == pytest.approx([0.0, want])
    kl_BT1.sum().backward()
    # d KL / d logit = q - p at the answer, nothing elsewhere
    assert logits_BTV.grad is not None
    assert torch.allclose(logits_BTV.grad[0, 1], torch.tensor([-0.25, 0.25]))
    assert not logits_BTV.grad[0, [0, 2]].any()
    reference = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=frozen_BTV[:, 1].double()),
        torch.distributions.Categorical(logits=logits_BTV[:, 1].detach().double()),
    )
    assert float(reference) == pytest.approx(want)
