"""Rows of text to rows of tokens to padded batches; only answer tokens carry loss.

Shape legend: B rows, T tokens of the longest row of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from gru_core.errors import InputError

IGNORE = -100
"""Label of a position without loss (prompt and padding), as Hugging Face has it."""


@dataclass(frozen=True)
class Row:
    """One row of text. ``prompt`` is empty for plain text, whose every token then carries loss.

    Attributes:
        id: stable name within its file or split, such as ``forget10:17``; safe to log.
        prompt: question, or prefix to complete.
        answer: text that is learned or forgotten.
        kind: ``qa`` (chat template or ``Question: ... Answer:``), ``completion`` (texts joined as they are)
            or ``text``.
    """

    id: str
    prompt: str
    answer: str
    kind: str = "qa"

    def __repr__(self) -> str:  # texts stay out of logs and error messages
        return f"Row({self.id!r}, kind={self.kind!r})"


@dataclass(frozen=True)
class TokenRow:
    """Token ids of one row.

    Attributes:
        ids: prompt and answer tokens, the closing end-of-sequence token included.
        prompt_length: how many of them are prompt (never less than 1: the first token has no predictor).
        has_eos: whether the last token is the closing end-of-sequence token.
    """

    id: str
    ids: tuple[int, ...]
    prompt_length: int
    has_eos: bool = True

    @property
    def answer_length(self) -> int:
        """Answer tokens, the closing token included: the ``|y|`` of the metrics."""
        return len(self.ids) - self.prompt_length

    def __repr__(self) -> str:  # token ids are texts too
        return f"TokenRow({self.id!r}, {len(self.ids)} tokens)"


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded rows.

    Attributes:
        ids_BT: token ids, int64.
        mask_BT: 1 on tokens, 0 on padding, int64.
        labels_BT: ids on answer tokens, ``IGNORE`` elsewhere, *not* shifted (``logprobs`` shifts).
        index_B: position of each row in its dataset, int64 (looks up reference losses).
    """

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    labels_BT: torch.Tensor
    index_B: torch.Tensor

    def to(self, device: torch.device) -> TokenBatch:
        move = (self.ids_BT, self.mask_BT, self.labels_BT, self.index_B)
        return TokenBatch(*(t.to(device, non_blocking=True) for t in move))


def prompt_and_answer(
    tokenizer: Any, row: Row, system_prompt: str | None = None, chat_date: str = "10 Apr 2025"
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer, the closing token included in the answer.

    Prompt and answer are tokenised apart, so that the border between them never moves with the answer's text:
    a truth ratio compares answers behind the *same* prompt tokens.

    Raises:
        InputError: the chat template does not keep the prompt as a prefix.
    """
    prompt, answer = _texts(tokenizer, row, system_prompt, chat_date)
    ids = _ids(tokenizer, (prompt, answer))
    start, end = _ends(tokenizer, row.kind)
    return start + ids[prompt], ids[answer] + end


def _texts(tokenizer: Any, row: Row, system_prompt: str | None, chat_date: str) -> tuple[str, str]:
    """What is tokenised of the prompt and of the answer."""
    if row.kind != "qa":
        return row.prompt, row.answer
    if tokenizer.chat_template:
        return _chat(tokenizer, row, system_prompt, chat_date)
    return f"Question: {row.prompt}\nAnswer:", f" {row.answer}"


def _ids(tokenizer: Any, texts: Iterable[str]) -> dict[str, list[int]]:
    """Tokens of each distinct text, in one call of the tokenizer, without special tokens."""
    distinct = [text for text in dict.fromkeys(texts) if text]
    options = {"add_special_tokens": False, "return_attention_mask": False}
    found = tokenizer(distinct, **options)["input_ids"] if distinct else []
    return {"": []} | dict(zip(distinct, found, strict=True))


def _ends(tokenizer: Any, kind: str) -> tuple[list[int], list[int]]:
    """The first and the closing token of a row of this kind, where no chat template puts them there."""
    if kind == "qa" and tokenizer.chat_template:
        return [], []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [bos] if bos is not None else [], [eos] if eos is not None else []


def _chat(tokenizer: Any, row: Row, system_prompt: str | None, chat_date: str) -> tuple[str, str]:
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    asked = [*system, {"role": "user", "content": row.prompt}]
    told = [*asked, {"role": "assistant", "content": row.answer}]
    options = {"tokenize": False, "date_string": chat_date}
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template(told, **options)
    if not whole.startswith(prompt):
        raise InputError("the tokenizer's chat template does not keep the prompt as a prefix of the conversation")
    return prompt, whole[len(prompt) :].rstrip()  # some templates end a turn with a newline behind the closing token


def encode(
    tokenizer: Any,
    row: Row,
    max_length: int,
    system_prompt: str | None = None,
    chat_date: str = "10 Apr 2025",
) -> TokenRow:
    """One row as tokens, cut on the right at ``max_length``.

    Raises:
        InputError: nothing of the answer is left to carry loss.
    """
    return encode_all(tokenizer, [row], max_length, system_prompt, chat_date)[0]


def encode_all(
    tokenizer: Any,
    rows: Sequence[Row],
    max_length: int,
    system_prompt: str | None = None,
    chat_date: str = "10 Apr 2025",
) -> list[TokenRow]:
    """:func:`encode` of many rows in one call of the tokenizer; what several rows ask is tokenised once.

    Raises:
        InputError: nothing of an answer is left to carry loss.
    """
    texts = [_texts(tokenizer, row, system_prompt, chat_date) for row in rows]
    ids = _ids(tokenizer, chain.from_iterable(texts))
    specials = set(tokenizer.all_special_ids)
    ends = {kind: _ends(tokenizer, kind) for kind in {row.kind for row in rows}}
    return [
        _cut(row, ends[row.kind][0] + ids[prompt], ids[answer] + ends[row.kind][1], max_length, specials)
        for row, (prompt, answer) in zip(rows, texts, strict=True)
    ]


def _cut(row: Row, prompt_ids: list[int], answer_ids: list[int], max_length: int, specials: set[int]) -> TokenRow:
    ids = (prompt_ids + answer_ids)[:max_length]
    prompt_length = max(1, len(prompt_ids))
    if len(ids) <= prompt_length:
        raise InputError(f"row {row.id}: no answer token within {max_length} tokens (prompt {len(prompt_ids)})")
    whole = len(ids) == len(prompt_ids) + len(answer_ids)
    return TokenRow(row.id, tuple(ids), prompt_length, has_eos=whole and ids[-1] in specials)


def encode_whole(
    tokenizer: Any,
    row: Row,
    max_length: int,
    system_prompt: str | None = None,
    chat_date: str = "10 Apr 2025",
) -> tuple[TokenRow, ...]:
    """One row as tokens to train on: a ``text`` longer than ``max_length`` becomes several, so that none of it is lost.

    Every piece but the last has ``max_length`` tokens. Each begins with the beginning-of-sequence token, as MUSE cuts
    its texts (arXiv 2407.06460), or, where the tokenizer has none, with the last token of the piece before as context:
    either way every token but a text's very first carries loss once. Pieces keep the row's id. Rows of other kinds
    are cut, as :func:`encode` cuts them: what lies behind the cut of an answer has no question of its own.

    Raises:
        InputError: as :func:`encode`, or ``max_length`` is below 2.
    """
    if row.kind != "text":
        return (encode(tokenizer, row, max_length, system_prompt, chat_date),)
    start, tokens = prompt_and_answer(tokenizer, row)
    if len(start) + len(tokens) <= max_length:
        return (encode(tokenizer, row, max_length),)
    room = max_length - 1
    if room < 1:
        raise InputError(f"row {row.id}: a piece of text needs at least 2 tokens, the model takes {max_length}")
    if not start:
        start, tokens = tokens[:1], tokens[1:]
    closed = tokens[-1] in set(tokenizer.all_special_ids)
    pieces = []
    for begin in range(0, len(tokens), room):
        before = start if begin == 0 or tokenizer.bos_token_id is not None else [tokens[begin - 1]]
        ids = (*before, *tokens[begin : begin + room])
        pieces.append(TokenRow(row.id, ids, 1, has_eos=closed and begin + room >= len(tokens)))
    return tuple(pieces)


def collate(rows: Sequence[TokenRow], index: Sequence[int], pad_id: int) -> TokenBatch:
    """Rows to one right-padded batch on the CPU. ``index`` gives each row's position in its dataset."""
    T = max(len(r.ids) for r in rows)
    ids_BT = torch.tensor([(*r.ids, *(pad_id,) * (T - len(r.ids))) for r in rows])
    length_B1 = torch.tensor([[len(r.ids)] for r in rows])
    prompt_B1 = torch.tensor([[r.prompt_length] for r in rows])
    column_T = torch.arange(T)
    mask_BT = column_T < length_B1
    labels_BT = ids_BT.where(mask_BT & (column_T >= prompt_B1), torch.tensor(IGNORE))
    return TokenBatch(ids_BT, mask_BT.long(), labels_BT, torch.tensor(index, dtype=torch.int64))


class Stream:
    """The endless, seeded order of one dataset's rows; any step's rows are known without the steps before.

    An epoch is a permutation drawn from (seed, name, epoch); batches run across epoch borders, so no row is
    dropped and none is padded in. The order does not depend on the number of workers.

    Args:
        size: rows in the dataset, at least 1.
        batch_size: rows per optimizer step, over all workers.
        name: ``forget`` and ``retain`` draw from separate random streams.
    """

    def __init__(self, size: int, batch_size: int, seed: int, name: str) -> None:
        self.size, self.batch_size = size, batch_size
        self._key = (seed, *name.encode())
        self._epochs: dict[int, list[int]] = {}

    def _epoch(self, number: int) -> list[int]:
        if number not in self._epochs:
            import numpy as np

            if len(self._epochs) > 4:  # small: only the epochs that the current batch touches
                self._epochs.clear()
            random = np.random.default_rng([*self._key, number])
            self._epochs[number] = random.permutation(self.size).tolist()
        return self._epochs[number]

    def rows(self, step: int) -> list[int]:
        """Dataset positions of the global batch of ``step`` (from 0), length ``batch_size``."""
        start = step * self.batch_size
        places = range(start, start + self.batch_size)
        return [self._epoch(i // self.size)[i % self.size] for i in places]
