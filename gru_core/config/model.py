"""The model that is to forget, and the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gru_core.config.checks import STRICT, check, finite


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): the model's own weights are frozen, the adapters are trained."""

    __pydantic_config__ = STRICT
    rank: int = 16
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """On the adapter's input; active only with ``unlearn.dropout``."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, such as ``q_proj``; empty: all in the transformer blocks."""

    def __post_init__(self) -> None:
        check(self.rank >= 1, "model.lora.rank", self.rank, "a whole number from 1")
        check(finite(self.alpha) and self.alpha > 0, "model.lora.alpha", self.alpha, "a number above 0")
        ok = finite(self.dropout) and 0 <= self.dropout < 1
        check(ok, "model.lora.dropout", self.dropout, "a number from 0, below 1")


@dataclass(frozen=True)
class ModelConfig:
    """The model that is to forget."""

    __pydantic_config__ = STRICT
    path: str = "prepared"
    """A local folder, a hub id, or ``prepared``: the target model that ``gru prepare`` makes (and caches)."""
    dtype: Literal["float32", "bfloat16", "pure_bfloat16"] = "float32"
    """Compute type. ``bfloat16`` computes in bf16 over float32 weights, gradients and optimizer state;
    ``pure_bfloat16`` stores everything in bf16 too: small updates are then lost, and a warning says so."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer of models whose own folders have none (those of MUSE); it serves the retain
    model too. Null: each model's own."""
    lora: LoraConfig | None = None
    """Train low-rank adapters; null: all parameters. With ``bfloat16`` the frozen weights are stored in bf16."""
    system_prompt: str | None = None
    """System message, for tokenizers with a chat template."""
    chat_date: str = "10 Apr 2025"
    """The date that templates with a clock are given, so that a prompt is the same every day."""

    def __post_init__(self) -> None:
        check(bool(self.path), "model.path", self.path, "a folder, a hub id or 'prepared'")
        dtypes = ("float32", "bfloat16", "pure_bfloat16")
        check(self.dtype in dtypes, "model.dtype", self.dtype, ", ".join(dtypes))


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is to be forgotten, what is to be kept, and the rows that score both."""

    __pydantic_config__ = STRICT
    name: str = "authors"
    """``authors`` (built in), ``tofu``, ``muse``, ``wmdp`` or ``jsonl``."""
    split: str = "forget10"
    """Forget split: of ``authors`` and ``tofu``, ``forget01``, ``forget05`` or ``forget10``; of ``muse``, ``news`` or
    ``books``, with ``/scal_1`` to ``/scal_4`` (larger and larger forget sets) or ``/sust_1`` to ``/sust_4`` (one
    request after the other) behind it; of ``wmdp``, ``bio`` or ``cyber``, which keep general text, or ``bio-corpora``
    or ``cyber-corpora``, which keep its retain corpora."""
    data_dir: str | None = None
    """``tofu``: a local folder of its JSON files; null loads ``locuslab/TOFU`` from the hub. ``muse``: a local folder
    of ``<subset>/<split>`` files (JSON or Parquet); null loads ``muse-bench/MUSE-News`` or ``-Books``. ``wmdp``: a
    local folder of ``NAME.jsonl`` files with a column ``text`` (``cyber-forget-corpus.jsonl``, ``wikitext.jsonl``)."""
    forget: str | None = None
    """``jsonl``: file of rows to forget."""
    retain: str | None = None
    """``jsonl``: file of rows to keep."""
    holdout: str | None = None
    """``jsonl``: file of rows like those to forget that the model has never seen (membership inference); null: none."""
    retain_rows: int | None = None
    """Keep only the first n rows of the retain set (named ``retain-first-n`` in results); null: all."""
    seed: int = 0
    """``authors``: seed of the generated biographies."""

    def __post_init__(self) -> None:
        rows = self.retain_rows
        check(rows is None or rows >= 1, "benchmark.retain_rows", rows, "null or a whole number from 1")
