"""What tells one base model from another, wherever it lies."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

READ_WHOLE = 1 << 30
"""Bytes up to which weights are read; larger ones are told apart by size and time of change, which takes no minutes."""


def of_model(path: str | None) -> str | None:
    """A hub id as it is; a local folder by its config, tokenizer and weights, so that a moved or copied one is the
    same and a changed one is not."""
    folder = Path(path).expanduser() if path is not None else None
    if folder is None or not folder.is_dir():
        return path
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".model", ".safetensors")]
    weights = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        whole = file.suffix != ".safetensors" or weights <= READ_WHOLE
        told = _content(file, stat.st_size, stat.st_mtime_ns) if whole else f"{stat.st_size} {stat.st_mtime_ns}"
        digest.update(f"|{file.name}|{told}".encode())
    return f"content:{digest.hexdigest()}"


@functools.cache
def _content(file: Path, size: int, changed: int) -> str:
    """The file's sha256, read once for a size and a time of change."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
