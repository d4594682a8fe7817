"""Forward passes over answers: whole rows, and rows that follow behind what others have cached.

Shape legend: B rows of a batch, P trunks, T tokens of the longest row, K1 predicted tokens kept of each row (from the
first column at which one has an answer token), K or J likewise, S cached tokens, N tokens or branches, M branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from gru_core.batch import TokenRow, collate
from gru_core.logprobs import AnswerTokens, answer_places, answer_tokens, token_numbers
from gru_core.metrics.scorer import Scorer, picked


class Look(IntEnum):
    """How closely an answer is looked at: its likelihood; which of its tokens are the arg-max, too; and its least
    likely tokens, too."""

    LIKELIHOOD = 0
    HITS = 1
    TAIL = 2


class Branch(NamedTuple):
    """A row that has its first ``kept`` tokens in common with the row at ``place`` of its trunks, which feeds them."""

    row: TokenRow
    place: int
    kept: int

    @classmethod
    def of(cls, row: TokenRow, place: int, trunk: TokenRow) -> Branch:
        """With as many tokens in common as there are; the last one of either, which is not fed, does not count."""
        fed = min(len(row.ids), len(trunk.ids)) - 1
        return cls(row, place, next((k for k in range(fed) if row.ids[k] != trunk.ids[k]), fed))

    @property
    def fed(self) -> int:
        """Tokens that follow behind the trunk's: those of its own but the last one."""
        return len(self.row.ids) - self.kept - 1


class Passed(NamedTuple):
    """What a pass told of the answers of its rows.

    Attributes:
        tokens: each (B, K1).
        begin: the column of each row's first answer token.
        first: of each branch that is to follow, (M,), the first token of its own.
        cache: behind all tokens of the rows but the last, where branches are to follow it.
    """

    rows: Sequence[TokenRow]
    tokens: AnswerTokens
    begin: list[int]
    first: AnswerTokens
    cache: Any = None


class Passes(NamedTuple):
    """Forward passes of a model over rows of ``asked``, each looked at as closely as that says."""

    scorer: Scorer
    asked: Mapping[TokenRow, Look]
    pad_id: int

    def whole(self, rows: Sequence[TokenRow], branches: Sequence[Branch] = ()) -> Passed:
        """One pass, the logits of answer tokens alone.

        The last token of a row predicts nothing and is not fed: a row may be one token longer than the model takes.
        """
        batch = collate(rows, range(len(rows)), self.pad_id).to(self.scorer.device)
        mask_BT = batch.mask_BT[:, 1:]
        # not what stands there: a mask makes it count 0 times, which does not stop a NaN
        ids_BT = torch.where(mask_BT > 0, batch.ids_BT[:, :-1], batch.ids_BT[:, :1])
        told = [[row] for row in rows]
        for b in branches:
            told[b.place].append(b.row)
        standard = self._looks(Look.TAIL, (row for each in told for row in each))
        looked_B = self._tensor([self._looks(Look.HITS, each) for each in told])
        place_N = answer_places(batch.labels_BT)
        begun_M = self._tensor([b.place * ids_BT.shape[1] + b.kept - 1 for b in branches], torch.int64)
        logits, cache = self.scorer.at(
            torch.cat([place_N, begun_M]), input_ids=ids_BT, use_cache=any(b.fed for b in branches),
            attention_mask=torch.ones_like(mask_BT),  # no token sees what is behind it: padding needs no mask
        )  # fmt: skip
        before = min(r.prompt_length for r in rows) - 1
        tokens = answer_tokens(logits[: len(place_N)], batch.labels_BT[:, before:], standard, looked_B)
        first = token_numbers(
            logits[len(place_N) :], self._tensor([b.row.ids[b.kept] for b in branches], torch.int64), standard,
            self._tensor([self._looks(Look.HITS, [b.row]) for b in branches], torch.bool),
        )  # fmt: skip
        return Passed(rows, tokens, [r.prompt_length - 1 - before for r in rows], first, cache)

    def behind(self, trunks: Passed, branches: Sequence[Branch], begun: int) -> Passed:
        """Whole answers of ``branches``, those from number ``begun`` on of all whose first tokens ``trunks`` has. What
        they share and their first own tokens ``trunks`` told, the rest one pass behind its cache, where any is fed."""
        K, first = trunks.tokens.nll.shape[1], trunks.first
        standard = self._looks(Look.TAIL, (b.row for b in branches))
        own = self._own(trunks.cache, branches, standard) if any(b.fed for b in branches) else None
        place_B = self._tensor([b.place for b in branches])
        begin_B1 = self._tensor([[trunks.begin[b.place]] for b in branches])
        shared_B1 = self._tensor([[b.kept - b.row.prompt_length] for b in branches])
        column_J = torch.arange(max(b.row.answer_length for b in branches), device=self.scorer.device)
        outside_BJ = column_J >= self._tensor([[b.row.answer_length] for b in branches])
        index_BJ = torch.where(column_J < shared_B1, begin_B1 + column_J, K + column_J - shared_B1)
        index_BJ = index_BJ.masked_fill(outside_BJ, 0)

        def join(name: str) -> torch.Tensor:
            told = (getattr(trunks.tokens, name)[place_B], getattr(first, name)[begun : begun + len(branches), None])
            parts = told if own is None else (*told, getattr(own, name))
            return torch.cat(parts, dim=1).gather(1, index_BJ).masked_fill(outside_BJ, 0)

        tokens = AnswerTokens(join("nll"), join("hits"), join("top"), join("standard") if standard else None)
        return Passed([b.row for b in branches], tokens, [0] * len(branches), first)

    def _own(self, cache: Any, branches: Sequence[Branch], standard: bool) -> AnswerTokens:
        """One pass behind ``cache``: of each branch its own tokens less the last one, which tell of those behind the
        first of its own; each (B, K)."""
        device = self.scorer.device
        place_B, kept_B1 = self._tensor([b.place for b in branches]), self._tensor([[b.kept] for b in branches])
        # what is shared stands next to what is not: some models count their windows by columns
        column_BS = torch.arange(-max(b.kept for b in branches), 0, device=device) + kept_B1
        own = [TokenRow(b.row.id, b.row.ids[b.kept :], 1, b.row.has_eos) for b in branches]
        batch = collate(own, range(len(own)), self.pad_id).to(device)
        mask_BK = batch.mask_BT[:, 1:]
        ids_BK = torch.where(mask_BK > 0, batch.ids_BT[:, :-1], batch.ids_BT[:, :1])
        position_BK = kept_B1 + torch.arange(ids_BK.shape[1], device=device)
        last_B1 = self._tensor([[b.kept + b.fed - 1] for b in branches])  # padding has no place of its own
        logits, _ = self.scorer.at(
            answer_places(batch.labels_BT), input_ids=ids_BK,
            attention_mask=torch.cat([(column_BS >= 0).to(mask_BK.dtype), mask_BK], dim=1),
            position_ids=position_BK.minimum(last_B1), past_key_values=picked(cache, place_B, column_BS.clamp(min=0)),
            use_cache=True,
        )  # fmt: skip
        looked_B = self._tensor([self._looks(Look.HITS, [b.row]) for b in branches])
        return answer_tokens(logits, batch.labels_BT, standard, looked_B)

    def _looks(self, look: Look, rows: Iterable[TokenRow]) -> bool:
        """Whether any of ``rows`` is looked at so closely."""
        return any(self.asked[row] >= look for row in rows)

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.tensor(values, device=self.scorer.device, dtype=dtype)
