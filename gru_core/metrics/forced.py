"""Teacher forcing: everything that one forward pass tells of an answer.

Shape legend: B rows of a batch, T tokens of its longest row, K kept positions (from the first that predicts an
answer token), K1 = K - 1 predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from gru_core.batch import TokenRow, collate
from gru_core.logprobs import answer_counts, answer_nll_and_hits, answer_standard_scores, sequence_nll
from gru_core.metrics.base import LOST_NLL, AnswerScores, Hits
from gru_core.metrics.scorer import Scorer

TAIL = 0.4
"""Share of an answer's tokens that Min-K% and Min-K%++ look at, the least likely ones; at least one token."""


class Answer(NamedTuple):
    """One answer under teacher forcing; ``tail`` is Min-K% and Min-K%++ where they were asked for."""

    scores: AnswerScores
    hits: Hits
    tail: tuple[float, float] | None = None


Forced = dict[TokenRow, Answer]


def teacher_forced(
    scorer: Scorer, rows: Iterable[TokenRow], tails: set[TokenRow], pad_id: int, batch_rows: int
) -> Forced:
    """Scores of every row of ``rows``; those in ``tails`` with their tails."""
    ordered = sorted(rows, key=lambda r: (-len(r.ids), r.prompt_length))  # longest first: memory fails early
    out: Forced = {}
    for start in range(0, len(ordered), batch_rows):
        batch = ordered[start : start + batch_rows]
        out |= zip(batch, _score_batch(scorer, batch, tails, pad_id), strict=True)
    return out


def _score_batch(scorer: Scorer, rows: Sequence[TokenRow], tails: set[TokenRow], pad_id: int) -> list[Answer]:
    """One forward pass, without the logits of positions before the first answer where the model can leave them out."""
    device = scorer.device
    batch = collate(rows, range(len(rows)), pad_id).to(device)
    first = min(r.prompt_length for r in rows) - 1
    K = batch.ids_BT.shape[1] - first
    options = {"logits_to_keep": K} if scorer.takes("logits_to_keep") else {}
    logits = scorer.forward(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False, **options).logits
    logits, labels_BK = logits[:, -K:], batch.labels_BT[:, first:]
    nll_BK1, hits_BK1 = answer_nll_and_hits(logits, labels_BK)
    nll_BK1 = _finite(nll_BK1)
    begin_B = torch.tensor([r.prompt_length - 1 - first for r in rows], device=device)
    end_B = torch.tensor([len(r.ids) - 1 - first - r.has_eos for r in rows], device=device)
    column_K1 = torch.arange(K - 1, device=device)
    plain_BK1 = (column_K1 >= begin_B[:, None]) & (column_K1 < end_B[:, None])  # the closing token left out
    missed_BK1 = plain_BK1 & ~hits_BK1
    matched_B = (plain_BK1 & hits_BK1).sum(1)
    prefix_B = ((missed_BK1 * (column_K1 + 1)).amax(1) - begin_B).clamp(min=0)
    nll_B, tokens_B = sequence_nll(nll_BK1), answer_counts(labels_BK)
    columns = [t.tolist() for t in (nll_B, tokens_B, matched_B, prefix_B, end_B - begin_B)]
    found: list[tuple[float, float] | None] = [None] * len(rows)
    if any(row in tails for row in rows):
        surprise_BK1 = _finite(-answer_standard_scores(logits, labels_BK))
        both = (_least_likely(x_BK1, plain_BK1) for x_BK1 in (nll_BK1, surprise_BK1))
        found = [pair if row in tails else None for row, pair in zip(rows, zip(*both, strict=True), strict=True)]
    return [
        Answer(AnswerScores(nll, n), Hits(m, k, length), tail)
        for nll, n, m, k, length, tail in zip(*columns, found, strict=True)
    ]


def _finite(cost_BK1: torch.Tensor) -> torch.Tensor:
    """In float64, with a finite number for a token of a diverged model."""
    return cost_BK1.double().nan_to_num(nan=LOST_NLL, posinf=LOST_NLL).clamp(max=LOST_NLL)


def _least_likely(cost_BK1: torch.Tensor, plain_BK1: torch.Tensor) -> list[float]:
    """Mean cost of each row's :data:`TAIL` of costliest tokens; 0 for a row with no token besides the closing one."""
    sorted_BK1 = cost_BK1.masked_fill(~plain_BK1, -torch.inf).sort(dim=1, descending=True).values
    length_B = plain_BK1.sum(1)
    count_B = (TAIL * length_B).long().clamp(min=1)
    chosen_BK1 = torch.arange(cost_BK1.shape[1], device=cost_BK1.device) < count_B[:, None]
    mean_B = sorted_BK1.masked_fill(~chosen_BK1, 0.0).sum(1) / count_B
    return [float(m) if n else 0.0 for m, n in zip(mean_B.tolist(), length_B.tolist(), strict=True)]
