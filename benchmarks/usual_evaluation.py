"""The usual way to evaluate TOFU: a metric at a time, an answer at a time. For ``benchmarks/evaluate.py`` alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer

from gru_core import models
from gru_core.batch import IGNORE, Row, encode
from gru_core.benchmarks.base import Benchmark, EvalRow

SETS = ("forget", "retain", "authors", "facts")


class Usual:
    """One metric after the other, one answer at a time.

    Args:
        batch: rows of a batch.
        new_tokens: the most that a generation has.
        shared: make the pass over an answer once for all metrics that read it.
    """

    def __init__(self, model: Any, tokenizer: Any, batch: int, new_tokens: int, shared: bool) -> None:
        self.model, self.tokenizer, self.shared = model, tokenizer, shared
        self.batch, self.new_tokens = batch, new_tokens
        self.rouge_l = RougeScorer(["rougeL"], use_stemmer=True)
        self.length = models.max_length(model)
        self.made: dict[str, list[float]] = {}
        self.hit: dict[str, list[list[bool]]] = {}

    def batches(self, rows: Sequence[EvalRow]) -> Iterator[Sequence[EvalRow]]:
        for start in range(0, len(rows), self.batch):
            yield rows[start : start + self.batch]

    def logits(self, rows: Sequence[tuple[EvalRow, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 logits of all positions that predict, and what they are to predict, off the answer ``IGNORE``."""
        encoded = [encode(self.tokenizer, Row(r.id, r.prompt, a, r.kind), self.length) for r, a in rows]
        T = max(len(e.ids) for e in encoded)
        ids = torch.zeros((len(rows), T), dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
        for b, e in enumerate(encoded):
            ids[b, : len(e.ids)] = torch.tensor(e.ids)
            mask[b, : len(e.ids)] = 1
            labels[b, e.prompt_length : len(e.ids)] = ids[b, e.prompt_length : len(e.ids)]
        with torch.no_grad():
            out = self.model(input_ids=ids, attention_mask=mask).logits.float()
        return out[:, :-1], labels[:, 1:]

    def nll(self, rows: Sequence[EvalRow], name: str, answer: Callable[[EvalRow], str]) -> list[float]:
        """Mean NLL of an answer of each row. The cross-entropy is called as TOFU's and OpenUnlearning's code does."""
        if self.shared and name in self.made:
            return self.made[name]
        found = self.made[name] = []
        hits = self.hit[name] = []
        for batch in self.batches(rows):
            logits, labels = self.logits([(row, answer(row)) for row in batch])
            each = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none"
            )
            found += (each.sum(1) / (labels != IGNORE).sum(1)).tolist()
            if self.shared and name in ("forget answer", "retain answer"):
                hits += _hits(logits, labels)
        return found

    def wrong(self, rows: Sequence[EvalRow], name: str) -> list[tuple[float, ...]]:
        """Mean NLL of each wrong answer of each row."""
        count = len(rows[0].perturbed)
        columns = [self.nll(rows, f"{name} wrong {k}", lambda r, k=k: r.perturbed[k]) for k in range(count)]  # type: ignore[misc]
        return list(zip(*columns, strict=True))

    def hits(self, rows: Sequence[EvalRow], name: str) -> list[list[bool]]:
        """Arg-max hits of the true answer's tokens before the closing one."""
        if self.shared:
            return self.hit[f"{name} answer"]
        found: list[list[bool]] = []
        for batch in self.batches(rows):
            found += _hits(*self.logits([(row, row.answer) for row in batch]))
        return found

    def rouge(self, rows: Sequence[EvalRow]) -> float:
        recalls: list[float] = []
        for batch in self.batches(rows):
            encoded = [encode(self.tokenizer, Row(r.id, r.prompt, r.answer, r.kind), self.length) for r in batch]
            prompts = [list(e.ids[: e.prompt_length]) for e in encoded]
            S = max(map(len, prompts))
            ids = torch.tensor([[0] * (S - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (S - len(p)) + [1] * len(p) for p in prompts])
            room = min(self.new_tokens, self.length - S)
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=room, pad_token_id=0
            )
            texts = self.tokenizer.batch_decode(out[:, S:], skip_special_tokens=True)
            recalls += [
                self.rouge_l.score(r.answer, text)["rougeL"].recall for r, text in zip(batch, texts, strict=True)
            ]
        return statistics.fmean(recalls)

    def scores(self, benchmark: Benchmark) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in SETS:
            rows = benchmark.scored[name]
            own = name in ("forget", "retain")
            p = [math.exp(-a) for a in self.nll(rows, f"{name} answer", lambda r: r.answer)]
            if not own:
                wrongs = self.wrong(rows, name)
                p = [a / (a + sum(math.exp(-x) for x in w)) for a, w in zip(p, wrongs, strict=True)]
            found[f"{name}_probability"] = statistics.fmean(p)
            right = self.nll(rows, f"{name} {'paraphrase' if own else 'answer'}", lambda r: r.paraphrase or r.answer)
            wrongs = self.wrong(rows, name)
            ratios = [math.exp(r - statistics.fmean(w)) for r, w in zip(right, wrongs, strict=True)]
            useful = [min(t, 1 / t) for t in ratios] if name == "forget" else [max(0.0, 1 - t) for t in ratios]
            found[f"{name}_truth_ratio"] = statistics.fmean(useful)
            found[f"{name}_rouge"] = self.rouge(rows)
            if own:
                prefix = "" if name == "forget" else "retain_"
                hits = self.hits(rows, name)
                found[f"{prefix}extraction_strength"] = statistics.fmean(map(_strength, hits))
                hits = self.hits(rows, name)
                found[f"{prefix}exact_memorization"] = statistics.fmean(map(statistics.fmean, hits))
        parts = [found[f"{s}_{m}"] for s in SETS[1:] for m in ("probability", "rouge", "truth_ratio")]
        found["model_utility"] = statistics.harmonic_mean(parts)
        return found


def _hits(logits: torch.Tensor, labels: torch.Tensor) -> list[list[bool]]:
    right = logits.argmax(-1) == labels
    return [r[m].tolist()[:-1] for r, m in zip(right, labels != IGNORE, strict=True)]


def _strength(hits: Sequence[bool]) -> float:
    missed = [k + 1 for k, hit in enumerate(hits) if not hit]
    return 1 - max(missed, default=0) / len(hits)
