"""Membership inference: can forget rows be told from rows that no model saw? (attacks: arXiv 1709.01604, 2012.07805,
2310.16789, 2404.02936; PrivLeak: MUSE, arXiv 2407.06460, equation 3)"""

from __future__ import annotations

from collections.abc import Sequence

from gru_core.errors import InputError

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
