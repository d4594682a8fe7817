"""What tells one base model from another, wherever it lies."""

from __future__ import annotations

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
        digest.update(f"|{file.name}|".encode())
        if file.suffix == ".safetensors" and weights > READ_WHOLE:
            digest.update(f"{file.stat().st_size} {file.stat().st_mtime_ns}".encode())
        else:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return f"content:{digest.hexdigest()}"
