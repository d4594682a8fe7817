"""Scored rows as tokens, kept for as long as the tokenizer lives: a search evaluates the same rows many times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from gru_core.batch import Row, TokenRow, encode
from gru_core.benchmarks.base import EvalRow
from gru_core.config import ModelConfig


@dataclass(frozen=True)
class EncodedRow:
    """The answers of one scored row, each behind the same prompt tokens."""

    answer: TokenRow
    paraphrase: TokenRow | None
    perturbed: tuple[TokenRow, ...]


_CACHE: WeakKeyDictionary[Any, dict[Any, EncodedRow]] = WeakKeyDictionary()


def encode_row(tokenizer: Any, row: EvalRow, max_length: int, config: ModelConfig, with_truth: bool) -> EncodedRow:
    """``row`` as tokens, cut at ``max_length``; paraphrase and wrong answers only ``with_truth``.

    Raises:
        InputError: an answer has no token left within ``max_length``.
    """
    specials = (tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id)
    key = (row, max_length, config.system_prompt, config.chat_date, with_truth, specials)
    known = _CACHE.setdefault(tokenizer, {})
    if key not in known:

        def tokens(answer: str) -> TokenRow:
            text = Row(row.id, row.prompt, answer, row.kind)
            return encode(tokenizer, text, max_length, config.system_prompt, config.chat_date)

        known[key] = EncodedRow(
            tokens(row.answer),
            tokens(row.paraphrase) if with_truth and row.paraphrase is not None else None,
            tuple(map(tokens, row.perturbed)) if with_truth else (),
        )
    return known[key]
