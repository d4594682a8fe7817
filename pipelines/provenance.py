"""What a result was made with: commit and library versions, as tags."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

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
