"""Search folders as a search leaves them, written without training: for tests of tracking, frontier and pages."""

from __future__ import annotations

import math
import random
from pathlib import Path

from pipelines.journal import Journal

RULES = {"plain": "none", "sum": "sum", "rectified": "gru"}
REACH = {"plain": 0.45, "sum": 0.75, "rectified": 0.85}
TRAIN = ("forget_loss", "retain_loss", "cosine", "conflict", "weight_forget", "weight_retain", "update_norm", "lr")


def write_trial(
    folder: Path, name: str, family: str, *, steps: int = 60, every: int = 20, seed: int = 0, status: str = "finished"
) -> None:
    """One run folder: parameters, training metrics at every step, scores at every evaluated step, its end."""
    draw = random.Random(seed)
    strength, size, lr = draw.uniform(0.5, 5), draw.choice([100, 200, 400]), 10 ** draw.uniform(-5, -3)
    reach = REACH.get(family, 0.6) * draw.uniform(0.8, 1.0)
    with Journal(folder) as journal:
        journal.run(name, {"gru.kind": "trial", "gru.family": family, "gru.trial": name})
        journal.params(
            {
                "rectify.rule": RULES.get(family, family),
                "rectify.strength": strength if family == "rectified" else 0.0,
                "retain.size": size,
                "unlearn.lr": lr,
                "unlearn.objective": draw.choice(["npo", "wga"]),
                "unlearn.steps": steps,
                "unlearn.evaluate_every": every,
                "evaluate.unlearning": "extraction_strength",
                "evaluate.retention": "model_utility",
                "retain_model": None,
                "output.dir": str(folder),
            }
        )
        last = steps if status == "finished" else steps // 2
        for step in range(last + 1):
            if step:
                journal.metrics(step, {f"train/{key}": draw.random() for key in TRAIN})
            if step % every == 0 or step == last:
                forgotten = step / steps * (0.4 + 0.6 * draw.random() ** 0.5) if step else 0.0
                kept = max(0.0, 1 - (1 - reach) * 2 * math.expm1(forgotten)) if step else 1.0
                journal.metrics(
                    step,
                    {
                        "eval/unlearning": round(forgotten, 4),
                        "eval/retention": round(kept, 4),
                        "eval/extraction_strength": round(0.9 * (1 - forgotten), 4),
                        "eval/model_utility": round(0.6 * kept, 4),
                    },
                )
        journal.status(status)


def write_search(folder: Path, trials: int = 3, *, families: tuple[str, ...] = tuple(RULES), steps: int = 60) -> Path:
    """A search folder with ``trials`` trials for each family; the last one of plain collapsed."""
    with Journal(folder) as journal:
        journal.run(folder.name, {"gru.kind": "search"})
        journal.params({"search.trials": trials * len(families), "unlearn.steps": steps})
        journal.status("finished")
    for place, family in enumerate(families):
        for number in range(trials):
            name = f"{family}-{number:03d}"
            collapsed = family == "plain" and number == trials - 1
            write_trial(
                folder / "trials" / name, name, family, steps=steps, seed=100 * place + number,
                status="collapsed" if collapsed else "finished",
            )  # fmt: skip
    return folder
