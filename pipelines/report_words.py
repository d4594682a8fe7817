"""Metrics, settings and statuses in the words of people who were not there."""

from __future__ import annotations

from typing import NamedTuple

from gru_core.metrics import METRICS
from gru_core.metrics.lm_eval_tasks import PREFIX

LOWER, HIGHER = "lower is better", "higher is better"
AS_RETAIN, HALF, ZERO = "nearest the retain model’s", "nearest 0.5", "nearest 0"


class Words(NamedTuple):
    """A score in plain words: what it is, and which values are good."""

    meaning: str
    good: str


_FORGET, _KEEP = "the rows to forget", "the rows to keep"
_ATTACK = (
    "How well an attack tells rows to forget from rows that no model saw, {}: 1 is always, 0.5 is no better than "
    "guessing."
)


def _pairs() -> dict[str, Words]:
    """Metrics that exist for both sets."""
    texts = {
        "probability": "The probability that the model gives to the right answers to {}, averaged per token.",
        "rouge": "The share of the right answer that the model reproduces when it is asked about {} (ROUGE-L recall).",
        "extraction_strength": "The share of each answer to {} that the model completes itself, given its beginning.",
        "exact_memorization": "The share of the tokens of the answers to {} that the model would pick itself.",
    }
    own = ("extraction_strength", "exact_memorization")
    found = {}
    for name, text in texts.items():
        found[name if name in own else f"forget_{name}"] = Words(text.format(_FORGET), LOWER)
        found[f"retain_{name}"] = Words(text.format(_KEEP), HIGHER)
    return found


SCORES: dict[str, Words] = {
    "unlearning": Words(
        "How much of what is to be forgotten is gone: 0 is the starting model, 1 a model that never saw it.", HIGHER
    ),
    "retention": Words("How much of the starting model’s ability is left: 1 is all of it.", HIGHER),
    **_pairs(),
    "forget_truth_ratio": Words(
        "How close right and wrong answers to the rows to forget have come in the model’s eyes; a model that was "
        "overdone stands out as much as one that remembers.",
        AS_RETAIN,
    ),
    "retain_truth_ratio": Words("How clearly right answers are preferred to wrong ones on the rows to keep.", HIGHER),
    "model_utility": Words("One number for the abilities that are to stay (harmonic mean of up to nine).", HIGHER),
    "forget_quality": Words(
        "Whether answers to the rows to forget could come from a model that never saw them: the p-value of a test, "
        "where small values tell the two models apart.",
        HIGHER,
    ),
    "forget_quality_log10": Words("The same as forget_quality, as a power of ten.", HIGHER),
    "authors_probability": Words("Choice of the right answer over wrong ones on real authors.", HIGHER),
    "authors_rouge": Words("Share of the right answer that is reproduced on real authors.", HIGHER),
    "authors_truth_ratio": Words("How clearly right answers are preferred to wrong ones on real authors.", HIGHER),
    "facts_probability": Words("Choice of the right answer over wrong ones on general facts.", HIGHER),
    "facts_rouge": Words("Share of the right answer that is reproduced on general facts.", HIGHER),
    "facts_truth_ratio": Words("How clearly right answers are preferred to wrong ones on general facts.", HIGHER),
    "mia_loss": Words(_ATTACK.format("by the model’s loss"), HALF),
    "mia_zlib": Words(_ATTACK.format("by the loss over the compressed length of the text"), HALF),
    "mia_min_k": Words(_ATTACK.format("by the least likely tokens (Min-K%)"), HALF),
    "mia_min_k_plus_plus": Words(_ATTACK.format("by the least likely tokens, standardised (Min-K%++)"), HALF),
    "mia_reference": Words(_ATTACK.format("by the loss beside the retain model’s"), HALF),
    "mia_gradnorm": Words(_ATTACK.format("by the size of the loss’s gradient"), HALF),
    "privleak": Words(
        "Membership inference (Min-K%) beside the retain model’s, in percent: below 0 rows to forget are still "
        "recognised, above 0 they stand out as forgotten.",
        ZERO,
    ),
    "forget_verbmem": Words(
        "How much of a text to forget the model writes on from its beginning (ROUGE-L F1 of 128 tokens).", LOWER
    ),
    "forget_knowmem": Words("How right its short answers are to questions about what is to be forgotten.", LOWER),
    "retain_knowmem": Words("How right its short answers are to questions about what is to be kept.", HIGHER),
    "relearn": Words("The forget metric after the model was trained again on some of the rows to forget.", LOWER),
    "relearn_retain": Words("The forget metric after the model was trained further on rows to keep alone.", LOWER),
    "quantise": Words("The forget metric after the weights were rounded to few bits.", LOWER),
}

_PARTS = {
    "retention": Words("The retention metric after the same.", HIGHER),
    "unseen": Words("The forget metric over those rows to forget that were not trained on again.", LOWER),
    "loss": Words("The loss on the rows that were trained on again; 1e9 means that this training diverged.", ""),
}
"""What stands behind ``relearn/`` and ``quantise/N_bit_`` besides values of the forget metric."""

_ROLES = {
    "forget": Words("A score on the rows to forget.", LOWER),
    "utility": Words("A score of the abilities that are to stay.", HIGHER),
}


def score(name: str) -> Words:
    """The words for a score, by its name or what stands before its first ``/``; for one without words of its own those
    of its role, which say which direction is good."""
    base, _, part = name.partition("/")
    if base in ("relearn", "relearn_retain", "quantise") and (found := _PARTS.get(part.rpartition("_")[2])):
        return found
    if base.startswith(PREFIX):
        return Words(f"The score in the test {base.removeprefix(PREFIX)} of lm-eval; of choices the share right.", "")
    words = SCORES.get(name) or SCORES.get(base)
    metric = METRICS.get(name) or METRICS.get(base)
    return words or (_ROLES.get(metric.role) if metric else None) or Words("A further score of this study.", "")


SETTINGS = {
    "unlearn.objective": "objective: what is minimised on the rows to forget",
    "rectify.rule": "rule: how each step is corrected so that it does not harm what is to be kept",
    "rectify.strength": "strength of that correction: 0 none, 1 removes the conflict, above 1 repairs",
    "unlearn.steps": "steps of training",
    "unlearn.batch_size": "rows of each kind that a step sees",
    "unlearn.lr": "learning rate",
    "retain.loss": "loss on the rows to keep",
    "retain.size": "rows to keep that train: a share, or a number of rows",
    "train.seed": "seed of every random choice",
    "train.workers": "processes that share the work; 0: one, without Ray",
    "model.dtype": "precision of the arithmetic",
}
"""Settings that a report always shows."""

STATUS = {
    "finished": ("finished", "It took every step that was planned."),
    "collapsed": (
        "collapsed",
        "It ended early: the loss on what is to be kept rose beyond its limit (unlearn.collapse), so the model had "
        "lost what it was to keep. That is a result; such a model is not one to use.",
    ),
    "non_finite": ("failed: not a number", "It ended early, at a loss that was no finite number."),
    "stopped": ("stopped", "It was stopped before its end and can go on (--resume). Its last state stands here."),
    "failed": ("failed", "It failed before its end. What stands here is what had been recorded."),
}
RUNNING = ("not ended", "It had not ended when this report was made. What stands here is what had been recorded.")
SEARCH = {
    "finished": ("finished", "All of its runs have ended."),
    "stopped": ("stopped", "It was stopped before all of its runs had ended and can go on (--resume)."),
    "failed": ("failed", "It failed before all of its runs had ended."),
}

FAMILIES = {
    "plain": "unlearning alone, without any correction",
    "sum": "both losses added up (gradient difference), the usual rival",
    "rectified": "gradient rectified unlearning",
}
