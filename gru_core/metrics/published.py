"""Published per-sample logs, and every aggregate computed again from them.

Two kinds: TOFU's ``eval_log_aggregated.json`` and OpenUnlearning's ``TOFU_EVAL.json``. Each is read with its source's
own conventions, so that published numbers come out to the last digits; texts in them are not kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gru_core.errors import InputError
from gru_core.metrics.base import mean
from gru_core.metrics.forget_quality import ks_pvalue, log10_pvalue
from gru_core.metrics.membership import ATTACKS, UNSEEN, auc, privleak
from gru_core.metrics.utility import harmonic_mean

Source = Literal["TOFU", "OpenUnlearning"]
EPSILON: dict[Source, float] = {"TOFU": 0.0, "OpenUnlearning": 1e-10}
"""What each adds to the denominators of truth ratio, its inverse, choice probability and PrivLeak."""
SETS = ("retain", "authors", "facts", "forget")
_TOFU = {
    "retain": "eval_log.json", "authors": "eval_real_author_wo_options.json",
    "facts": "eval_real_world_wo_options.json", "forget": "eval_log_forget.json",
}  # fmt: skip
_OPEN = {"retain": "retain", "authors": "ra", "facts": "wf", "forget": "forget"}


@dataclass(frozen=True)
class LogRow:
    """One row of a log.

    Attributes:
        probability: length-normalised, of the true answer.
        wrong: the same of each wrong answer.
        right_nll: mean NLL of the paraphrase, of the answer where there is none, nats a token.
        wrong_nll: mean NLL of each wrong answer, nats a token.
        rouge: ROUGE-L recall of the generation.
    """

    probability: float
    wrong: tuple[float, ...]
    right_nll: float
    wrong_nll: tuple[float, ...]
    rouge: float

    def truth_ratio(self, epsilon: float) -> float:
        """Wrong over right: a geometric mean over the wrong answers."""
        wrong_nll = mean(list(self.wrong_nll))
        if not epsilon:
            return math.exp(min(self.right_nll - wrong_nll, 700.0))
        return math.exp(-wrong_nll) / (math.exp(-self.right_nll) + epsilon)

    def choice(self, epsilon: float) -> float:
        """Probability of the true answer among all."""
        return self.probability / (self.probability + math.fsum(self.wrong) + epsilon)


@dataclass(frozen=True)
class Log:
    """A published log without its texts.

    Attributes:
        sets: set name to row key to row; the sets that the log has.
        per_row: ``exact_memorization`` and ``extraction_strength`` of forget rows, as logged.
        attacks: membership inference: attack to scores of forget and of holdout rows.
    """

    source: Source
    sets: Mapping[str, Mapping[str, LogRow]]
    per_row: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    attacks: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)

    @property
    def epsilon(self) -> float:
        """See :data:`EPSILON`."""
        return EPSILON[self.source]

    def truth_ratios(self, name: str) -> dict[str, float]:
        """Truth ratio of every row of set ``name``."""
        return {key: row.truth_ratio(self.epsilon) for key, row in self.sets[name].items()}


def read(path: str | Path) -> Log:
    """The log in a file, whichever of the two kinds it is.

    Raises:
        InputError: no such file, not JSON, neither kind, or a section of it is not as its source writes it.
    """
    try:
        document = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:  # its message would quote the text
        raise InputError(f"{path}: not a JSON file") from None
    readers: dict[str, Callable[[dict[str, Any]], Log]] = {_TOFU["forget"]: _tofu, "forget_Q_A_Prob": _open}
    if isinstance(document, dict):
        for mark, reader in readers.items():
            if mark in document:
                try:
                    return reader(document)
                except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
                    what = f"key {error}" if isinstance(error, KeyError) else type(error).__name__
                    raise InputError(f"{path}: a section of this log is not as its source writes it ({what})") from None
    raise InputError(
        f"{path}: no log that is known here; allowed: TOFU's eval_log_aggregated.json, OpenUnlearning's TOFU_EVAL.json"
    )


def _tofu(document: dict[str, Any]) -> Log:
    sets = {}
    for name, title in _TOFU.items():
        if section := document.get(title):
            right, wrong = section["avg_paraphrased_loss"], section["average_perturb_loss"]
            sets[name] = {
                key: LogRow(
                    math.exp(-float(nll)), tuple(math.exp(-float(x)) for x in wrong[key]), float(right[key]),
                    tuple(map(float, wrong[key])), float(section["rougeL_recall"][key]),
                )
                for key, nll in section["avg_gt_loss"].items()
            }  # fmt: skip
    return Log("TOFU", sets)


def _open(document: dict[str, Any]) -> Log:
    def rows(title: str) -> dict[str, Any]:
        return dict(document[title]["value_by_index"]) if title in document else {}

    sets = {}
    for name, short in _OPEN.items():
        answers, wrong, made = (rows(f"{short}_Q_A_{kind}") for kind in ("Prob", "PERT_Prob", "ROUGE"))
        right = rows(f"{short}_Q_A_PARA_Prob") or answers
        if answers:
            sets[name] = {
                key: LogRow(
                    float(found["prob"]), tuple(map(float, wrong[key]["prob"])), float(right[key]["avg_loss"]),
                    tuple(map(float, wrong[key]["avg_loss"])), float(made[key]["rougeL_recall"]),
                )
                for key, found in answers.items()
            }  # fmt: skip
    titles = ("exact_memorization", "extraction_strength")
    per_row = {t: {k: float(v["score"]) for k, v in rows(t).items()} for t in titles if t in document}
    attacks = {a: _attack(document[f"mia_{a}"]) for a in ATTACKS if f"mia_{a}" in document}
    return Log("OpenUnlearning", sets, per_row, attacks)


def _attack(section: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    def scores(name: str) -> tuple[float, ...]:
        return tuple(float(row["score"]) for row in section[name]["value_by_index"].values())

    return scores("forget"), scores("holdout")


def aggregates(log: Log, retain: Log | None = None) -> tuple[dict[str, float], list[str]]:
    """Every aggregate of ``log`` under our names, computed from its rows; and what was left out, and why.

    Args:
        retain: the log of the model that was trained without the forget set.

    Raises:
        InputError: ``retain`` is another source's, or of other forget rows.
    """
    if retain is not None and retain.source != log.source:
        raise InputError(f"--retain-log: a log of {retain.source} beside one of {log.source}; allowed: the same source")
    scores: dict[str, float] = {}
    notes: list[str] = []
    for name in log.sets:
        scores |= _set_scores(log, name)
    parts = [f"{s}_{part}" for s in ("retain", "authors", "facts") for part in ("probability", "rouge", "truth_ratio")]
    if all(part in scores for part in parts):
        scores["model_utility"] = harmonic_mean([scores[part] for part in parts])
    else:
        notes.append(f"model_utility: left out, the log lacks {', '.join(p for p in parts if p not in scores)}")
    if retain is None:
        notes.append("forget_quality: left out, there is no log of a retain model (--retain-log)")
    else:
        value = ks_pvalue(*_comparable(log, retain))
        scores |= {"forget_quality": value, "forget_quality_log10": log10_pvalue(value)}
    scores |= {title: mean(list(rows.values())) for title, rows in log.per_row.items()}
    scores |= {f"mia_{attack}": auc(*rows) for attack, rows in log.attacks.items()}
    if "min_k" in log.attacks:
        known = retain is not None and "min_k" in retain.attacks
        floor = auc(*retain.attacks["min_k"]) if retain is not None and known else UNSEEN
        scores["privleak"] = privleak(scores["mia_min_k"], floor, log.epsilon)
        if not known:
            notes.append(f"privleak: against AUC {UNSEEN}, there is no log of a retain model with Min-K% scores")
    return scores, notes


def _set_scores(log: Log, name: str) -> dict[str, float]:
    rows, ratios = list(log.sets[name].values()), list(log.truth_ratios(name).values())
    eps = log.epsilon
    if name == "forget":
        truth = mean([min(t, 1 / (t + eps)) if t + eps else t for t in ratios])
    else:
        truth = mean([max(0.0, 1.0 - t) for t in ratios])
    own = name in ("forget", "retain")
    return {
        f"{name}_probability": mean([r.probability if own else r.choice(eps) for r in rows]),
        f"{name}_rouge": mean([r.rouge for r in rows]),
        f"{name}_truth_ratio": truth,
    }


def _comparable(log: Log, retain: Log) -> tuple[Sequence[float], Sequence[float]]:
    mine, theirs = (each.truth_ratios("forget") for each in (log, retain))
    if mine.keys() != theirs.keys():
        raise InputError(
            f"--retain-log: it has {len(theirs)} forget rows, the other {len(mine)}; they must be the same"
        )
    return list(mine.values()), list(theirs.values())
