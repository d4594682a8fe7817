"""MUSE's memorisation metrics (Shi et al. 2024, arXiv 2407.06460, section 3.1): verbatim text, and knowledge of it.

PrivLeak, its privacy metric, is :data:`gru_core.metrics.membership.METRICS`' ``privleak``.
"""

from __future__ import annotations

from gru_core.metrics.base import Kind, Metric, Need, Role, mean


def _f1(role: Role, name: str, kind: Kind) -> Metric:
    """Mean ROUGE-L F1 over set ``name``, in [0, 1]."""
    return Metric(role, (Need(name, kind),), lambda m, _: mean(m.f1s(name)))


METRICS = {
    "forget_verbmem": _f1("forget", "verbmem", "continuation"),
    "forget_knowmem": _f1("forget", "forget_knowmem", "reply"),
    "retain_knowmem": _f1("utility", "retain_knowmem", "reply"),
}
