"""ROUGE-L: recall, with stemming, of the greedy generation against the answer (TOFU, arXiv 2401.06121); and F1."""

from __future__ import annotations

import functools
from typing import Any

from gru_core.metrics.base import Measurements, Metric, Need, mean


@functools.cache
def _scorer(stem: bool) -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stem)


@functools.cache
def _words() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=False).tokenize


def _of_equals(answer: str, generation: str) -> float | None:
    """What every score is of two texts of the same words, which needs no stems and no table of subsequences: 1, or 0
    without a word; None of other texts."""
    words = _words()(answer)
    return float(bool(words)) if words == _words()(generation) else None


def rouge_l_recall(answer: str, generation: str) -> float:
    """Longest common subsequence of words over the words of ``answer``, in [0, 1]."""
    same = _of_equals(answer, generation)
    return float(_scorer(True).score(answer, generation)["rougeL"].recall) if same is None else same


def rouge_l_f1(answer: str, generation: str, stem: bool) -> float:
    """Harmonic mean of the recall and of the same subsequence over the words of ``generation``, in [0, 1]."""
    same = _of_equals(answer, generation)
    return float(_scorer(stem).score(answer, generation)["rougeL"].fmeasure) if same is None else same


def rouge(measurements: Measurements, name: str) -> float:
    """Mean over set ``name``, in [0, 1]."""
    return mean(measurements.rouges(name))


forget_rouge = Metric("forget", (Need("forget", "rouge"),), lambda m, _: rouge(m, "forget"))
retain_rouge = Metric("utility", (Need("retain", "rouge"),), lambda m, _: rouge(m, "retain"))
