"""The model that is evaluated as lm-eval asks for it: its requests on this project's own passes, spread over the ranks.

Every rank gets the same requests, takes its share of the prompts, and has all answers in the end. Tokens are those of
lm-eval's ``HFLM``, so that its numbers are. Imports lm-eval: import it late.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gru_core.batch import TokenRow
from gru_core.errors import InputError
from gru_core.metrics.forced import teacher_forced
from gru_core.metrics.generate import greedy
from gru_core.metrics.lm_eval_load import LENGTHS
from gru_core.metrics.measure import pad_id, scoring, stop_tokens
from gru_core.metrics.passes import Look
from gru_core.metrics.scorer import Scorer
from gru_core.metrics.subject import Subject
from gru_core.parallel import unwrap

DEFAULT_LENGTH, DEFAULT_NEW_TOKENS = 2048, 256
"""Tokens that a model takes where neither it nor its tokenizer says, and new ones where a task does not say."""
UNLIMITED = 10**20
"""A tokenizer's ``model_max_length`` from here on means that none was set."""

Answer = tuple[float, bool]
"""Log-likelihood of a continuation, nats, and whether it is the greedy one."""


class Ask(NamedTuple):
    """One generation: prompt tokens, most new tokens, and the texts that end it."""

    prompt: tuple[int, ...]
    most: int
    until: tuple[str, ...]


class Adapter(TemplateLM):
    """:class:`~gru_core.metrics.subject.Subject` as a language model of lm-eval.

    Args:
        name: the metric, for messages.
    """

    def __init__(self, subject: Subject, name: str) -> None:
        super().__init__()
        self.subject, self.name, self.tokenizer = subject, name, subject.tokenizer
        self._known: dict[str, list[int]] = {}

    # ------------------------------------------------------------------------------------------- as HFLM has it

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Longest input, tokens."""
        settings = unwrap(self.subject.model).config
        settings = getattr(settings, "text_config", None) or settings
        for name in ("n_positions", "max_position_embeddings", "n_ctx"):
            if found := getattr(settings, name, None):
                return int(found)
        of_tokenizer = self.subject.tokenizer.model_max_length
        return DEFAULT_LENGTH if of_tokenizer >= UNLIMITED else int(of_tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; special ones as the tokenizer adds them, unless the text starts with one."""
        tokenizer = self.subject.tokenizer
        if add_special_tokens is None and string.startswith(tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = tokenizer.encode(string, **options)
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's, a context that many continuations share tokenised once."""
        stripped = context.rstrip()
        if stripped not in self._known:
            self._known[stripped] = self.tok_encode(stripped)
        before = self._known[stripped]
        return before, self.tok_encode(context + continuation)[len(before) :]

    # ------------------------------------------------------------------------------------------------- requests

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        """Log-likelihood of each continuation behind its context; contexts too long are cut on the left."""
        try:
            found: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
            return found
        finally:
            self._known.clear()

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's length that overlap in one token."""
        windows: list[list[tuple[list[int], list[int]]]] = []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            windows.append([make_disjoint_window(window) for window in rolling])
        found = iter(self._loglikelihood_tokens([(("", ""), *window) for each in windows for window in each]))
        return [sum(next(found)[0] for _ in each) for each in windows]

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[Answer]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        behind: dict[tuple[int, ...], dict[TokenRow, None]] = {}
        for row in rows:
            behind.setdefault(row.ids[: row.prompt_length], {})[row] = None
        subject = self.subject
        mine = subject.group.share(list(behind.values()))
        with scoring(subject.model, subject.model_config, subject.group) as scorer:
            asked = dict.fromkeys((row for together in mine for row in together), Look.HITS)
            found = teacher_forced(scorer, asked, pad_id(self.tokenizer), subject.config.batch_rows)
        known = [[(-found[row].scores.nll, found[row].led == row.answer_length) for row in each] for each in mine]
        answers: dict[TokenRow, Answer] = {}
        for together, numbers in zip(behind.values(), subject.group.gather_shared(known), strict=True):
            answers |= zip(together, numbers, strict=True)
        return [answers[row] for row in rows]

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> TokenRow:
        """Both, cut on the left: the last token is not fed, so they may be one longer than the model takes."""
        if not 0 < len(continuation) <= self.max_length:
            allowed = f"1 to {self.max_length}, what the model takes"
            raise InputError(f"{self.name}: an answer has {len(continuation)} tokens, allowed: {allowed}")
        ids = (*context, *continuation)[-(self.max_length + 1) :]
        return TokenRow("", ids, len(ids) - len(continuation), has_eos=False)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuation of each prompt, to the first of its end texts; prompts too long are cut on the left."""
        subject = self.subject
        asks = [self._ask(*request.args) for request in requests]
        mine = subject.group.share(list(dict.fromkeys(asks)))
        with scoring(subject.model, subject.model_config, subject.group) as scorer:
            if not scorer.takes("past_key_values"):
                raise InputError(f"{self.name}: generation needs a model with a key-value cache")
            made = self._made(scorer, mine)
        texts = dict(zip(dict.fromkeys(asks), subject.group.gather_shared([made[ask] for ask in mine]), strict=True))
        return [texts[ask] for ask in asks]

    def _ask(self, context: str, options: Mapping[str, Any]) -> Ask:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        given = [options[name] for name in LENGTHS if options.get(name) is not None]
        most = int(given[0]) if given else DEFAULT_NEW_TOKENS
        room = self.max_length - most
        if room <= 0:
            raise InputError(f"{self.name}: generates {most} tokens, the model takes {self.max_length} in all")
        eos = self.subject.tokenizer.decode(self.eot_token_id)
        prompt = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        return Ask(tuple(prompt), most, tuple(text for text in dict.fromkeys((*until, eos)) if text))

    def _made(self, scorer: Scorer, asks: Sequence[Ask]) -> dict[Ask, str]:
        made: dict[Ask, str] = {}
        tokenizer = self.subject.tokenizer
        key: Callable[[Ask], tuple[int, tuple[str, ...]]] = lambda ask: (ask.most, ask.until)  # noqa: E731
        for (most, until), alike in groupby(sorted(asks, key=key), key=key):
            together = list(alike)
            found = greedy(
                scorer, [ask.prompt for ask in together], stop=stop_tokens(scorer.model, tokenizer),
                pad_id=pad_id(tokenizer), max_new_tokens=most, batch_rows=self.subject.config.batch_rows,
                halt=self._halt(until),
            )  # fmt: skip
            texts = tokenizer.batch_decode(found, skip_special_tokens=True)
            made |= {ask: _before(text, until) for ask, text in zip(together, texts, strict=True)}
        return made

    def _halt(self, until: Sequence[str]) -> Callable[[Sequence[int]], bool]:
        """Whether one of the end texts stands in the last tokens; two more of them than it takes, for a model may
        write it in other tokens than the tokenizer does."""
        tokenizer = self.subject.tokenizer
        last = 2 + max((len(tokenizer.encode(text, add_special_tokens=False)) for text in until), default=0)

        def halt(tokens: Sequence[int]) -> bool:
            text = tokenizer.decode(tokens[-last:])
            return any(end in text for end in until)

        return halt


def _before(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end)[0]
    return text
