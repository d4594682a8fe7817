"""Scored rows as tokens, kept for as long as the tokenizer lives: a search evaluates the same rows many times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from gru_core.batch import Row, TokenRow, encode_all
from gru_core.benchmarks.base import EvalRow
from gru_core.config import ModelConfig


@dataclass(frozen=True)
class EncodedRow:
    """The answers of one scored row, each behind the same prompt tokens."""

    answer: TokenRow
    paraphrase: TokenRow | None
    perturbed: tuple[TokenRow, ...]


_CACHE: WeakKeyDictionary[Any, dict[Any, EncodedRow]] = WeakKeyDictionary()


def encode_rows(
    tokenizer: Any, wanted: Iterable[tuple[EvalRow, bool]], max_length: int, config: ModelConfig
) -> list[EncodedRow]:
    """Rows as tokens, cut at ``max_length``; paraphrase and wrong answers only where a row is wanted with them.

    Raises:
        InputError: an answer has no token left within ``max_length``.
    """
    specials = (tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id)
    settings = (max_length, config.system_prompt, config.chat_date, specials)
    known = _CACHE.setdefault(tokenizer, {})
    keys = [(row, truth, settings) for row, truth in wanted]
    new = [key for key in dict.fromkeys(keys) if key not in known]
    rows = [Row(row.id, row.prompt, text, row.kind) for row, truth, _ in new for text in _answers(row, truth)]
    found = iter(encode_all(tokenizer, rows, max_length, config.system_prompt, config.chat_date))
    for key in new:
        row, truth, _ = key
        answer = next(found)
        paraphrase = next(found) if truth and row.paraphrase is not None else None
        known[key] = EncodedRow(answer, paraphrase, tuple(next(found) for _ in (row.perturbed if truth else ())))
    return [known[key] for key in keys]


def _answers(row: EvalRow, truth: bool) -> list[str]:
    """All that are wanted of ``row``, the true one first, then its paraphrase where it has one."""
    paraphrase = [row.paraphrase] if row.paraphrase is not None else []
    return [row.answer, *paraphrase, *row.perturbed] if truth else [row.answer]
