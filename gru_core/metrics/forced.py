"""Teacher forcing: everything that one forward pass tells of an answer; what answers to one prompt share, passed once.

Shape legend: B rows of a batch, K1 tokens kept of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from gru_core.batch import TokenRow
from gru_core.logprobs import sequence_nll
from gru_core.metrics.base import LOST_NLL, AnswerScores, Hits
from gru_core.metrics.batches import cut
from gru_core.metrics.passes import Branch, Look, Passed, Passes
from gru_core.metrics.scorer import Scorer, is_plain

TAIL = 0.4
"""Share of an answer's tokens that Min-K% and Min-K%++ look at, the least likely ones; at least one token."""

Prompt = tuple[int, ...]


class Answer(NamedTuple):
    """One answer under teacher forcing.

    Attributes:
        hits: None, and ``led`` and ``next`` without meaning, where its likelihood alone was asked for.
        led: how many of its first tokens, the closing one included, are the arg-max: greedy generation behind its
            prompt begins with them.
        next: the token that generation goes on with behind those; None where there is none (the whole answer was
            led, or the logits are not finite).
        tail: Min-K% and Min-K%++ where they were asked for.
    """

    scores: AnswerScores
    hits: Hits | None
    led: int
    next: int | None
    tail: tuple[float, float] | None = None


Forced = dict[TokenRow, Answer]


def teacher_forced(scorer: Scorer, asked: Mapping[TokenRow, Look], pad_id: int, batch_rows: int) -> Forced:
    """Scores of every row of ``asked``, looked at as closely as that says.

    Of several answers to one prompt, the trunk goes through the model whole, and the others follow behind its key-value
    cache from the token on at which they leave it, where the model has such a cache: what answers have in common is
    fed once. Batches are of like lengths, whatever the prompts, and filled by tokens: at most as many as ``batch_rows``
    of the longest row.
    """
    room = batch_rows * max((len(r.ids) for r in asked), default=0)
    together: dict[Prompt, list[TokenRow]] = {}
    for row in asked:
        together.setdefault(row.ids[: row.prompt_length], []).append(row)
    trunks: dict[TokenRow, list[TokenRow]] = {}
    alone: list[TokenRow] = []
    branching = scorer.continues()
    for prompt, found in together.items():
        # texts without a question have a first token in common, and no more
        if branching and len(found) > 1 and len(prompt) > 1:
            trunk = _trunk(found, asked)
            trunks[trunk] = [row for row in found if row is not trunk]
        else:
            alone += found
    passes, price = Passes(scorer, asked, pad_id), _price(scorer.device)
    out: Forced = {}
    # trunks in as few batches as can be, since the branches of each of them are sorted among themselves; with a place
    # for the logits of every branch's first own token
    sizes = {trunk: max(len(trunk.ids), trunk.answer_length + len(behind)) for trunk, behind in trunks.items()}
    for batch in cut(sorted(trunks, key=lambda r: (-sizes[r], r.prompt_length)), room, room, sizes.__getitem__):
        found_of, left = _with_branches(passes, batch, trunks, room, price)
        out |= found_of
        alone += left
    for batch in cut(_longest_first(alone), room, price, _length):
        out |= _score(passes.whole(batch), asked)
    return out


def _with_branches(
    passes: Passes, batch: Sequence[TokenRow], trunks: Mapping[TokenRow, list[TokenRow]], room: int, price: int
) -> tuple[Forced, list[TokenRow]]:
    """Scores of a batch of trunks and of their branches; and the branches that cannot pass behind the model's cache."""
    found = [Branch.of(row, p, trunk) for p, trunk in enumerate(batch) for row in trunks[trunk]]
    branches = sorted(found, key=lambda b: (-b.fed, -b.kept))
    passed = passes.whole(batch, branches)
    out = _score(passed, passes.asked)
    # a NaN goes through every mask: what is masked counts 0 times its value
    if any(out[trunk].scores.lost for trunk in batch):
        return out, [b.row for b in branches]
    begun, left = 0, []
    for some in cut(branches, room, price, lambda b: b.fed, lambda b: b.kept):
        if some[0].fed and not is_plain(passed.cache):
            left += [b.row for b in some]
        else:
            out |= _score(passes.behind(passed, some, begun), passes.asked)
        begun += len(some)
    return out, left


def _longest_first(rows: Iterable[TokenRow]) -> list[TokenRow]:
    """Memory fails early."""
    return sorted(rows, key=lambda r: (-len(r.ids), r.prompt_length))


def _length(row: TokenRow) -> int:
    return len(row.ids)


def _price(device: torch.device) -> int:
    """What a pass costs besides its tokens, in tokens: on a CPU little; on a GPU the starts of its kernels, which take
    as long as the tokens of a small batch."""
    return 128 if device.type == "cpu" else 4096


def _trunk(rows: Sequence[TokenRow], asked: Mapping[TokenRow, Look]) -> TokenRow:
    """The row with which the others share the most first tokens; one whose tail is asked for where there is one, since
    that takes longer than anything else and is done for whole batches."""
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
    return rows[max(range(len(rows)), key=lambda i: (asked[rows[i]] is Look.TAIL, shared[i]))]


def _score(passed: Passed, asked: Mapping[TokenRow, Look]) -> Forced:
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
    tails: Iterable[tuple[float, float] | None] = [None] * len(rows)
    if found.standard is not None:
        tails = zip(*(_least_likely(x, plain_BK1) for x in (nll_BK1, _finite(-found.standard))), strict=True)
    out: Forced = {}
    for row, nll, n, matched, prefix, length, led, follows, tail in zip(rows, *columns, tails, strict=True):
        look = asked[row]
        hits = Hits(matched, prefix, length) if look >= Look.HITS else None
        after = follows if follows >= 0 else None
        out[row] = Answer(AnswerScores(nll, n), hits, led, after, tail if look is Look.TAIL else None)
    return out


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
