"""Teacher forcing: everything that one forward pass tells of an answer, answers to one prompt behind one prompt pass.

Shape legend: B rows of a batch, T tokens of its longest row, K kept positions (from the first that predicts an
answer token), K1 = K - 1 predicted tokens, V vocabulary; P prompts, S cached positions of the longest of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from gru_core.batch import TokenRow, collate
from gru_core.logprobs import answer_counts, answer_tokens, sequence_nll
from gru_core.metrics.base import LOST_NLL, AnswerScores, Hits
from gru_core.metrics.scorer import Scorer

TAIL = 0.4
"""Share of an answer's tokens that Min-K% and Min-K%++ look at, the least likely ones; at least one token."""

R = TypeVar("R")
Prompt = tuple[int, ...]


class Answer(NamedTuple):
    """One answer under teacher forcing.

    Attributes:
        led: how many of its first tokens, the closing one included, are the arg-max: greedy generation behind its
            prompt begins with them.
        next: the token that generation goes on with behind those; None where there is none (the whole answer was
            led, or the logits are not finite).
        tail: Min-K% and Min-K%++ where they were asked for.
    """

    scores: AnswerScores
    hits: Hits
    led: int
    next: int | None
    tail: tuple[float, float] | None = None


Forced = dict[TokenRow, Answer]


def teacher_forced(
    scorer: Scorer, rows: Iterable[TokenRow], tails: set[TokenRow], pad_id: int, batch_rows: int
) -> Forced:
    """Scores of every row of ``rows``; those in ``tails`` with their tails.

    A prompt with several answers goes through the model once, and its answers follow behind its key-value cache, where
    the model has one. Batches are of like lengths, whatever the prompts, and filled by tokens: at most as many as
    ``batch_rows`` of the longest row.
    """
    rows = list(rows)
    room = batch_rows * max((len(r.ids) for r in rows), default=0)
    asked: dict[Prompt, list[TokenRow]] = {}
    for row in rows:
        asked.setdefault(row.ids[: row.prompt_length], []).append(row)
    shared = {p: found for p, found in asked.items() if len(found) > 1 and len(p) > 1 and scorer.continues()}
    alone = [row for prompt, found in asked.items() if prompt not in shared for row in found]
    out: Forced = {}
    # longest first: memory fails early
    alone.sort(key=lambda r: (-len(r.ids), r.prompt_length))
    for batch in _filled(alone, room, lambda r: len(r.ids), lambda r: 1):
        out |= zip(batch, _score_batch(scorer, batch, tails, pad_id), strict=True)
    # half the room: the prompts' cache stays while their answers pass
    for prompts in _filled(sorted(shared, key=len, reverse=True), room // 2, len, lambda p: 1):
        cache, mask_PS = _passed(scorer, prompts, pad_id)
        before = mask_PS.shape[1]
        behind = [(row, p) for p, prompt in enumerate(prompts) for row in shared[prompt]]
        behind.sort(key=lambda pair: -pair[0].answer_length)
        for pairs in _filled(behind, room, lambda pair, S=before: S + pair[0].answer_length, lambda pair: 1):  # type: ignore[misc]
            together = [row for row, _ in pairs]
            scores = _score_behind(scorer, cache, mask_PS, [p for _, p in pairs], together, tails, pad_id)
            out |= zip(together, scores, strict=True)
    return out


def _filled(items: Sequence[R], room: int, length: Callable[[R], int], count: Callable[[R], int]) -> Iterator[list[R]]:
    """Runs of ``items`` whose sequences, padded to the longest, have at most ``room`` tokens; at least one item."""
    batch: list[R] = []
    longest = sequences = 0
    for item in items:
        longest, sequences = max(longest, length(item)), sequences + count(item)
        if batch and longest * sequences > room:
            yield batch
            batch, longest, sequences = [], length(item), count(item)
        batch.append(item)
    if batch:
        yield batch


def _score_batch(scorer: Scorer, rows: Sequence[TokenRow], tails: set[TokenRow], pad_id: int) -> list[Answer]:
    """One forward pass, without the logits of positions before the first answer where the model can leave them out.

    The last token predicts nothing and is not fed: a row may be one token longer than the model takes.
    """
    batch = collate(rows, range(len(rows)), pad_id).to(scorer.device)
    first = min(r.prompt_length for r in rows) - 1
    ids_BT, mask_BT = batch.ids_BT[:, :-1], batch.mask_BT[:, :-1]
    K1 = ids_BT.shape[1] - first
    options = {"logits_to_keep": K1} if scorer.takes("logits_to_keep") else {}
    logits = scorer.forward(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **options).logits
    begin = [r.prompt_length - 1 - first for r in rows]
    return _answers(logits[:, -K1:], batch.labels_BT[:, first:], rows, begin, tails)


def _passed(scorer: Scorer, prompts: Sequence[Prompt], pad_id: int) -> tuple[Any, torch.Tensor]:
    """The cache behind the prompts without their last tokens, and the mask (P, S) of what stands in it."""
    device = scorer.device
    S, P = max(map(len, prompts)) - 1, len(prompts)
    ids_PS = torch.full((P, S), pad_id)
    mask_PS = torch.zeros((P, S), dtype=torch.int64)
    for p, prompt in enumerate(prompts):  # padded on the left: what follows is next to it
        ids_PS[p, S + 1 - len(prompt) :] = torch.tensor(prompt[:-1])
        mask_PS[p, S + 1 - len(prompt) :] = 1
    ids_PS, mask_PS = ids_PS.to(device), mask_PS.to(device)
    options = {"logits_to_keep": 1} if scorer.takes("logits_to_keep") else {}
    cache = scorer.forward(
        input_ids=ids_PS, attention_mask=mask_PS, position_ids=(mask_PS.cumsum(1) - 1).clamp(min=0), use_cache=True,
        **options,
    ).past_key_values  # fmt: skip
    return cache, mask_PS


def _score_behind(
    scorer: Scorer, prompts: Any, mask_PS: torch.Tensor, places: Sequence[int], rows: Sequence[TokenRow],
    tails: set[TokenRow], pad_id: int,
) -> list[Answer]:  # fmt: skip
    """One forward pass behind the cache ``prompts``: the last token of each answer's prompt, and the answer less its
    last one; ``places`` are the answers' prompts."""
    device = scorer.device
    index_B = torch.tensor(places, device=device)
    cache = copy.deepcopy(prompts)  # a pass adds to it
    cache.batch_select_indices(index_B)
    after = [TokenRow(r.id, r.ids[r.prompt_length - 1 :], 1, r.has_eos) for r in rows]
    batch = collate(after, range(len(rows)), pad_id).to(device)
    mask_BS, ids_BK1, mask_BK1 = mask_PS[index_B], batch.ids_BT[:, :-1], batch.mask_BT[:, :-1]
    place_BK1 = mask_BS.sum(1, keepdim=True) + torch.arange(ids_BK1.shape[1], device=device)
    last_B1 = torch.tensor([[len(r.ids) - 2] for r in rows], device=device)  # padding has no position of its own
    logits = scorer.forward(
        input_ids=ids_BK1, attention_mask=torch.cat([mask_BS, mask_BK1], dim=1),
        position_ids=place_BK1.minimum(last_B1), past_key_values=cache, use_cache=True,
    ).logits  # fmt: skip
    return _answers(logits, batch.labels_BT, rows, [0] * len(rows), tails)


def _answers(
    logits_BK1V: torch.Tensor, labels_BK: torch.Tensor, rows: Sequence[TokenRow], begin: Sequence[int],
    tails: set[TokenRow],
) -> list[Answer]:  # fmt: skip
    """What logits and labels tell of each row; ``begin`` is the column that predicts its first answer token."""
    device, K = logits_BK1V.device, labels_BK.shape[1]
    found = answer_tokens(logits_BK1V, labels_BK, standard=any(row in tails for row in rows))
    nll_BK1, hits_BK1 = _finite(found.nll), found.hits
    begin_B = torch.tensor(begin, device=device)
    length_B = torch.tensor([r.answer_length - r.has_eos for r in rows], device=device)
    column_K1 = torch.arange(K - 1, device=device)
    # the closing token left out
    plain_BK1 = (column_K1 >= begin_B[:, None]) & (column_K1 < (begin_B + length_B)[:, None])
    missed_BK1 = plain_BK1 & ~hits_BK1
    matched_B = (plain_BK1 & hits_BK1).sum(1)
    prefix_B = ((missed_BK1 * (column_K1 + 1)).amax(1) - begin_B).clamp(min=0)
    nll_B, tokens_B = sequence_nll(nll_BK1), answer_counts(labels_BK)
    led_BK1 = (hits_BK1 | (column_K1 < begin_B[:, None])).cumprod(1) * (column_K1 >= begin_B[:, None])
    led_B = led_BK1.sum(1)
    next_B = found.top.gather(1, (begin_B + led_B).clamp(max=K - 2)[:, None]).squeeze(1)
    next_B = next_B.masked_fill(led_B == tokens_B, -1)
    columns = [t.tolist() for t in (nll_B, tokens_B, matched_B, prefix_B, length_B, led_B, next_B)]
    pairs: list[tuple[float, float] | None] = [None] * len(rows)
    if found.standard is not None:
        both = (_least_likely(x_BK1, plain_BK1) for x_BK1 in (nll_BK1, _finite(-found.standard)))
        pairs = [pair if row in tails else None for row, pair in zip(rows, zip(*both, strict=True), strict=True)]
    return [
        Answer(AnswerScores(nll, n), Hits(m, k, length), led, follows if follows >= 0 else None, tail)
        for nll, n, m, k, length, led, follows, tail in zip(*columns, pairs, strict=True)
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
