"""What a result was made with: commit and library versions, settings; the rows, named by count and hash."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gru_core.batch import Row
from gru_core.benchmarks import Benchmark, EvalRow, retain_subset
from gru_core.config import RunConfig
from gru_core.rectify import RULES
from pipelines import settings

VARIABLE = "GRU_COMMIT"
"""Environment variable that tells the commit where the code lies without its ``.git``: in jobs and images."""
LIBRARIES = ("gru-unlearning", "torch", "transformers", "ray", "mlflow", "optuna")


def tags() -> dict[str, str]:
    """``gru.versions.<library>``, and ``gru.commit`` where it is known (see :func:`commit`)."""
    found = {}
    for name in LIBRARIES:
        try:
            found[f"gru.versions.{name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    known = commit()
    return found | ({"gru.commit": known} if known else {})


def inputs(model: nn.Module, benchmark: Benchmark, config: RunConfig) -> dict[str, str]:
    """What a report says of model and data where neither is at hand any more: counts and hashes.

    ``gru.parameters`` and ``gru.parameters.trained`` (of a sharded model, too, the global counts); ``gru.rows.<set>``
    and ``gru.sha256.<set>`` of each set that is not empty (``forget``, ``retain``, ``background``, ``scored.<name>``),
    so that whoever was given the same rows can tell that they are, and nobody else learns what they say;
    ``gru.rows.retain.trained``, the size of the retain subset.
    """
    parameters = list(model.parameters())
    found = {
        "gru.parameters": str(sum(p.numel() for p in parameters)),
        "gru.parameters.trained": str(sum(p.numel() for p in parameters if p.requires_grad)),
        "gru.rows.retain.trained": str(len(retain_subset(benchmark, config.retain, config.train.seed))),
    }
    sets: dict[str, Sequence[Row | EvalRow]] = {
        "forget": benchmark.forget,
        "retain": benchmark.retain,
        "background": benchmark.background,
        **{f"scored.{name}": rows for name, rows in benchmark.scored.items()},
    }
    for name, rows in sets.items():
        if rows:
            found |= {f"gru.rows.{name}": str(len(rows)), f"gru.sha256.{name}": fingerprint(rows)}
    return found


def params(config: RunConfig) -> dict[str, Any]:
    """The config, flat, less the settings of ``rectify`` that the chosen rule does not read."""
    read = {"rule", *RULES[config.rectify.rule](config.rectify).uses}
    flat = settings.flat(config)
    return {k: v for k, v in flat.items() if not k.startswith("rectify.") or k.split(".")[1] in read}


def fingerprint(rows: Iterable[Row | EvalRow]) -> str:
    """sha256 over the rows in order: for each the JSON list of prompt and answer (of a scored row also paraphrase and
    wrong answers), UTF-8, and a newline."""
    digest = hashlib.sha256()
    for row in rows:
        more = [row.paraphrase, list(row.perturbed)] if isinstance(row, EvalRow) else []
        digest.update(json.dumps([row.prompt, row.answer, *more], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def carried() -> dict[str, str]:
    """The variable that tells a job the commit of the code that it is sent; empty where that is unknown."""
    known = commit()
    return {VARIABLE: known} if known else {}


def commit() -> str | None:
    """Commit of the running code, ``+changes`` where files differ from it; None where it is unknown.

    The code's own git checkout tells; else ``GRU_COMMIT``, if it is set to a commit.
    """
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():  # not: some repository further up, whose environment we are installed in
        return _checkout(root)
    given = os.environ.get(VARIABLE, "")
    return given if re.fullmatch(r"[0-9a-f]{7,64}(\+changes)?", given) else None


def _checkout(root: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, a repository of another user
        return None
    return head + ("+changes" if changed else "")
