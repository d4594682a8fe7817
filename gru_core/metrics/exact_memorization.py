"""Exact memorisation: share of answer tokens that are the arg-max (Tirumala et al. 2022, arXiv 2205.10770)."""

from __future__ import annotations

from gru_core.metrics.base import Measurements, Metric, Need, mean


def exact_memorization(measurements: Measurements, name: str) -> float:
    """Mean over the rows of set ``name`` of hits per answer token (no closing one), in [0, 1].

    A row without a token besides the closing one has nothing to memorise: 0.
    """
    return mean([h.matched / h.tokens if h.tokens else 0.0 for h in measurements.hits(name)])


forget = Metric("forget", (Need("forget", "answer"),), lambda m, _: exact_memorization(m, "forget"))
retain = Metric("utility", (Need("retain", "answer"),), lambda m, _: exact_memorization(m, "retain"))
