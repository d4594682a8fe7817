"""What a report says, as plain values: pure functions from the records of a run or a search to a document.

The document is what ``gru report --json`` prints and what the page's template shows. No text of a data row is in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gru_core.config import RunConfig
from pipelines import journal, settings
from pipelines.report_source import Source, Told
from pipelines.report_words import AS_RETAIN, RUNNING, SEARCH, SETTINGS, STATUS, score

Document = dict[str, Any]
RELEARN = re.compile(r"(relearn[^/]*)/step_(\d+)")
QUANTISE = re.compile(r"quantise/(\d+)_bit")
HIDDEN = ("output.", "track.", "search.", "prepare.", "benchmark.", "model.path", "retain_model")
"""Settings that another section shows, or that say nothing of the result."""
SETS = {
    "forget": "to forget",
    "retain": "to keep",
    "retain.trained": "of these, trained on to keep them",
    "background": "facts that both prepared models know besides",
    "scored.forget": "that score forgetting",
    "scored.retain": "that score what is kept",
    "scored.authors": "that score real authors",
    "scored.facts": "that score general facts",
    "scored.holdout": "that no model saw, for membership inference",
}


def status(told: Told, search: bool) -> Document:
    """How it ended, in words, and what happened on the way."""
    words = {**STATUS, **SEARCH} if search else STATUS
    word, text = words.get(told.record.status or "", RUNNING)
    took = None if told.began is None or told.ended is None else (told.ended - told.began) / 1000
    return {
        "status": told.record.status, "word": word, "text": text, "error": told.error,
        "notes": list(told.record.notes), "began_ms": told.began, "ended_ms": told.ended, "seconds": took,
    }  # fmt: skip


def data(told: Told) -> Document:
    """The rows: how many, what for, and their hashes."""
    tags = told.record.tags
    rows = [
        {
            "set": name, "use": SETS.get(name, name.removeprefix("scored.")), "rows": int(tags[f"gru.rows.{name}"]),
            "sha256": tags.get(f"gru.sha256.{name}"),
        }
        for name in sorted(
            (key.removeprefix("gru.rows.") for key in tags if key.startswith("gru.rows.")),
            key=lambda name: (list(SETS).index(name) if name in SETS else len(SETS), name),
        )
    ]  # fmt: skip
    return {
        "benchmark": tags.get("gru.benchmark") or told.record.params.get("benchmark.name"), "rows": rows,
        "include_scored": tags.get("gru.include_scored") == "true",
        "reads_retain": told.record.params.get("rectify.rule") != "none",
    }  # fmt: skip


def settings_of(told: Told) -> list[Document]:
    """The settings that matter most, then all others that differ from their default."""
    params, default = told.record.params, settings.flat(RunConfig())
    changed = [
        key
        for key, value in params.items()
        if key not in SETTINGS and not key.startswith(HIDDEN) and value != default.get(key)
    ]
    return [
        {
            "key": key, "value": params[key], "default": default.get(key), "meaning": SETTINGS.get(key, ""),
            "changed": params[key] != default.get(key),
        }
        for key in (*SETTINGS, *sorted(changed)) if key in params
    ]  # fmt: skip


def scores_at(told: Told, step: int) -> dict[str, float]:
    """Scores of the evaluation at a step, by name."""
    values = told.record.metrics.get(step, {})
    return {key.removeprefix("eval/"): value for key, value in values.items() if key.startswith("eval/")}


def last_step(told: Told) -> int | None:
    """The last evaluated step; None where there is none."""
    points = journal.evaluated(told.record.metrics)
    return points[-1]["step"] if points else None


def scores(told: Told, step: int | None) -> list[Document]:
    """Every score before and after, and the retain model's; those of robustness stand in :func:`robustness`."""
    after = scores_at(told, step) if step is not None else {}
    names = [name for name in {**after, **scores_at(told, 0), **told.retain_scores} if not _is_robustness(name)]
    return [_row(told, after, name) for name in sorted(names, key=_order)]


def _row(told: Told, after: Mapping[str, float], name: str) -> Document:
    words, before = score(name), scores_at(told, 0).get(name)
    good = words.good
    if good == AS_RETAIN and not told.retain_scores:
        good = "near a retain model’s (none here)"
    return {
        "name": name, "before": before, "after": after.get(name), "retain_model": told.retain_scores.get(name),
        "meaning": words.meaning, "good": good,
    }  # fmt: skip


def _order(name: str) -> tuple[int, str]:
    first = ("unlearning", "retention")
    keeps = name.startswith(("retain_", "model_utility", "authors_", "facts_"))
    return (first.index(name) if name in first else 3 if keeps else 2, name)


def _is_robustness(name: str) -> bool:
    return name.partition("/")[0].startswith(("relearn", "quantise"))


def robustness(told: Told, step: int | None) -> Document:
    """What was tried to bring the forgotten back: curves over steps of relearning, values at few bits.

    ``curves``: name to ``{"model", "retain_model"}``, each a list of ``(steps, value)``, of which the value at 0 is the
    forget metric itself; ``bits``: ``(bits, value)`` from many to few; ``metric``, ``start``, ``end``, ``retain``: the
    forget metric behind them all, and its value for the starting model, for this one and for the retain model.
    """
    after = scores_at(told, step) if step is not None else {}
    metric = str(told.record.params.get("evaluate.unlearning") or "")
    curves: Document = {}
    for name in sorted({found[1] for key in after if (found := RELEARN.fullmatch(key))}):
        both = {"model": after, "retain_model": told.retain_scores}
        curves[name] = {whose: _curve(values, name, metric) for whose, values in both.items()}
    bits = [(int(found[1]), value) for key, value in after.items() if (found := QUANTISE.fullmatch(key))]
    names = [name for name in {**after, **told.retain_scores} if _is_robustness(name)]
    last = last_step(told)
    return {
        "metric": metric, "curves": curves, "bits": sorted(bits, reverse=True),
        "start": scores_at(told, 0).get(metric), "end": after.get(metric), "retain": told.retain_scores.get(metric),
        "rows": [_row(told, after, name) for name in sorted(names, key=_by_number)],
        "later": last is not None and step != last and any(map(_is_robustness, scores_at(told, last))),
    }  # fmt: skip


def _by_number(name: str) -> tuple[str, int]:
    number = re.search(r"\d+", name)
    return name.partition("/")[0], int(number[0]) if number else -1


def _curve(values: Mapping[str, float], name: str, metric: str) -> list[tuple[int, float]]:
    found = {int(m[2]): v for key, v in values.items() if (m := RELEARN.fullmatch(key)) and m[1] == name}
    if found and metric in values:
        found.setdefault(0, values[metric])
    return sorted(found.items())


def course(told: Told, step: int | None) -> Document:
    """Series over steps (``(step, value)`` each), and how often the two gradients were in conflict up to ``step``."""
    keys = {
        "unlearning": "eval/unlearning", "retention": "eval/retention", "forget_loss": "train/forget_loss",
        "retain_loss": "train/retain_loss", "cosine": "train/cosine", "conflict": "train/conflict",
    }  # fmt: skip
    series = {
        name: [(at, values[key]) for at, values in told.record.metrics.items() if key in values]
        for name, key in keys.items()
    }
    counted = [value for at, value in series["conflict"] if step is None or at <= step]
    steps = [at for at, values in told.record.metrics.items() if any(key.startswith("train/") for key in values)]
    return {
        "series": series, "steps": max(steps, default=0), "measured": len(counted), "conflicts": round(sum(counted)),
        "planned": told.record.params.get("unlearn.steps"),
    }  # fmt: skip


def environment(source: Source) -> Document:
    """Versions and commit, as they were recorded."""
    tags = {**(source.trials[0].record.tags if source.trials else {}), **source.told.record.tags}
    prefix = "gru.versions."
    versions = {key.removeprefix(prefix): value for key, value in tags.items() if key.startswith(prefix)}
    return {"versions": dict(sorted(versions.items())), "commit": tags.get("gru.commit")}


def counted(told: Told) -> tuple[int | None, int | None]:
    """Parameters of the model, and those that were trained, as the run counted them."""
    tags = told.record.tags
    whole, trained = tags.get("gru.parameters"), tags.get("gru.parameters.trained")
    return int(whole) if whole else None, int(trained) if trained else None
