"""A model folder for a report: shape, size and the hashes of its weight files. No weight is loaded."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Say = Callable[[str], None]
SHAPE = {
    "model_type": "kind",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "attention heads",
    "vocab_size": "vocabulary",
}
"""Keys of ``config.json`` and what a report calls them."""
LARGE = 1 << 30
"""Bytes from which the hashing of a file is announced."""


def describe(path: str | None, say: Say) -> dict[str, Any] | None:
    """``{"path", "here", "shape", "parameters", "files"}`` of a model; None for no path.

    ``here`` is false for what is no folder of this machine: a hub id, or a model that has been moved or deleted; then
    nothing else is known. ``files`` lists ``{"name", "bytes", "sha256"}`` of every weight file, as ``sha256sum``
    gives it. An adapter has its base model's shape beside it nowhere: only its own files are told.
    """
    if not path:
        return None
    folder = Path(path).expanduser()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return {"path": path, "here": False, "shape": {}, "parameters": None, "files": []}
    return {
        "path": path,
        "here": True,
        "shape": _shape(folder / "config.json"),
        "parameters": sum(parameters(file) for file in files),
        "files": [_file(file, say) for file in files],
    }


def _shape(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    config = json.loads(file.read_text(encoding="utf-8"))
    return {label: config[key] for key, label in SHAPE.items() if isinstance(config.get(key), str | int)}


def parameters(file: Path) -> int:
    """Numbers in a safetensors file, from its header: 8 bytes of length, then JSON with the shape of every tensor."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _file(file: Path, say: Say) -> dict[str, Any]:
    size = file.stat().st_size
    if size >= LARGE:
        say(f"hashing {file.name} ({size / 1e9:.1f} GB)")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"name": file.name, "bytes": size, "sha256": digest}
