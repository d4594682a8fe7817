"""Model utility: the harmonic mean of nine numbers (TOFU, arXiv 2401.06121, section 2.2.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gru_core.metrics.base import Measurements, Metric, Need, Role
from gru_core.metrics.probability import mean_choice_probability, probability
from gru_core.metrics.rouge import rouge
from gru_core.metrics.truth_ratio import truth

Part = tuple[tuple[Need, ...], Callable[[Measurements, str], float]]


def _parts(name: str) -> dict[str, Part]:
    answer, perturbed, generated = Need(name, "answer"), Need(name, "truth"), Need(name, "rouge")
    chance: Part = ((answer,), probability) if name == "retain" else ((answer, perturbed), mean_choice_probability)
    return {
        f"{name} probability": chance,
        f"{name} ROUGE": ((generated,), rouge),
        f"{name} truth ratio": ((answer, perturbed), truth),
    }


PARTS: dict[str, Part] = _parts("retain") | _parts("authors") | _parts("facts")
"""The nine numbers: name to what each needs and how it is computed."""


def harmonic_mean(values: Sequence[float]) -> float:
    """``n / sum(1/x)`` of numbers from 0; 0 as soon as one of them is 0."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1.0 / v for v in values)


def utility_parts(measurements: Measurements) -> dict[str, float]:
    """Those of the nine numbers that were measured, by name."""
    return {
        part: compute(measurements, needs[0].set)
        for part, (needs, compute) in PARTS.items()
        if all(map(measurements.holds, needs))
    }


def notes(measurements: Measurements) -> list[str]:
    """What was left out of the harmonic mean, in at most one line."""
    present = utility_parts(measurements)
    missing = [part for part in PARTS if part not in present]
    if not missing:
        return []
    return [f"model_utility: harmonic mean of {len(present)} of 9 numbers; the benchmark lacks {', '.join(missing)}"]


model_utility = Metric(
    "utility",
    tuple(dict.fromkeys(need for needs, _ in PARTS.values() for need in needs)),
    lambda m, _: harmonic_mean(list(utility_parts(m).values())),
    partial=True,
)


def _metric(part: str) -> Metric:
    needs, compute = PARTS[part]
    # a truth ratio stays far below 1 for a perfect model, so that losing it shows little: it spans no trade-off
    role: Role = "report" if compute is truth else "utility"
    return Metric(role, needs, lambda m, _: compute(m, needs[0].set))


METRICS = {part.replace(" ", "_").lower(): _metric(part) for part in PARTS if not part.startswith("retain")}
"""The parts that are not those of the retain set, each as a metric of its own."""
