"""YAML and ``--set`` into a checked :class:`~gru_core.config.RunConfig`, and back.

The dataclasses of ``gru_core.config`` are the schema; pydantic checks types and unknown keys against them.
Every error is an :class:`~gru_core.errors.InputError` of one line: the dotted key, what was given, what is
allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from gru_core.config import RunConfig
from gru_core.errors import ConfigError, InputError
from pipelines import yamltext
from pipelines.checks import check

__all__ = ["HEADER", "check", "flat", "from_dict", "keys", "load", "shipped", "to_dict", "to_yaml", "with_values"]

HEADER = "# Resolved configuration, written by gru"
"""First line of every config that :func:`to_yaml` writes: marks a folder as a result."""

Scalar = str | int | float | bool | None


def load(source: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a YAML file or a shipped study, with overrides; types and ranges checked.

    Names (objective, benchmark, ...) are left to :func:`check`, which needs the registries.

    Args:
        source: path of a YAML file, the name of a shipped study (``demo``), or None: all defaults.
        overrides: ``dotted.key=value`` each, the value in YAML; later ones win. A section may be set as a
            mapping and then changes only the keys it names.

    Raises:
        InputError: no such file or study, malformed YAML, an unknown key, a wrong type, a value out of range.
    """
    tree = {} if source is None else _mapping(yamltext.parse(_read(source), source), source)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {override!r}: expected key=value, such as rectify.strength=1.5")
        _assign(tree, key.strip(), yamltext.parse(text, f"--set {key}"))
    return from_dict(tree)


def shipped() -> list[str]:
    """Names of the studies in the package, which ``load`` takes in place of a path."""
    folder = resources.files("tune_configs")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _read(source: str) -> str:
    path = Path(source).expanduser()
    names = shipped()
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        if source in names:
            return (resources.files("tune_configs") / f"{source}.yaml").read_text(encoding="utf-8")
        if path.is_dir():
            raise InputError(f"{source}: a folder, expected a YAML file")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not a text file (byte {error.start} is not UTF-8)") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source!r}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"no config file or shipped study {source!r}{hint} (shipped: {', '.join(names)})")


def _mapping(value: object, source: str) -> dict[str, Any]:
    if value is None:  # an empty file, or one of comments only
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{source}: got {type(value).__name__}, allowed: a mapping of sections")
    return value


# ---------------------------------------------------------------------------------------------- validation


@functools.cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """A config from nested mappings, as YAML gives them; a section that is null counts as empty.

    Raises:
        InputError: an unknown key, a wrong type or a value out of range.
    """
    sections = {key: {} if value is None and _is_section(key) else value for key, value in tree.items()}
    try:
        # pydantic's strict mode takes mappings for dataclasses, and lists for tuples, in JSON alone.
        return _adapter().validate_json(json.dumps(sections))
    except ValidationError as error:
        raise _explain(error) from None
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"config: a value that no key can hold ({error})") from None


def _is_section(key: object) -> bool:
    return isinstance(key, str) and dataclasses.is_dataclass(_hints(RunConfig).get(key))


def _explain(error: ValidationError) -> InputError:
    """The first problem that pydantic found, in one line of our own; unknown keys come first."""
    problems = error.errors(include_url=False)
    order = {"unexpected_keyword_argument": 0, "value_error": 2}
    problem = min(problems, key=lambda item: order.get(item["type"], 1))
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "unexpected_keyword_argument":
        return _unknown_key(path)
    own = problem.get("ctx", {}).get("error")
    if isinstance(own, InputError):
        return own
    names, hint = _locate(path)
    value = problem["input"]
    return ConfigError(".".join(names) or "config", value, _words(hint))


def _unknown_key(path: list[str]) -> InputError:
    """``path`` ends in the unknown key; a key of that name in another section counts as the nearest match."""
    _, level = _locate(path[:-1])
    prefix = "".join(f"{part}." for part in path[:-1])
    valid = [prefix + field.name for field in dataclasses.fields(level)]
    elsewhere = [key for key in keys() if key.rsplit(".", 1)[-1] == path[-1]]
    near = difflib.get_close_matches(".".join(path), valid, n=1, cutoff=0.6)
    best = next(iter(elsewhere or near), None)
    hint = f"; did you mean {best!r}?" if best else ""
    return InputError(f"unknown key {'.'.join(path)!r}{hint} (valid: {', '.join(valid)})")


# ------------------------------------------------------------------------------------------ schema walking


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _locate(path: Sequence[str]) -> tuple[list[str], Any]:
    """The part of ``path`` that names config fields, and the type that stands there.

    pydantic appends the branch of a union and the index in a list to a location; those are cut off.
    """
    names: list[str] = []
    here: Any = RunConfig
    for part in path:
        here = _section(here)
        if dataclasses.is_dataclass(here):
            if part not in _hints(typing.cast(type, here)):  # the branch of a union, where a section may be null
                continue
            here = _hints(typing.cast(type, here))[part]
        elif typing.get_origin(here) is dict and dataclasses.is_dataclass(typing.get_args(here)[1]):
            here = typing.get_args(here)[1]
        else:
            break
        names.append(part)
    return names, _section(here)


def _section(hint: Any) -> Any:
    """The dataclass of a section that may be null; any other type as it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((arg for arg in typing.get_args(hint) if dataclasses.is_dataclass(arg)), hint)
    return hint


def _words(hint: Any) -> str:
    """A type in words, for people who do not read Python."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(arg) for arg in args)
    if origin is tuple:
        return f"a list, each entry {_words(args[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return words[hint]


def keys() -> list[str]:
    """Every dotted key that holds a value, such as ``rectify.strength``, in the order of the config."""
    return list(_leaves(RunConfig, ""))


def _leaves(cls: type, prefix: str) -> Iterator[str]:
    for name, hint in _hints(cls).items():
        if name.startswith("__"):
            continue
        hint = _section(hint)
        if dataclasses.is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name


# ----------------------------------------------------------------------------------------------- overrides


def _assign(tree: dict[str, Any], key: str, value: object) -> None:
    """Puts ``value`` at the dotted ``key`` in ``tree``; sections are merged, everything else is replaced."""
    parts = _split(key)
    names, _ = _locate_or_raise(parts)
    here: dict[str, Any] = tree
    for part in parts[:-1]:
        child = here.get(part)
        if child is not None and not isinstance(child, dict):
            raise ConfigError(".".join(names), child, "a mapping")
        here[part] = here = dict(child or {})
    last = parts[-1]
    old = here.get(last)
    section = dataclasses.is_dataclass(_locate(parts)[1])
    here[last] = {**old, **value} if section and isinstance(old, dict) and isinstance(value, dict) else value


def _split(key: str) -> list[str]:
    """A dotted key in its parts; below ``space`` and ``fixed`` stand dotted config keys, which stay whole."""
    parts = key.split(".")
    depth = 2 if parts[:2] == ["search", "space"] else 4 if parts[:2] == ["search", "families"] else len(parts)
    if len(parts) <= depth:
        return parts
    rest = ".".join(parts[depth:])
    for known in keys():  # search.space.rectify.strength.low: an entry within a dimension
        if rest.startswith(f"{known}."):
            return [*parts[:depth], known, *rest.removeprefix(f"{known}.").split(".")]
    return [*parts[:depth], rest]


def _locate_or_raise(parts: Sequence[str]) -> tuple[list[str], Any]:
    """As ``_locate``, but a part that no section knows is an error."""
    for end in range(1, len(parts) + 1):
        _, level = _locate(parts[: end - 1])
        if dataclasses.is_dataclass(level) and parts[end - 1] not in _hints(typing.cast(type, level)):
            raise _unknown_key(list(parts[:end]))
        if not dataclasses.is_dataclass(level) and typing.get_origin(level) is not dict:
            holder, key = ".".join(parts[: end - 1]), ".".join(parts)
            raise InputError(f"unknown key {key!r}; did you mean {holder!r}? (it holds a value, not keys)")
    return _locate(parts)


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """``config`` with dotted keys set to new values, checked again.

    Raises:
        InputError: as :func:`from_dict`.
    """
    tree = to_dict(config)
    for key, value in values.items():
        _assign(tree, key, value)
    return from_dict(tree)


# -------------------------------------------------------------------------------------------------- output


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values, every key present, lists for tuples: ``from_dict`` gives an equal config."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return tree


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that :func:`load` reads back to an equal config."""
    return f"{HEADER}\n{yamltext.dump(to_dict(config))}"


def flat(config: RunConfig) -> dict[str, Scalar]:
    """Dotted key to scalar, for a tracker: lists become text, empty mappings vanish."""
    return dict(_flatten(to_dict(config), ""))


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, Scalar]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list):
        yield prefix, ", ".join(item if isinstance(item, str) else json.dumps(item) for item in value)
    else:
        yield prefix, value
