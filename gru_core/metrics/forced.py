"""Teacher forcing: everything that one forward pass tells of an answer; what answers to one prompt share, passed once.

Shape legend: B rows of a batch, P trunks, T tokens of the longest row, K1 predicted tokens kept of each row (from the
first column at which one has an answer token), K or J likewise, S cached tokens, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from gru_core.batch import TokenRow, collate
from gru_core.logprobs import AnswerTokens, answer_tokens, sequence_nll, tokens_at
from gru_core.metrics.base import LOST_NLL, AnswerScores, Hits
from gru_core.metrics.batches import cut
from gru_core.metrics.scorer import Scorer, is_plain, picked

TAIL = 0.4
"""Share of an answer's tokens that Min-K% and Min-K%++ look at, the least likely ones; at least one token."""

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

    Of several answers to one prompt, the trunk goes through the model whole, and the others follow behind its key-value
    cache from the token on at which they leave it, where the model has such a cache: what answers have in common is
    fed once. Batches are of like lengths, whatever the prompts, and filled by tokens: at most as many as ``batch_rows``
    of the longest row.
    """
    rows = list(rows)
    room = batch_rows * max((len(r.ids) for r in rows), default=0)
    asked: dict[Prompt, list[TokenRow]] = {}
    for row in rows:
        asked.setdefault(row.ids[: row.prompt_length], []).append(row)
    trunks: dict[TokenRow, list[TokenRow]] = {}
    alone: list[TokenRow] = []
    branching = scorer.continues()
    for prompt, found in asked.items():
        if branching and len(found) > 1 and len(prompt) > 1:
            trunk = _trunk(found, tails)
            trunks[trunk] = [row for row in found if row is not trunk]
        else:
            alone += found
    out: Forced = {}
    # trunks in as few batches as can be: the branches behind each of them are sorted among themselves
    for batch in cut(_longest_first(trunks), room, room, _length):
        scores, left = _with_branches(scorer, batch, trunks, tails, pad_id, room)
        out |= scores
        alone += left
    for batch in cut(_longest_first(alone), room, _price(scorer.device), _length):
        out |= _score(_pass(scorer, batch, _tailed(batch, tails), pad_id), tails)
    return out


def _with_branches(
    scorer: Scorer, batch: Sequence[TokenRow], trunks: dict[TokenRow, list[TokenRow]], tails: set[TokenRow],
    pad_id: int, room: int,
) -> tuple[Forced, list[TokenRow]]:  # fmt: skip
    """Scores of a batch of trunks and of their branches; and the branches that cannot pass behind the model's cache."""
    found = [_Branch(row, p, _shared(row, trunk)) for p, trunk in enumerate(batch) for row in trunks[trunk]]
    branches = sorted(found, key=lambda b: (-b.fed, -b.kept))
    passed = _pass(scorer, batch, _tailed([*batch, *(b.row for b in branches)], tails), pad_id, branches)
    out = _score(passed, tails)
    # a NaN goes through every mask: what is masked counts 0 times its value
    if not is_plain(passed.cache) or any(out[trunk].scores.lost for trunk in batch):
        return out, [b.row for b in branches]
    begun = 0
    for some in cut(branches, room, _price(scorer.device), lambda b: b.fed, lambda b: b.kept + b.fed):
        rows = [b.row for b in some]
        standard = _tailed(rows, tails)
        own = _own_tokens(scorer, passed.cache, some, standard, pad_id) if some[0].fed else None
        out |= _score(_Passed(rows, _joined(passed, some, begun, own, standard), [0] * len(rows)), tails)
        begun += len(some)
    return out, []


def _longest_first(rows: Iterable[TokenRow]) -> list[TokenRow]:
    """Memory fails early."""
    return sorted(rows, key=lambda r: (-len(r.ids), r.prompt_length))


def _length(row: TokenRow) -> int:
    return len(row.ids)


def _price(device: torch.device) -> int:
    """What a pass costs besides its tokens, in tokens: on a CPU little; on a GPU the starts of its kernels, which take
    as long as the tokens of a small batch."""
    return 64 if device.type == "cpu" else 4096


def _trunk(rows: Sequence[TokenRow], tails: set[TokenRow]) -> TokenRow:
    """The row with which the others share the most first tokens; one of ``tails`` where there is one, whose answers
    are looked at more closely than the others'."""
    places: dict[tuple[int, int], int] = {}  # a tree of the rows' tokens: (place, token) -> place
    paths: list[list[int]] = []
    for row in rows:
        path, place = [], 0
        for token in row.ids[row.prompt_length :]:
            place = places.setdefault((place, token), len(places) + 1)
            path.append(place)
        paths.append(path)
    met = Counter(place for path in paths for place in path)
    shared = [sum(met[place] - 1 for place in path) for path in paths]
    return rows[max(range(len(rows)), key=lambda i: (rows[i] in tails, shared[i]))]


class _Branch(NamedTuple):
    """A row that has its first ``kept`` tokens in common with the row at ``place`` of its trunks, which feeds them."""

    row: TokenRow
    place: int
    kept: int

    @property
    def fed(self) -> int:
        """Tokens that follow behind the trunk's: those of its own but the last one."""
        return len(self.row.ids) - self.kept - 1


def _shared(row: TokenRow, trunk: TokenRow) -> int:
    """How many first tokens ``row`` and ``trunk`` have in common; the last one of either, which is not fed, does not
    count."""
    fed = min(len(row.ids), len(trunk.ids)) - 1
    return next((k for k in range(fed) if row.ids[k] != trunk.ids[k]), fed)


def _tailed(rows: Iterable[TokenRow], tails: set[TokenRow]) -> bool:
    return any(row in tails for row in rows)


class _Passed(NamedTuple):
    """What a pass told of the answers of its rows.

    Attributes:
        tokens: each (B, K1).
        begin: the column of each row's first answer token.
        first: of each branch that is to follow, (N,), the first token of its own.
        cache: behind all tokens of the rows but the last, where branches are to follow.
    """

    rows: Sequence[TokenRow]
    tokens: AnswerTokens
    begin: list[int]
    first: AnswerTokens | None = None
    cache: Any = None


def _pass(
    scorer: Scorer, rows: Sequence[TokenRow], standard: bool, pad_id: int, branches: Sequence[_Branch] = ()
) -> _Passed:
    """One forward pass, without the logits of positions before the first answer where the model can leave them out.

    The last token predicts nothing and is not fed: a row may be one token longer than the model takes.
    """
    device = scorer.device
    batch = collate(rows, range(len(rows)), pad_id).to(device)
    before = min(r.prompt_length for r in rows) - 1
    ids_BT, mask_BT = batch.ids_BT[:, :-1], batch.mask_BT[:, :-1]
    K1 = ids_BT.shape[1] - before
    options: dict[str, Any] = {"logits_to_keep": K1} if scorer.takes("logits_to_keep") else {}
    if branches:  # which go on counting
        options["position_ids"] = (mask_BT.cumsum(1) - 1).clamp(min=0)
    found = scorer.forward(input_ids=ids_BT, attention_mask=mask_BT, use_cache=bool(branches), **options)
    logits_BKV = found.logits[:, -K1:]
    tokens = answer_tokens(logits_BKV, batch.labels_BT[:, before:], standard)
    begin = [r.prompt_length - 1 - before for r in rows]
    if not branches:
        return _Passed(rows, tokens, begin)
    place_N = torch.tensor([b.place * K1 + b.kept - 1 - before for b in branches], device=device)
    own_N = torch.tensor([b.row.ids[b.kept] for b in branches], device=device)
    first = tokens_at(logits_BKV, place_N, own_N, standard)
    return _Passed(rows, tokens, begin, first, found.past_key_values)


def _own_tokens(scorer: Scorer, cache: Any, branches: Sequence[_Branch], standard: bool, pad_id: int) -> AnswerTokens:
    """One forward pass behind ``cache``: of each branch its own tokens less the last one, which tell of those behind
    the first of its own; each (B, K)."""
    device = scorer.device
    place_B = torch.tensor([b.place for b in branches], device=device)
    kept_B1 = torch.tensor([[b.kept] for b in branches], device=device)
    # what is shared stands next to what is not: some models count their windows by columns
    column_BS = torch.arange(-max(b.kept for b in branches), 0, device=device) + kept_B1
    own = [TokenRow(b.row.id, b.row.ids[b.kept :], 1, b.row.has_eos) for b in branches]
    batch = collate(own, range(len(own)), pad_id).to(device)
    ids_BK, mask_BK = batch.ids_BT[:, :-1], batch.mask_BT[:, :-1]
    position_BK = kept_B1 + torch.arange(ids_BK.shape[1], device=device)
    last_B1 = torch.tensor([[b.kept + b.fed - 1] for b in branches], device=device)  # padding has no place of its own
    logits = scorer.forward(
        input_ids=ids_BK, attention_mask=torch.cat([(column_BS >= 0).to(mask_BK.dtype), mask_BK], dim=1),
        position_ids=position_BK.minimum(last_B1), past_key_values=picked(cache, place_B, column_BS.clamp(min=0)),
        use_cache=True,
    ).logits  # fmt: skip
    return answer_tokens(logits, batch.labels_BT, standard)


def _joined(
    trunks: _Passed, branches: Sequence[_Branch], begun: int, own: AnswerTokens | None, standard: bool
) -> AnswerTokens:
    """Tokens of whole answers, (B, J): of a branch what it shares and the first of its own as the pass over its trunk
    told them, behind them the rest of its own. ``branches`` are those from number ``begun`` on."""
    device, K = trunks.tokens.nll.device, trunks.tokens.nll.shape[1]
    place_B = torch.tensor([b.place for b in branches], device=device)
    begin_B1 = torch.tensor([[trunks.begin[b.place]] for b in branches], device=device)
    shared_B1 = torch.tensor([[b.kept - b.row.prompt_length] for b in branches], device=device)
    column_J = torch.arange(max(b.row.answer_length for b in branches), device=device)
    outside_BJ = column_J >= torch.tensor([[b.row.answer_length] for b in branches], device=device)
    index_BJ = torch.where(column_J < shared_B1, begin_B1 + column_J, K + column_J - shared_B1)
    index_BJ = index_BJ.masked_fill(outside_BJ, 0)

    def join(field: str) -> torch.Tensor:
        parts = [
            getattr(trunks.tokens, field)[place_B],
            getattr(trunks.first, field)[begun : begun + len(branches), None],
        ]
        if own is not None:
            parts.append(getattr(own, field))
        return torch.cat(parts, dim=1).gather(1, index_BJ).masked_fill(outside_BJ, 0)

    return AnswerTokens(join("nll"), join("hits"), join("top"), join("standard") if standard else None)


def _score(passed: _Passed, tails: set[TokenRow]) -> Forced:
    """What the tokens of a pass tell of each of its rows."""
    rows, found = passed.rows, passed.tokens
    device, K1 = found.nll.device, found.nll.shape[1]
    nll_BK1, hits_BK1 = _finite(found.nll), found.hits
    begin_B = torch.tensor(passed.begin, device=device)
    tokens_B = torch.tensor([r.answer_length for r in rows], device=device)
    length_B = torch.tensor([r.answer_length - r.has_eos for r in rows], device=device)
    column_K1 = torch.arange(K1, device=device)
    # the closing token left out
    plain_BK1 = (column_K1 >= begin_B[:, None]) & (column_K1 < (begin_B + length_B)[:, None])
    missed_BK1 = plain_BK1 & ~hits_BK1
    matched_B = (plain_BK1 & hits_BK1).sum(1)
    prefix_B = ((missed_BK1 * (column_K1 + 1)).amax(1) - begin_B).clamp(min=0)
    led_BK1 = (hits_BK1 | (column_K1 < begin_B[:, None])).cumprod(1) * (column_K1 >= begin_B[:, None])
    led_B = led_BK1.sum(1)
    next_B = found.top.gather(1, (begin_B + led_B).clamp(max=K1 - 1)[:, None]).squeeze(1)
    next_B = next_B.masked_fill(led_B == tokens_B, -1)
    columns = [t.tolist() for t in (sequence_nll(nll_BK1), tokens_B, matched_B, prefix_B, length_B, led_B, next_B)]
    pairs: list[tuple[float, float] | None] = [None] * len(rows)
    if found.standard is not None:
        both = (_least_likely(x_BK1, plain_BK1) for x_BK1 in (nll_BK1, _finite(-found.standard)))
        pairs = [pair if row in tails else None for row, pair in zip(rows, zip(*both, strict=True), strict=True)]
    return {
        row: Answer(AnswerScores(nll, n), Hits(m, k, length), led, follows if follows >= 0 else None, tail)
        for row, nll, n, m, k, length, led, follows, tail in zip(rows, *columns, pairs, strict=True)
    }


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
