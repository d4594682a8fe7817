"""Greedy generation: batched, left padding, key-value cache, rows dropped from the batch as they end.

Where the true answer went through the model already, that pass tells how far generation follows it, and the first token
that leaves it: generation goes on from there, and what a model knows by heart is not generated at all.

An own loop and not ``model.generate``: that one takes defaults of the model's folder along (repetition penalty,
forced tokens), and goes on with logits that are not numbers. Shape legend: B rows, S prompt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from gru_core.errors import InputError
from gru_core.metrics.scorer import Scorer

_ENDED = -1


@torch.no_grad()
def greedy(
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    batch_rows: int,
    begun: Sequence[Sequence[int]] | None = None,
    halt: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """Arg-max continuation of each prompt, in order; stop tokens are left out.

    A row ends at a token of ``stop``, after ``max_new_tokens``, where the model's positions end, at logits that are
    not finite, or behind a token with which ``halt`` of all its tokens so far is true.

    Args:
        begun: the first tokens of each continuation, where they are known; a row that ends in them is done.

    Raises:
        InputError: the model has no key-value cache.
    """
    begun = [tokens[:max_new_tokens] for tokens in begun or [()] * len(prompts)]
    out, known = [_until(tokens, stop) for tokens in begun], list(map(len, begun))
    left = [i for i in range(len(prompts)) if len(out[i]) == known[i] < max_new_tokens]
    order = sorted(left, key=lambda i: -(len(prompts[i]) + known[i]))  # alike lengths: little padding
    for start in range(0, len(order), batch_rows):
        chosen = order[start : start + batch_rows]
        rest = max_new_tokens - min(known[i] for i in chosen)
        batch = _Batch(scorer, [[*prompts[i], *out[i]] for i in chosen], pad_id, rest)
        for place, tokens in zip(chosen, batch.run(stop, halt), strict=True):
            out[place] += tokens[: max_new_tokens - known[place]]
    return out


def _until(tokens: Sequence[int], stop: Collection[int]) -> list[int]:
    """``tokens`` before the first one that ends a row."""
    return next((list(tokens[:i]) for i, token in enumerate(tokens) if token in stop), list(tokens))


class _Batch:
    """One batch on its way. ``rows`` are the places in the batch of the rows still carried along."""

    def __init__(self, scorer: Scorer, prompts: Sequence[Sequence[int]], pad_id: int, max_new: int) -> None:
        self.forward, self.device, self.pad_id = scorer.forward, scorer.device, pad_id
        model = scorer.model
        if not scorer.takes("past_key_values"):
            raise InputError(f"generation needs a model with a key-value cache, got {type(model).__name__}")
        self.takes = {name for name in ("position_ids", "logits_to_keep") if scorer.takes(name)}
        B, S = len(prompts), max(map(len, prompts))
        ids_BS = torch.full((B, S), pad_id)
        self.mask = torch.zeros((B, S + max_new), dtype=torch.int64)
        for b, prompt in enumerate(prompts):
            ids_BS[b, S - len(prompt) :] = torch.tensor(prompt)
            self.mask[b, S - len(prompt) :] = 1
        self.last_position = (getattr(model.config, "max_position_embeddings", None) or S + max_new) - 1
        self.ids, self.mask = ids_BS.to(self.device), self.mask.to(self.device)
        self.positions = (self.mask[:, :S].cumsum(1) - 1).clamp(min=0)
        self.rows = torch.arange(B, device=self.device)
        self.tokens = torch.full((B, max_new), _ENDED, device=self.device)
        self.width = S
        self.cache: Any = None

    def run(self, stop: Collection[int], halt: Callable[[Sequence[int]], bool] | None) -> list[list[int]]:
        stops = torch.tensor(sorted(stop), device=self.device, dtype=torch.int64)
        ended = torch.zeros_like(self.rows, dtype=torch.bool)
        for step in range(self.tokens.shape[1]):
            top, token = self._next_logits().max(dim=-1)
            token = token.masked_fill(~torch.isfinite(top), _ENDED)
            ended |= torch.isin(token, stops) | (token == _ENDED)
            self.tokens[self.rows, step] = token.masked_fill(ended, _ENDED)
            if halt is not None:
                made = self.tokens[self.rows, : step + 1].tolist()
                said = [over or halt(row) for over, row in zip(ended.tolist(), made, strict=True)]
                ended = torch.tensor(said, device=self.device)
            # the token just made is fed at the next position, if there is one
            ended |= self.positions[:, -1] >= self.last_position
            count = int(ended.sum())
            if count == len(ended):
                break
            self.ids = token.masked_fill(ended, self.pad_id)[:, None]
            self.positions = (self.positions[:, -1:] + 1).clamp(max=self.last_position)
            self.width += 1
            if 4 * count >= len(ended):
                ended = self._drop(ended)
        return [_until_ended(row) for row in self.tokens.tolist()]

    def _next_logits(self) -> torch.Tensor:
        """Logits (B, V) of the next token; grows the cache by the tokens fed."""
        options: dict[str, Any] = {"position_ids": self.positions, "logits_to_keep": 1}
        out = self.forward(
            input_ids=self.ids,
            attention_mask=self.mask_so_far(),
            past_key_values=self.cache,
            use_cache=True,
            **{k: v for k, v in options.items() if k in self.takes},
        )
        self.cache = out.past_key_values
        return out.logits[:, -1]

    def mask_so_far(self) -> torch.Tensor:
        return self.mask[:, : self.width]

    def _drop(self, ended: torch.Tensor) -> torch.Tensor:
        """Leave the rows that ended behind: the rest is cheaper to carry on."""
        if not hasattr(self.cache, "batch_select_indices"):
            return ended
        keep = (~ended).nonzero().squeeze(1)
        self.cache.batch_select_indices(keep)
        self.rows, self.mask, self.ids = self.rows[keep], self.mask[keep], self.ids[keep]
        self.positions = self.positions[keep]
        return ended[keep]


def _until_ended(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(_ENDED)] if _ENDED in tokens else tokens
