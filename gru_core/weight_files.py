"""The tensors of a model's safetensors files, read slice by slice under the names that the model gives them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gru_core.errors import InputError


class WeightFiles:
    """What :func:`safetensors.safe_open` gives, over all files of a model folder.

    Args:
        model: as built from its settings, without adapters; gives the names.
        what: names the model in errors.

    Raises:
        InputError: a file is missing or damaged, or holds the model's tensors in another form.
    """

    def __init__(self, folder: Path, model: Any, what: str) -> None:
        self.what = what
        try:
            opened = [safe_open(folder / name, framework="pt") for name in _file_names(folder, what)]
            held = {key: file for file in opened for key in file.keys()}  # noqa: SIM118 (a file is no mapping)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"{what}: its weights cannot be read: {str(error).splitlines()[0]}") from None
        self._held = held
        self._keys = {key: key for key in held}
        if _names(model) - held.keys():
            self._keys |= _renamed(model, held)

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def piece(self, name: str, shape: list[int]) -> Any:
        """The tensor called ``name``, to be sliced: nothing is read before.

        Raises:
            InputError: it is not there, or has another shape.
        """
        if name not in self._keys:
            raise InputError(
                f"{self.what} has no tensor {name!r} in its files: strategy fsdp reads weights row by row and cannot "
                "put a tensor together from others, as models with fused experts need (allowed: train.strategy ddp)"
            )
        key = self._keys[name]
        piece = self._held[key].get_slice(key)
        if piece.get_shape() != shape:
            raise InputError(f"{self.what}: tensor {name!r} has shape {piece.get_shape()}, the model wants {shape}")
        return piece


def _file_names(folder: Path, what: str) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise InputError(f"{what}: {index.name} names files outside of its folder")
    return names


def _names(model: Any) -> set[str]:
    """What the files should hold: parameters, tied ones under their first name."""
    return {name for name, _ in model.named_parameters()}


def _renamed(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Model name to file key, for files that were written under older names, or for the model without its head.

    What would have to be computed from several tensors is left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    found = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, model.state_dict())
        if converted is None:
            found[name] = key
    return found
