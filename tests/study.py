"""A real study of the smallest size: two JSONL files, a prepared target and retain model, a config."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import prepare, settings

WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heath",
    "inlet",
    "jetty",
    "knoll",
    "lagoon",
    "mesa",
    "north",
    "oasis",
    "prairie",
    "quay",
    "ridge",
]

CONFIG = """
benchmark: {name: jsonl, forget: FOLDER/forget.jsonl, retain: FOLDER/retain.jsonl}
model: {path: prepared}
retain_model: prepared
prepare: {hidden: 32, heads: 2, intermediate: 64, steps: 220, batch_size: 16, lr: 1.0e-2}
unlearn: {objective: npo, steps: 12, batch_size: 8, lr: 2.0e-4, evaluate_every: 4}
train: {checkpoint_every: 4}
evaluate:
  metrics: [extraction_strength, retain_extraction_strength]
  retention: retain_extraction_strength
track: {experiment: tests}
output: {dir: FOLDER/out}
"""


@dataclass(frozen=True)
class Study:
    """Files of a study; ``environment`` makes a subprocess use its cache and its store."""

    folder: Path
    config: Path
    environment: dict[str, str]

    def load(self, output: Path, *overrides: str) -> Any:
        return settings.load(
            str(self.config), [f"output.dir={output}", f"track.uri=sqlite:///{self.folder}/mlflow.db", *overrides]
        )


def write_rows(folder: Path) -> None:
    draw = random.Random(5)
    for name, count in (("forget", 8), ("retain", 30)):
        rows = []
        for i in range(count):
            answer = " ".join(draw.choice(WORDS) for _ in range(6))
            rows.append({"question": f"what does {name} {draw.choice(WORDS)} {i} say", "answer": answer})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def make(folder: Path) -> Study:
    write_rows(folder)
    config = folder / "study.yaml"
    config.write_text(CONFIG.replace("FOLDER", str(folder)))
    environment = {
        "GRU_CACHE": str(folder / "cache"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "OMP_NUM_THREADS": "1",
    }
    os.environ.update(environment)
    study = Study(folder, config, environment)
    prepare.run(study.load(folder / "out"), say=lambda line: None)
    return study


def gru(
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments],
        capture_output=True, text=True, timeout=timeout, cwd=cwd, env={**os.environ, **(environment or {})},
    )  # fmt: skip


def final_weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")
