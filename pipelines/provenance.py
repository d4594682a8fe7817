"""What a result was made with: commit and library versions, as tags."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

LIBRARIES = ("gru-unlearning", "torch", "transformers", "ray", "mlflow", "optuna")


def tags() -> dict[str, str]:
    """``gru.versions.<library>``, and ``gru.commit`` where the code runs from a git checkout of its own."""
    found = {}
    for name in LIBRARIES:
        try:
            found[f"gru.versions.{name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():  # not: some repository further up, whose environment we are installed in
        found |= _commit(root)
    return found


def _commit(root: Path) -> dict[str, str]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, a repository of another user
        return {}
    return {"gru.commit": commit + ("+changes" if changed else "")}
