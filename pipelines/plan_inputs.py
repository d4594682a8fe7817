"""What ``gru plan`` reads: a model's settings and, where its tokenizer is there, the lengths of the training rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gru_core import models
from gru_core.config import RunConfig
from gru_core.errors import ConfigError, InputError
from pipelines import prepare

TOKENS = 256
"""Tokens of a row where the rows cannot be tokenised here."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the training rows.

    Attributes:
        rows: tokens of each row.
        answer: answer tokens of the row with most of them.
        source: where they come from, one line.
    """

    rows: tuple[int, ...]
    answer: int
    source: str

    @property
    def mean(self) -> float:
        return sum(self.rows) / len(self.rows)

    @property
    def longest(self) -> int:
        return max(self.rows)

    def padded(self, batch: int) -> float:
        """Expected tokens of the longest of ``batch`` rows drawn at random: what each of them is padded to."""
        n = len(self.rows)
        return sum(t * ((i + 1) ** batch - i**batch) / n**batch for i, t in enumerate(sorted(self.rows)))


def settings(config: RunConfig) -> tuple[Any, list[str]]:
    """The Hugging Face settings of the model that ``config`` names, and what is to be said of them.

    ``model.path`` may also be a ``config.json`` itself; no weights are needed.

    Raises:
        InputError: they cannot be read.
    """
    path = config.model.path
    if path != "prepared":
        return _read(path, "model.path"), []
    target = prepare.folders(config).target
    if target.is_dir():
        return models.load_settings(str(target)), []
    recipe = config.prepare
    if recipe.base is not None:
        return _read(recipe.base, "prepare.base"), []
    from transformers import LlamaConfig

    shape = LlamaConfig(
        vocab_size=recipe.vocab_size, hidden_size=recipe.hidden, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads, intermediate_size=recipe.intermediate,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return shape, [f"not prepared yet: prepare.vocab_size ({recipe.vocab_size}) stands for the vocabulary"]


def _read(path: str, field: str) -> Any:
    file = Path(path).expanduser()
    if not file.is_file():
        return models.load_settings(path, field)
    from transformers import AutoConfig

    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(**tree)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{field}: {path!r} is no config.json of a Hugging Face model: {first}") from error


def lengths(config: RunConfig, shape: Any, tokens: int | None) -> Lengths:
    """Lengths of forget and retain rows under the model's tokenizer; ``tokens`` a row where that is given.

    Without tokenizer or rows a row has 256 tokens, and all of a row counts as answer.

    Raises:
        InputError: ``tokens`` is more than the model takes.
    """
    limit = models.max_length_of(shape)
    if tokens is not None and not 2 <= tokens <= limit:
        raise ConfigError("--tokens", tokens, f"2 to {limit}, the longest row that the model takes")
    if tokens is not None:
        return Lengths((tokens,), tokens, f"rows of {tokens} tokens, all of them answer, as --tokens says")
    tokenizer = _tokenizer(config)
    if tokenizer is None:
        short = min(TOKENS, limit)
        return Lengths((short,), short, f"rows of {short} tokens are assumed, no tokenizer is there: see --tokens")
    from gru_core.batch import encode_whole
    from gru_core.benchmarks import load_benchmark

    model = config.model
    try:
        benchmark = load_benchmark(config.benchmark)
    except InputError as error:  # a plan needs lengths, not rows
        short = min(TOKENS, limit)
        return Lengths((short,), short, f"rows of {short} tokens are assumed (see --tokens): {error}")
    rows = [
        piece
        for row in benchmark.forget + benchmark.retain
        for piece in encode_whole(tokenizer, row, limit, model.system_prompt, model.chat_date)
    ]
    answer = max(row.answer_length for row in rows)
    return Lengths(tuple(len(row.ids) for row in rows), answer, f"token counts are those of {benchmark.name}")


def _tokenizer(config: RunConfig) -> Any:
    """The model's tokenizer, None where there is none."""
    path = config.model.tokenizer or config.model.path
    if path == "prepared":
        target = prepare.folders(config).target
        path = str(target) if target.is_dir() else config.prepare.base or ""
    folder = Path(path).expanduser()
    local = not path or folder.exists() or path.count("/") != 1
    if local and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=local)
    except (OSError, ValueError, KeyError):
        return None


def generates(config: RunConfig) -> bool:
    """Whether an evaluation generates text."""
    from gru_core.metrics.generations import GENERATIONS

    return bool(_kinds(config) & set(GENERATIONS))


def compares(config: RunConfig) -> bool:
    """Whether an evaluation looks at several answers to one prompt."""
    from gru_core.metrics import lm_eval_tasks, requested

    choices = any(name.startswith(lm_eval_tasks.PREFIX) for name in requested(config.evaluate))
    return choices or "truth" in _kinds(config)


def _kinds(config: RunConfig) -> set[str]:
    """What evaluations measure on rows."""
    from gru_core.metrics import METRICS, requested

    named = [METRICS[name] for name in requested(config.evaluate) if name in METRICS]
    return {need.kind for metric in named for need in metric.needs}
