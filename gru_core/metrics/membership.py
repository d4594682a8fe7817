"""Membership inference: can forget rows be told from rows that no model saw? (attacks: arXiv 1709.01604, 2012.07805,
2310.16789, 2404.02936; PrivLeak: MUSE, arXiv 2407.06460, equation 3)"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gru_core.errors import InputError
from gru_core.metrics.base import Kind, Measurements, Metric, Need

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradnorm")
"""Each gives one number a row that is lower where the row was seen."""
UNSEEN = 0.5
"""AUC that stands for the retain model's where none was measured: it tells nothing apart."""


def auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """Area under the ROC curve of an attack, in [0, 1]: 1 where every forget row scores lower than any holdout row,
    0.5 where nothing is told apart; ties count half (Mann and Whitney).

    Args:
        forget, holdout: scores of the rows of each, lower where the model knows the row.

    Raises:
        InputError: one of them is empty.
    """
    from scipy.stats import rankdata

    n, m = len(forget), len(holdout)
    if not n or not m:
        raise InputError(f"an attack needs forget and holdout rows (given: {n} and {m})")
    ranks = rankdata([*forget, *holdout])  # halves of whole numbers: their sum is exact
    above = float(ranks[n:].sum()) - m * (m + 1) / 2
    return above / (n * m)


def privleak(of_model: float, of_retain: float = UNSEEN, epsilon: float = 0.0) -> float:
    """``100 (a - a_retain) / a_retain`` with ``a = 1 - AUC`` of Min-K%: 0 is ideal, below 0 forget rows are still
    recognised, above 0 they stand out as forgotten.

    Args:
        of_model, of_retain: AUC as of :func:`auc`.
        epsilon: added to the denominator (OpenUnlearning: 1e-10).

    Raises:
        InputError: the retain model recognises every forget row, so that nothing can be compared with it.
    """
    a, a_retain = 1.0 - of_model, 1.0 - of_retain
    if a_retain + epsilon <= 0:
        raise InputError("privleak: the retain model recognises every forget row (AUC 1), was it trained on them?")
    return 100.0 * (a - a_retain) / (a_retain + epsilon)


Attack = Callable[[Measurements, "Measurements | None", str], list[float]]
"""Scores of the rows of one set, lower where the model knows the row; the second is the retain model's."""


def loss(found: Measurements, reference: Measurements | None, name: str) -> list[float]:
    """Mean NLL of the answer, closing token included."""
    return [answer.mean_nll for answer in found.answers(name)]


def zlib(found: Measurements, reference: Measurements | None, name: str) -> list[float]:
    """Mean NLL over the compressed length of the answer's text, nats a byte."""
    rows = zip(found.answers(name), found.tails(name), strict=True)
    return [answer.mean_nll / tail.compressed for answer, tail in rows]


def min_k(found: Measurements, reference: Measurements | None, name: str) -> list[float]:
    """Min-K% with K = 40."""
    return [tail.min_k for tail in found.tails(name)]


def min_k_plus_plus(found: Measurements, reference: Measurements | None, name: str) -> list[float]:
    """Min-K%++ with K = 40."""
    return [tail.min_k_plus_plus for tail in found.tails(name)]


def against_reference(found: Measurements, reference: Measurements | None, name: str) -> list[float]:
    """Mean NLL less that of the retain model."""
    if reference is None:
        raise InputError("mia_reference needs the measurements of a retain model (set retain_model)")
    if [r.id for r in found.rows(name)] != [r.id for r in reference.rows(name)]:
        raise InputError(f"mia_reference: the retain model was measured on other {name} rows")
    pairs = zip(found.answers(name), reference.answers(name), strict=True)
    return [ours.mean_nll - theirs.mean_nll for ours, theirs in pairs]


def gradnorm(found: Measurements, reference: Measurements | None, name: str) -> list[float]:
    """Norm of the gradient of the answer's loss."""
    return found.gradients(name)


def _attack(attack: Attack, *kinds: Kind, compares: bool = False) -> Metric:
    def compute(found: Measurements, reference: Measurements | None) -> float:
        return auc(attack(found, reference, "forget"), attack(found, reference, "holdout"))

    needs = tuple(Need(name, kind) for name in ("forget", "holdout") for kind in kinds)
    return Metric("report", needs, compute, needs_retain_model=compares)


def _privleak(found: Measurements, reference: Measurements | None) -> float:
    """:func:`privleak`; where the retain model recognises every forget row, half a pair of rows less than every
    (OpenUnlearning's epsilon makes a huge number of it)."""
    least = 0.0 if found.epsilon else 0.5 / (len(found.rows("forget")) * len(found.rows("holdout")))
    floor = UNSEEN if reference is None else METRICS["mia_min_k"].compute(reference, None)
    return privleak(METRICS["mia_min_k"].compute(found, None), min(floor, 1.0 - least), found.epsilon)


METRICS = {
    "mia_loss": _attack(loss, "answer"),
    "mia_zlib": _attack(zlib, "answer", "tail"),
    "mia_min_k": _attack(min_k, "tail"),
    "mia_min_k_plus_plus": _attack(min_k_plus_plus, "tail"),
    "mia_reference": _attack(against_reference, "answer", compares=True),
    "mia_gradnorm": _attack(gradnorm, "gradient"),
}
METRICS["privleak"] = Metric(
    "report", METRICS["mia_min_k"].needs, _privleak, without_retain_model=f"an AUC of {UNSEEN} for the retain model"
)
