"""Kinds of greedy generations: how long each is, and what it is scored by.

``rouge`` is TOFU's (arXiv 2401.06121); ``continuation`` (verbatim memorisation) and ``reply`` (knowledge
memorisation) are MUSE's (arXiv 2407.06460, section 3.1), with the lengths and cuts of its published code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from gru_core.metrics.base import Convention, Kind
from gru_core.metrics.rouge import rouge_l_f1, rouge_l_recall

CONTINUATION, REPLY = 128, 32
"""Tokens of a continuation and of a reply."""

ENDS = ("\n\n", "\nQuestion", "Question:")
"""What ends a reply behind worked examples: a blank line, or the next question."""


class Made(NamedTuple):
    """A generated text and its scores: ROUGE-L recall, ROUGE-L F1; None where its kind has none."""

    text: str
    rouge: float | None = None
    f1: float | None = None

    def joined(self, other: Made | None) -> Made:
        """The text with the scores of both: those of another kind on the same row."""
        if other is None:
            return self
        rouge = other.rouge if self.rouge is None else self.rouge
        return Made(other.text, rouge, other.f1 if self.f1 is None else self.f1)


Score = Callable[[Any, str, str, Convention], Made]
"""Of tokenizer, true answer and generated text."""


@dataclass(frozen=True)
class Generation:
    """One kind; ``new_tokens`` is its greatest length, None: ``evaluate.max_new_tokens``."""

    score: Score
    new_tokens: int | None = None


def _recall(tokenizer: Any, answer: str, text: str, convention: Convention) -> Made:
    return Made(text, rouge=rouge_l_recall(answer, text))


def continuation(tokenizer: Any, answer: str, text: str, convention: Convention) -> Made:
    """F1 against the true continuation: MUSE cuts it to as many tokens as are generated, a beginning-of-sequence token
    that the tokenizer puts in front counted, and does not stem; OpenUnlearning stems and does not cut."""
    if convention == "openunlearning":
        return Made(text, f1=rouge_l_f1(answer, text, stem=True))
    ids = tokenizer(answer, add_special_tokens=True).input_ids[:CONTINUATION]
    return Made(text, f1=rouge_l_f1(tokenizer.decode(ids, skip_special_tokens=True), text, stem=False))


def reply(tokenizer: Any, answer: str, text: str, convention: Convention) -> Made:
    """F1 of what stands before the first of :data:`ENDS`; OpenUnlearning stems."""
    for end in ENDS:
        text = text.split(end)[0]
    return Made(text, f1=rouge_l_f1(answer, text, stem=convention == "openunlearning"))


GENERATIONS: dict[Kind, Generation] = {
    "rouge": Generation(_recall),
    "continuation": Generation(continuation, CONTINUATION),
    "reply": Generation(reply, REPLY),
}
