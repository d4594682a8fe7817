"""How far runs on several workers are from the run in one process: every objective, rule, retain loss and layout.

    python benchmarks/invariance.py [--write docs/results/invariance.md]

Takes the matrix of tests/invariance.py: 20 steps of a tiny Llama (2 layers, hidden size 16), global batch of 10 rows,
gloo on the CPU. Without ``--write`` it prints the document.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import invariance
from tests.invariance import Difference

PRECISIONS = {
    "fp64-adamw": "float64, AdamW",
    "fp32-sgd": "float32, SGD",
    "fp32-adamw": "float32, AdamW",
}


def table(found: dict[str, list[Difference]], key: str) -> list[str]:
    """Largest differences by ``key`` of a difference: ``layout`` or ``what``."""
    groups: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for precision, differences in found.items():
        for d in differences:
            case = d.case
            what = f"{case.objective}, {case.rule}, {case.retain}{', LoRA' if case.lora else ''}"
            nearly = ", nearly opposite gradients" if case.cancels else ""
            name = f"{d.layout}{nearly}" if key == "layout" else f"{what}{nearly}"
            groups[name][precision] = max(groups[name][precision], d.weights)
    lines = [f"| {key} | " + " | ".join(PRECISIONS.values()) + " |", "| --- |" + " --- |" * len(PRECISIONS)]
    for name, worst in groups.items():
        lines.append(f"| {name} | " + " | ".join(f"{worst[p]:.1e}" if p in worst else "" for p in PRECISIONS) + " |")
    return lines


def document(found: dict[str, list[Difference]]) -> str:
    """The page."""
    cells = {d.case for d in found["fp64-adamw"]}
    metrics = {p: max(d.metrics for d in differences) for p, differences in found.items()}
    lines = [
        "# The same run on any number of workers",
        "",
        f"Measured {time.strftime('%Y-%m-%d')} on the CPU ({platform.processor() or platform.machine()}, gloo, torch "
        f"{torch.__version__}) by `python benchmarks/invariance.py`; {len(cells)} combinations, "
        f"{sum(map(len, found.values()))} runs compared. Each run takes {invariance.STEPS} steps with a global batch "
        "of 10 rows (on 4 workers: 3, 3, 2 and 2) and is compared with one process that takes the batch at once. "
        "Numbers are the norm of the difference of the final weights over the norm of the whole update; the largest of "
        "each group.",
        "",
        "The test suite demands 1e-8 in float64 under AdamW for all of them, and 1e-5 in float32 under SGD for the "
        "rectified ones, less those with nearly opposite gradients, of which 1 % is left, so that rounding weighs a "
        "hundred times as much. AdamW in float32 is measured and not demanded: its first steps have the size of the "
        "learning rate whatever the gradient's, so that a rounding error in a gradient near 0 can turn a whole step "
        "around.",
        "",
        "The tracked metrics of every step (losses, cosine, weights applied, update norm) differ by at most "
        + ", ".join(f"{value:.0e} ({PRECISIONS[p]})" for p, value in metrics.items())
        + " of their value.",
        "",
        "## By layout",
        *table(found, "layout"),
        "",
        "## By objective, rule and retain loss",
        *table(found, "what"),
        "",
        "Layouts are worker counts that are powers of two. With three workers the shares of a gradient are multiplied "
        "by 3 and divided again, which rounds: in a model that computes its norms in float32 whatever the weights are "
        "(Llama does) float64 runs then agree to float32 rounding alone. NCCL and GPUs were not at hand.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="FILE")
    args = parser.parse_args()
    found = {precision: invariance.measure(precision) for precision in PRECISIONS}
    page = document(found)
    if args.write:
        Path(args.write).write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
