"""The only home of label shift, masks and answer NLL.

Shape legend: B rows, T tokens of a row, V vocabulary, N answer tokens of the whole batch.
``BT1`` is (B, T-1): column ``t`` belongs to the token at ``t + 1``, which the logits at ``t`` predict.
``labels_BT`` is *not* shifted and holds :data:`~gru_core.batch.IGNORE` off the answer.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from gru_core.batch import IGNORE


def answer_mask(labels_BT: torch.Tensor) -> torch.Tensor:
    """Bool (B, T-1): True where the next token is an answer token."""
    return labels_BT[:, 1:] != IGNORE


def answer_counts(labels_BT: torch.Tensor) -> torch.Tensor:
    """Answer tokens of each row, int64 (B,): the ``|y|`` of the metrics."""
    return answer_mask(labels_BT).sum(dim=1)


def answer_nll(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every answer token, float32 or better, (B, T-1), zero off the answer; differentiable.

    Only the logits of answer positions are taken and cast, so the float32 copy is (N, V), never (B, T, V).
    A batch or a row without answer tokens gives zeros that still have a gradient (of zero).
    """
    logits_NV, targets_N = _gather(logits_BTV, labels_BT)
    return _scatter(F.cross_entropy(_precise(logits_NV), targets_N, reduction="none"), labels_BT)


def answer_kl(frozen_BTV: torch.Tensor, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """``KL(frozen || model)`` of the next-token distributions at every answer token, in nats, (B, T-1), zero off the
    answer; differentiable in the second argument.

    Padding and prompt carry none: some published code averages over them, too.
    """
    frozen_NV, _ = _gather(frozen_BTV, labels_BT)
    logits_NV, _ = _gather(logits_BTV, labels_BT)
    kl_N = _Divergence.apply(_precise(logits_NV), _precise(frozen_NV))
    return _scatter(kl_N, labels_BT)


class _Divergence(torch.autograd.Function):
    """``KL(frozen || model)`` per position, with ``q - p`` as the gradient of the model's logits.

    That is exactly 0 where the two models agree, as they do at the first step. Autograd's own form leaves rounding
    errors there, and a rule that only asks for the retain gradient's direction would take them for one.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, frozen_NV: torch.Tensor) -> torch.Tensor:
        log_q_NV, log_p_NV = logits_NV.log_softmax(-1), frozen_NV.log_softmax(-1)
        p_NV = log_p_NV.exp()
        ctx.save_for_backward(log_q_NV.exp() - p_NV)
        return (p_NV * (log_p_NV - log_q_NV)).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor, None]:
        (difference_NV,) = ctx.saved_tensors
        return difference_NV * grad_N[:, None], None


def sequence_nll(nll_BT1: torch.Tensor) -> torch.Tensor:
    """Sum of a row's answer NLL, (B,), in the input's dtype."""
    return nll_BT1.sum(dim=1)


def answer_hits(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Bool (B, T-1): answer tokens that are the arg-max of the logits before them; False off the answer.

    A position whose largest logit is not finite is no hit: a diverged model remembers nothing.
    """
    logits_NV, targets_N = _gather(logits_BTV, labels_BT)
    return _scatter(_top(logits_NV) == targets_N, labels_BT)


class AnswerTokens(NamedTuple):
    """What one look at the logits tells of answer tokens, each (B, T-1), zero or False off the answer.

    Attributes:
        nll: negative log-likelihood, nats.
        hits: whether the token is the arg-max; never where the largest logit is not finite, or in a row whose arg-max
            was not asked for.
        top: the token that is the arg-max, int64; -1 where ``hits`` is never True.
        standard: ``(log p_t - mu) / sigma`` where it was asked for: mu and sigma are the mean and the standard
            deviation of log p under the model's own next-token distribution, the variance at least 1e-6 (Min-K%++,
            arXiv 2404.02936, equation 3).
    """

    nll: torch.Tensor
    hits: torch.Tensor
    top: torch.Tensor
    standard: torch.Tensor | None = None


ELEMENTS = 1 << 24
"""Most logits that :func:`token_numbers` looks at at a time."""
CACHED = 1 << 19
"""The same on a CPU, whose cache then holds them from one pass to the next; a GPU wants few calls."""


@torch.no_grad()
def answer_tokens(
    logits_NV: torch.Tensor, labels_BT: torch.Tensor, standard: bool = False, looked_B: torch.Tensor | None = None
) -> AnswerTokens:
    """Everything that is measured on answer tokens, of the logits at :func:`answer_places`, which are overwritten.

    Args:
        standard: ask for :attr:`AnswerTokens.standard`.
        looked_B: whether a row's arg-max is asked for; of all rows unless given.
    """
    place_N, targets_N = _places(labels_BT)
    looked_N = None if looked_B is None else looked_B[place_N // labels_BT.shape[1]]
    found = token_numbers(logits_NV, targets_N, standard, looked_N)
    nll_BT1, hits_BT1, top_BT1 = (_scatter(each, labels_BT) for each in (found.nll, found.hits, found.top))
    scattered = None if found.standard is None else _scatter(found.standard, labels_BT)
    return AnswerTokens(nll_BT1, hits_BT1, top_BT1, scattered)


def answer_places(labels_BT: torch.Tensor) -> torch.Tensor:
    """Flat positions in (B, T-1) whose logits predict answer tokens, (N,), row by row."""
    place_N, _ = _places(labels_BT)
    return place_N - place_N // labels_BT.shape[1]


@torch.no_grad()
def token_numbers(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, standard: bool = False, looked_N: torch.Tensor | None = None
) -> AnswerTokens:
    """The same of any tokens ``targets_N``, each with the logits that predict it; fields (N,). A slice of tokens at a
    time, no float32 copy of all logits; ``logits_NV`` is overwritten."""
    room = CACHED if logits_NV.device.type == "cpu" else ELEMENTS
    size = max(1, room // logits_NV.shape[1])
    tops, nlls, standards = [], [], []
    for start in range(0, max(1, len(targets_N)), size):  # none is a slice, too
        n = slice(start, start + size)
        some_NV = logits_NV[n]
        tops.append(_top(some_NV) if looked_N is None else _top_of_some(some_NV, looked_N[n]))
        if standard:
            nll_N, standard_N = _standard(_precise(some_NV), targets_N[n])
            standards.append(standard_N)
        else:
            nll_N = _nll(_precise(some_NV), targets_N[n])
        nlls.append(nll_N)
    top_N = torch.cat(tops)
    return AnswerTokens(torch.cat(nlls), top_N == targets_N, top_N, torch.cat(standards) if standard else None)


def _nll(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """NLL (N,), in place: ``logits_NV`` is overwritten."""
    most_N1, target_N1 = logits_NV.amax(-1, keepdim=True), logits_NV.gather(1, targets_N[:, None])
    nll_N1 = logits_NV.sub_(most_N1).exp_().sum(-1, keepdim=True).log_() + (most_N1 - target_N1)
    return nll_N1.squeeze(1)


def _standard(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL and :attr:`AnswerTokens.standard`, each (N,)."""
    logp_NV = logits_NV.log_softmax(-1)
    target_N, p_NV = logp_NV.gather(1, targets_N[:, None]).squeeze(1), logp_NV.exp()
    mu_N = (p_NV * logp_NV).nan_to_num(nan=0.0).sum(-1)  # 0 * -inf: a token that cannot come adds nothing
    # not the mean square less the squared mean: in float32 their difference has no digits where the model is sure
    variance_N = (p_NV * (logp_NV - mu_N[:, None]).square()).nan_to_num(nan=0.0).sum(-1)
    return -target_N, (target_N - mu_N) / variance_N.clamp(min=1e-6).sqrt()


def _top_of_some(logits_NV: torch.Tensor, looked_N: torch.Tensor) -> torch.Tensor:
    """:func:`_top` where ``looked_N``, -1 elsewhere."""
    place_N = looked_N.nonzero().squeeze(1)
    top_N = torch.full_like(looked_N, -1, dtype=torch.int64)
    return top_N.index_copy(0, place_N, _top(logits_NV.index_select(0, place_N))) if len(place_N) else top_N


def _top(logits_NV: torch.Tensor) -> torch.Tensor:
    """The arg-max, (N,), the first one of equals; -1 where the largest logit is not finite.

    Taken of blocks and then within a row's best one: on a CPU the largest value comes several times as fast as its
    place.
    """
    N, V = logits_NV.shape
    width = _width(V)
    if width == V:
        value_N, top_N = logits_NV.max(-1)
    else:
        blocks_NKW = logits_NV.unflatten(1, (-1, width))
        block_N = blocks_NKW.amax(-1).argmax(-1)
        row_N = torch.arange(N, device=logits_NV.device) * (V // width) + block_N
        value_N, place_N = blocks_NKW.flatten(0, 1).index_select(0, row_N).max(-1)
        top_N = block_N * width + place_N
    return top_N.masked_fill(~torch.isfinite(value_N), -1)


@functools.cache
def _width(V: int) -> int:
    """Of the blocks that a vocabulary is cut into: the largest divisor up to 128; all of it where only crumbs are."""
    width = next(w for w in range(min(128, V), 0, -1) if V % w == 0)
    return width if width >= 8 else V


def _precise(logits: torch.Tensor) -> torch.Tensor:
    """At least float32: a soft-max over a vocabulary in bf16 loses most of its digits."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _gather(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict answer tokens, (N, V) in the logits' dtype, and those tokens, (N,), row by row."""
    place_N, targets_N = _places(labels_BT)
    # index_select and not a boolean mask: its backward is twice as fast on CPU
    return logits_BTV.reshape(-1, logits_BTV.shape[-1]).index_select(0, place_N), targets_N


def _places(labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions that predict answer tokens, and those tokens, both (N,), row by row."""
    mask_BT = F.pad(answer_mask(labels_BT), (0, 1))  # the last position predicts nothing
    place_N = mask_BT.flatten().nonzero().squeeze(1)
    return place_N, labels_BT.reshape(-1)[place_N + 1]


def _scatter(values_N: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Values of answer tokens at their places in (B, T-1), zero or False elsewhere."""
    mask_BT1 = answer_mask(labels_BT)
    return torch.zeros_like(mask_BT1, dtype=values_N.dtype).masked_scatter(mask_BT1, values_N)
