"""Forget quality: are the truth ratios those of a model that never saw the forget set? (arXiv 2401.06121)"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence

from gru_core.errors import InputError
from gru_core.metrics.base import Measurements, Metric, Need
from gru_core.metrics.truth_ratio import log_truth_ratios


def ks_pvalue(ratios: Sequence[float], reference: Sequence[float]) -> float:
    """p-value of the two-sided two-sample Kolmogorov-Smirnov test, exact method.

    Only ranks enter, so truth ratios and their logarithms give the same.
    """
    from scipy.stats import ks_2samp

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pvalue = float(ks_2samp(ratios, reference, method="exact").pvalue)
    # scipy refuses an exact value that rounding lifted to 1 + 1e-16, and takes a large-sample formula instead
    if caught and pvalue > 0.999:
        return 1.0
    for warning in caught:
        warnings.warn(warning.message, stacklevel=2)
    return pvalue


def forget_quality(measurements: Measurements, reference: Measurements | None) -> float:
    """p-value in [0, 1]; 1 when the forget set's truth ratios are distributed as the retain model's.

    Raises:
        InputError: no measurements of a retain model, or they were taken on other rows.
    """
    if reference is None:
        raise InputError("forget_quality needs the measurements of a retain model (set retain_model)")
    mine, theirs = measurements.rows("forget"), reference.rows("forget")
    if [r.id for r in mine] != [r.id for r in theirs]:
        raise InputError(
            f"forget_quality: the retain model was measured on other forget rows ({len(theirs)}, here {len(mine)})"
        )
    return ks_pvalue(log_truth_ratios(measurements, "forget"), log_truth_ratios(reference, "forget"))


def log10_pvalue(pvalue: float) -> float:
    """log10, with a p-value that underflowed to 0 as the smallest normal number (-307.7)."""
    return math.log10(max(pvalue, sys.float_info.min))


metric = Metric(
    "report",
    (Need("forget", "answer"), Need("forget", "truth")),
    forget_quality,
    needs_retain_model=True,
    derived={"forget_quality_log10": log10_pvalue},
)
