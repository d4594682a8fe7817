"""YAML as the configs use it: safe, ``1e-5`` is a number, a key given twice is an error with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from gru_core.errors import InputError

# YAML 1.1 wants a dot in a float, so that PyYAML reads 1e-5 as text; this is the number of YAML 1.2.
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
# Dates stay text, and so do 12:30 (sexagesimal in YAML 1.1) and the like: no config field holds them.
_DROPPED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")


def _resolvers(base: dict[str, list[tuple[str, Any]]]) -> dict[str, list[tuple[str, Any]]]:
    """PyYAML's implicit resolvers with this module's float and without dates."""
    out = {first: [entry for entry in entries if entry[0] not in _DROPPED] for first, entries in base.items()}
    for first in "-+0123456789.":
        out.setdefault(first, []).append(("tag:yaml.org,2002:float", _FLOAT))
    return out


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers(yaml.SafeLoader.yaml_implicit_resolvers)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's, but a key that stands twice raises instead of overwriting."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in seen:
                problem = f"key {key!r} given twice (first on line {seen[key]})"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key] = line
        return super().construct_mapping(node, deep)


def parse(text: str, source: str) -> Any:
    """The value that a YAML text stands for.

    Args:
        source: what errors call the text: a file name or an option.

    Raises:
        InputError: malformed YAML or a duplicate key, with line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{source}{where}: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise InputError(f"{source}: not a text file ({error.reason} at character {error.position})") from None
    except (ValueError, RecursionError) as error:  # such as an integer of ten thousand digits
        raise InputError(f"{source}: {str(error) or 'nested too deeply'}") from None


class _Flow(dict[str, Any]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers(yaml.SafeDumper.yaml_implicit_resolvers)

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that occurs twice twice: no anchors in a file for people."""
        return True


def _list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


def _flow(dumper: yaml.SafeDumper, data: _Flow) -> yaml.Node:
    return dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=True)


_Dumper.add_representer(list, _list)
_Dumper.add_representer(_Flow, _flow)


def _shape(value: Any, depth: int) -> Any:
    """Mappings of scalars below the sections go on one line: ``{low: 0.0, high: 5.0}``."""
    if isinstance(value, Mapping):
        flat = depth > 1 and not any(isinstance(item, Mapping | list | tuple) for item in value.values())
        items = {key: _shape(item, depth + 1) for key, item in value.items()}
        return _Flow(items) if flat else items
    if isinstance(value, list | tuple):
        return [_shape(item, depth + 1) for item in value]
    return value


def dump(value: Mapping[str, Any]) -> str:
    """YAML text in the order given, one section after the other; :func:`parse` reads it back unchanged."""
    text: str = yaml.dump(
        _shape(value, 0),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=False,
        width=100,
        allow_unicode=True,
    )
    return text
