"""Known vulnerabilities of the pinned packages, as a report: it never fails a build.

What is published overnight about somebody else's package must not stop a change here; whoever releases reads it.
Exit code 0 always: findings, no answer from the database, or none within ``LIMIT_S``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PINNED = Path(__file__).resolve().parents[1] / "constraints.txt"
LIMIT_S = 120


def audit(limit_s: float = LIMIT_S) -> str:
    """What pip-audit prints about ``constraints.txt``: one JSON document; empty where it could not tell.

    ``--disable-pip`` and ``--no-deps``: the file is complete, so nothing is resolved or downloaded.
    """
    command = [
        sys.executable, "-m", "pip_audit", "--requirement", str(PINNED), "--no-deps", "--disable-pip",
        "--format", "json", "--progress-spinner", "off", "--timeout", "10",
    ]  # fmt: skip
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=limit_s).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def report(text: str) -> list[str]:
    """Findings, then what was looked at: a package that the database does not know was not checked."""
    try:
        packages: list[dict[str, Any]] = json.loads(text)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return ["audit: no answer from the vulnerability database; nothing was checked"]
    known = [package for package in packages if "skip_reason" not in package]
    if not known:
        return [f"audit: the vulnerability database told nothing about the {len(packages)} packages; none was checked"]
    lines = [
        f"audit: {package['name']} {package['version']}: {found['id']}, fixed in "
        f"{', '.join(found.get('fix_versions', ())) or 'no release yet'}"
        for package in known
        for found in package.get("vulns", ())
    ]
    return [*lines, f"audit: {len(lines)} findings in {len(known)} of {len(packages)} packages that could be looked up"]


if __name__ == "__main__":
    print("\n".join(report(audit())), flush=True)
