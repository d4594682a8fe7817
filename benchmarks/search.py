"""What Ray costs a search of small trials: 12 trials by ``gru search`` against the same 12 in one plain process.

    python benchmarks/search.py [--json] [--trials 12] [--repeats 1]

- ``ratio_search``: wall time of the search (Ray's start, inputs, trials, MLflow, frontier) at concurrency 1 over
  that of one plain Python process that runs the same 12 configs one after the other, same threads. Both are
  timed as whole processes, imports included.
- ``startup_seconds``: median time from the end of a trial to the first step of the next.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SETTINGS = (
    "search.sampler=random", "search.concurrent=1", "unlearn.steps=120", "unlearn.evaluate_every=40",
    "search.space={unlearn.objective: [ga, npo], unlearn.lr: {low: 1.0e-4, high: 5.0e-4}, retain.size: [200, 600]}",
)  # fmt: skip


def gru(*arguments: str, environment: dict[str, str]) -> float:
    """Wall seconds of one command."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments], check=True, env=environment, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def plain(configs: list[str], folder: Path) -> None:
    """The same runs in this process: inputs once, then one after the other, without Ray or MLflow."""
    from dataclasses import replace

    import torch

    from gru_core.parallel import Group
    from pipelines import inputs, settings, worker

    torch.set_num_threads(1)
    shared = None
    for number, name in enumerate(configs):
        config = settings.load(name)
        if shared is None:
            shared = inputs.load(config)
            shared = shared.with_baseline(inputs.measure_baseline(config, shared, Group()))
        out = folder / f"{number:02d}"
        config = replace(config, output=replace(config.output, dir=str(out)))
        worker.work(config, out, shared=shared, group=Group())


def startup(folder: Path) -> list[float]:
    """Seconds from each trial's end to the first step of the one after it."""
    from pipelines import journal

    spans = []
    for trial in (folder / "trials").iterdir():
        entries, _ = journal.read(trial)
        first = next(e["time_ms"] for e in entries if e["kind"] == "metrics" and "train/lr" in e["metrics"])
        last = max(e["time_ms"] for e in entries if "time_ms" in e)
        spans.append((first, last))
    spans.sort()
    return [(spans[i + 1][0] - spans[i][1]) / 1000 for i in range(len(spans) - 1)]


def once(args: argparse.Namespace, environment: dict[str, str]) -> tuple[float, float, list[float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [v for s in (*SETTINGS, f"search.trials={args.trials}") for v in ("--set", s)]
        environment = environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        searched = gru("search", "-c", "demo", *common, "--output", str(folder / "search"), environment=environment)
        configs = [str(f) for f in sorted((folder / "search" / "trials").glob("*/config.yaml"))]
        assert len(configs) == args.trials
        command = [sys.executable, __file__, "--plain", str(folder / "plain"), *configs]
        start = time.perf_counter()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        alone = time.perf_counter() - start
        _same_scores(folder)
        return searched, alone, startup(folder / "search")


def _same_scores(folder: Path) -> None:
    """Both ways ran the same trials, or the comparison means nothing."""
    trials = sorted((folder / "search" / "trials").glob("*/scores.json"))
    for number, file in enumerate(trials):
        ours, theirs = (json.loads(f.read_text()) for f in (file, folder / "plain" / f"{number:02d}" / "scores.json"))
        assert ours["scores"] == theirs["scores"], file


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trials", type=int, default=12, help="a multiple of 3")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    parser.add_argument("configs", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.plain:
        plain(args.configs, Path(args.plain))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    gru("prepare", "-c", "demo", environment=environment)
    runs = [once(args, environment) for _ in range(args.repeats)]
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "trials": args.trials,
        "repeats": args.repeats,
        "search_seconds": [round(r[0], 2) for r in runs],
        "plain_seconds": [round(r[1], 2) for r in runs],
        "startup_seconds": round(statistics.median(s for r in runs for s in r[2]), 3),
        "startup_seconds_max": round(max(s for r in runs for s in r[2]), 3),
        "ratio_search": statistics.median(r[0] / r[1] for r in runs),
    }
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        print(f"{name:<20} {value}")


if __name__ == "__main__":
    main()
