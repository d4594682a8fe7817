"""Extraction strength: how little of an answer has to be given for the rest to follow (Carlini et al. 2021)."""

from __future__ import annotations

from gru_core.metrics.base import Convention, Hits, Measurements, Metric, Need, mean


def strength(hits: Hits, convention: Convention = "original") -> float:
    """``1 - k/n``: n answer tokens (no closing one), k the prefix after which all the rest is the arg-max.

    0 when not even the last token is (``k = n``). OpenUnlearning's loop stops at ``k = n - 1`` and has ``1/n`` there.
    A row without a token besides the closing one has nothing to extract: 0.
    """
    last = hits.tokens - (convention == "openunlearning")
    return 1.0 - min(hits.prefix, last) / hits.tokens if hits.tokens else 0.0


def extraction_strength(measurements: Measurements, name: str) -> float:
    """Mean over set ``name``, in [0, 1]."""
    return mean([strength(h, measurements.convention) for h in measurements.hits(name)])


forget = Metric("forget", (Need("forget", "answer"),), lambda m, _: extraction_strength(m, "forget"))
retain = Metric("utility", (Need("retain", "answer"),), lambda m, _: extraction_strength(m, "retain"))
