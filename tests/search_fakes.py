"""A search without training: a work function that is a formula, with a real journal and real checkpoints to lose.

As a module it is the driver of such a search: ``python -m tests.search_fakes OUTPUT_DIR SECONDS [resume]``.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gru_core.config import RunConfig
from gru_core.errors import InputError
from pipelines import search, settings
from pipelines.journal import Journal
from pipelines.trial import Job
from tests.mlflow_server import empty_store

SPACE = {"unlearn.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "retain.size": [50, 200]}
STEPS = 3


def study(folder: Path, **values: Any) -> RunConfig:
    """Three default families over :data:`SPACE`, tracked beside ``folder``."""
    store = folder.parent / "mlflow.db"
    if not store.exists():
        empty_store(store)
    given = {
        "output.dir": str(folder),
        "track.uri": f"sqlite:///{store}",
        "evaluate.metrics": ["extraction_strength", "model_utility"],
        "search.trials": 6,
        "search.space": SPACE,
    }
    return settings.with_values(settings.load(None), given | values)


def load(config: RunConfig, retains: Sequence[Any], gpus: float) -> tuple[Any, list[int]]:
    """Stands for model, data and baseline."""
    return {"model": config.model.path}, [int(retain.size) for retain, _ in retains]


def work(
    job: Job, report: Any, *, seconds: float = 0.0, broken: tuple[str, ...] = (), refused: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Unlearning grows with steps and learning rate, retention falls with it, the less the stronger the rule."""
    import ray

    assert ray.get(job.shared) == {"model": job.config.model.path}
    with (job.folder / "starts").open("a") as file:
        file.write("started\n")
    if job.name in refused:
        raise InputError("retain.size: too large for a fake")
    if job.name in broken:
        raise OSError("a fake that breaks")
    checkpoint = job.folder / "checkpoints" / "step"
    checkpoint.parent.mkdir(exist_ok=True)
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    points = []
    with Journal(job.folder) as journal:
        journal.run(job.name, job.tags)
        journal.params(settings.flat(job.config))
        for step in range(STEPS + 1):
            scores = {"unlearning": formula(job.config, step), "retention": 1 - formula(job.config, step) ** 2}
            points.append({"step": step, **scores})
            if step >= first:
                time.sleep(seconds / STEPS)
                journal.metrics(step, {f"eval/{key}": value for key, value in scores.items()})
                checkpoint.write_text(str(step))
                report(points[-1])
        journal.status("finished")
    return {"status": "finished", "steps": STEPS, "scores": scores, "points": points}


def formula(config: RunConfig, step: int) -> float:
    """Unlearning after ``step`` steps."""
    return min(1.0, step / STEPS * config.unlearn.lr * 100)


def prepared(config: RunConfig, *, say: Any) -> RunConfig:
    """In place of ``prepare.resolve``: trains nothing."""
    return config


def main(folder: Path, seconds: float, resume: bool) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    search.prepare.resolve = prepared
    document = search.run(
        study(folder, **{"search.concurrent": 1}), resume=resume, say=functools.partial(print, flush=True),
        work=functools.partial(work, seconds=seconds), load=load,
    )  # fmt: skip
    print("done", document["trials"], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), "resume" in sys.argv[3:])
