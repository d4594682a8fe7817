"""Metrics by name, and the evaluation of a model on a benchmark. Definitions: docstring of each metric's file.

A new metric over rows is one file and one line in ``METRICS``; one that works on the model itself stands in
``MODEL_METRICS``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from gru_core.benchmarks.base import Benchmark
from gru_core.config import EvaluateConfig, ModelConfig
from gru_core.errors import InputError, unknown
from gru_core.metrics import (
    exact_memorization,
    extraction_strength,
    forget_quality,
    lm_eval_tasks,
    measure,
    membership,
    muse,
    probability,
    quantise,
    relearn,
    rouge,
    truth_ratio,
    utility,
)
from gru_core.metrics.base import AnswerScores, Evaluation, Hits, Measurements, Metric, Need, RowScores
from gru_core.metrics.progress import Progress
from gru_core.metrics.subject import ModelMetric, Subject
from gru_core.metrics.tradeoff import Baseline, trade_off
from gru_core.parallel import Group

__all__ = [
    "METRICS", "MODEL_METRICS", "AnswerScores", "Baseline", "Evaluation", "Hits", "Measurements", "Metric",
    "ModelMetric", "Need", "Progress", "RowScores", "Subject", "available", "check_metric", "check_metrics", "evaluate",
    "find", "requested", "trade_off",
]  # fmt: skip

METRICS: dict[str, Metric] = {
    "forget_probability": probability.forget_probability,
    "retain_probability": probability.retain_probability,
    "forget_rouge": rouge.forget_rouge,
    "retain_rouge": rouge.retain_rouge,
    "forget_truth_ratio": truth_ratio.forget_truth_ratio,
    "retain_truth_ratio": truth_ratio.retain_truth_ratio,
    "model_utility": utility.model_utility,
    "forget_quality": forget_quality.metric,
    "extraction_strength": extraction_strength.forget,
    "retain_extraction_strength": extraction_strength.retain,
    "exact_memorization": exact_memorization.forget,
    "retain_exact_memorization": exact_memorization.retain,
    **utility.METRICS,
    **membership.METRICS,
    **muse.METRICS,
}

MODEL_METRICS: dict[str, ModelMetric] = {
    "relearn": relearn.forget,
    "relearn_retain": relearn.retain,
    "quantise": quantise.metric,
}


def find(name: str) -> Metric | ModelMetric:
    """The metric of this name; ``lm_eval:TASK`` is one for every task of lm-eval.

    Raises:
        InputError: there is none.
    """
    if name.startswith(lm_eval_tasks.PREFIX):
        return lm_eval_tasks.metric(name.removeprefix(lm_eval_tasks.PREFIX))
    known: dict[str, Metric | ModelMetric] = {**METRICS, **MODEL_METRICS}
    if name not in known:
        raise unknown("metric", name, [*known, lm_eval_tasks.EXAMPLE])
    return known[name]


def requested(config: EvaluateConfig, final: bool = True) -> tuple[str, ...]:
    """Names of all metrics that ``config`` evaluates: those listed, the two behind the trade-off, and at the end of a
    run those of ``config.final``."""
    last = config.final if final else ()
    return tuple(dict.fromkeys((*config.metrics, config.unlearning, config.retention, *last)))


def check_metrics(config: EvaluateConfig, has_retain_model: bool, benchmark: Benchmark | None) -> None:
    """Refuse what cannot be evaluated, before anything is trained.

    Args:
        has_retain_model: whether the run has measurements of a model trained without the forget set.
        benchmark: also check that it has what the metrics need; None skips that.

    Raises:
        InputError: unknown metric, metric in a role that it cannot play, no retain model, or rows or wrong
            answers that the benchmark lacks.
    """
    for name in requested(config):
        find(name)
    for key, name, role in (
        ("unlearning", config.unlearning, "forget"),
        ("retention", config.retention, "utility"),
    ):
        if find(name).role not in (role, "either"):
            allowed = ", ".join(sorted(n for n, m in METRICS.items() if m.role == role))
            raise InputError(f"evaluate.{key}: got {name!r}, allowed: {allowed}, {lm_eval_tasks.EXAMPLE}")
    for name in requested(config):
        check_metric(name, config, has_retain_model, benchmark)


def check_metric(name: str, config: EvaluateConfig, has_retain_model: bool, benchmark: Benchmark | None) -> None:
    """Refuse a metric that cannot be computed, whatever its role.

    Raises:
        InputError: as :func:`check_metrics`.
    """
    metric = find(name)
    if isinstance(metric, ModelMetric):
        metric.check(config, benchmark)
        return
    if metric.needs_retain_model and not has_retain_model:
        raise InputError(f"{name} compares with a model trained without the forget set: set retain_model")
    missing = [r for need in metric.needs if benchmark and (r := _lacks(need, benchmark, config.rows))]
    if benchmark and missing and (not metric.partial or len(missing) == len(metric.needs)):
        raise InputError(f"{name} cannot be computed on {benchmark.name}: {missing[0]}")


def available(
    benchmark: Benchmark, has_retain_model: bool, config: EvaluateConfig
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of all metrics over rows that can be computed, and a line for each other one that says what it lacks."""
    able, left = [], []
    for name in METRICS:
        try:
            check_metric(name, config, has_retain_model, benchmark)
            able.append(name)
        except InputError as reason:
            left.append(f"left out: {reason}")
    return tuple(able), tuple(left)


def _lacks(need: Need, benchmark: Benchmark, limit: int | None) -> str | None:
    """Why ``need`` cannot be measured on ``benchmark``, or None where it can."""
    rows = measure.scored_rows(benchmark, need.set, limit)
    if not rows:
        return f"it has no {need.set} set"
    bare = sum(not r.perturbed for r in rows)
    if need.kind == "truth" and bare:
        return f"{bare} of {len(rows)} rows of its {need.set} set have no wrong (perturbed) answers"
    return None


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    benchmark: Benchmark,
    config: EvaluateConfig,
    model_config: ModelConfig,
    *,
    group: Group | None = None,
    reference: Measurements | None = None,
    texts: bool = False,
    final: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Score ``model``: every rank calls this with the same arguments, shares the rows, and gets the same result.

    Only what the requested metrics need is measured. A diverged model gives finite scores: a token whose NLL is
    not a number is no hit and has probability 0.

    Args:
        model: a causal LM, wrapped in DDP or not, in any mode; its mode and the random state stay as they are.
        group: the ranks that evaluate together; None: this process alone.
        reference: measurements of the retain model. Without them, metrics that compare with it are left out
            with a note: so is the retain model itself evaluated.
        texts: keep generated texts in the measurements.
        final: also the metrics of ``config.final``.
        progress: keeps what is measured as it goes, for an evaluation that goes on after an interruption.

    Raises:
        InputError: as :func:`check_metrics`; a row without an answer token within the model's length.
    """
    check_metrics(config, True, benchmark)
    group = group or Group()
    chosen = {name: find(name) for name in requested(config, final)}

    def over_rows(
        metrics: Mapping[str, Metric], data: Benchmark = benchmark, kept: Progress | None = None, texts: bool = False
    ) -> Evaluation:
        needs = dict.fromkeys(need for metric in metrics.values() for need in metric.needs)
        present = [need for need in needs if _lacks(need, data, config.rows) is None]
        found = measure.measure(model, tokenizer, data, present, config, model_config, group, texts, kept)
        return _compute(metrics, replace(found, convention=config.convention), reference)

    def score(names: Sequence[str], data: Benchmark | None = None) -> dict[str, float]:
        return over_rows({name: METRICS[name] for name in names}, data or benchmark).scores

    rows_kept = progress.within("rows") if progress else None
    over = {name: metric for name, metric in chosen.items() if isinstance(metric, Metric)}
    found = over_rows(over, benchmark, rows_kept, texts)
    scores = dict(found.scores)
    subject = Subject(model, tokenizer, benchmark, config, model_config, group, score)
    of_model = {name: metric for name, metric in chosen.items() if isinstance(metric, ModelMetric)}
    kept = progress.within("model") if progress and of_model else None
    done = kept.read(_digest(benchmark, config, model_config)) if kept else {}
    for name, metric in of_model.items():
        scores |= done[name] if name in done else _run(name, metric, subject, kept)
    return replace(found, scores=scores)


def _digest(benchmark: Benchmark, config: EvaluateConfig, model_config: ModelConfig) -> str:
    """Of what metrics on the model depend on, besides its weights; a hash, since rows are in it."""
    scored = [(name, [(r.prompt, r.answer, r.paraphrase, r.perturbed) for r in rows])
              for name, rows in sorted(benchmark.scored.items())]  # fmt: skip
    said = repr((config, model_config, benchmark.fingerprint(), scored))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _run(name: str, metric: ModelMetric, subject: Subject, kept: Progress | None) -> Mapping[str, float]:
    """A metric that works on the model, kept when it is done."""
    scores = metric.run(subject)
    if kept and subject.group.rank == 0:
        kept.add({name: dict(scores)})
    return scores


def _compute(metrics: Mapping[str, Metric], found: Measurements, reference: Measurements | None) -> Evaluation:
    """What ``found`` says of each metric; a note for each that lacks a retain model to compare with."""
    scores: dict[str, float] = {}
    notes: list[str] = []
    for name, metric in metrics.items():
        if metric.needs_retain_model and reference is None:
            notes.append(f"{name}: left out, there is no retain model to compare with")
            continue
        if metric.without_retain_model and reference is None:
            notes.append(f"{name}: {metric.without_retain_model}, there is none to compare with")
        scores[name] = metric.compute(found, reference)
        scores |= {extra: function(scores[name]) for extra, function in metric.derived.items()}
    if "model_utility" in scores:
        notes += utility.notes(found)
    return Evaluation(scores, found, tuple(notes))
