"""Runs on the cluster before a job does: what can it see, write and import there?

Started as ``python -m pipelines.probe SPEC`` in the unpacked package, beside ``config.yaml``; ``SPEC`` is JSON, and
so is the one line that it prints behind ``MARK``. Starts with nothing but the standard library, so that it can tell
what is missing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MARK = "gru-preflight: "
NODE_S = 30.0
"""Longest wait for a node to run a task."""


def look(spec: dict[str, Any]) -> dict[str, Any]:
    """What one node has: modules, inputs, marker files. Changes nothing.

    Args:
        spec: ``modules`` (import names), ``versions`` (distribution names), ``inputs`` (``key``, ``path`` and
            ``files``: name to bytes) and ``markers`` (absolute paths).
    """
    return {
        "node": socket.gethostname(),
        "python": sys.executable,
        "version": ".".join(map(str, sys.version_info[:3])),
        "missing": [name for name in spec["modules"] if importlib.util.find_spec(name) is None],
        "versions": {name: _version(name) for name in spec["versions"]},
        "inputs": {item["key"]: _compare(item) for item in spec["inputs"]},
        "unseen": [path for path in spec["markers"] if not os.path.lexists(path)],
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compare(item: dict[str, Any]) -> str:
    """``same``, or what is wrong; without a listing of the client's files existence is enough."""
    path = Path(item["path"])
    if not path.exists():
        return "is not there"
    if not os.access(path, os.R_OK):
        return "cannot be read"
    for name, size in item["files"].items():
        file = path / name if path.is_dir() else path
        if not file.is_file():
            return f"lacks {name}"
        if file.stat().st_size != size:
            return f"has another {name} (its size differs)"
    return "same"


@contextlib.contextmanager
def written(folder: str, name: str) -> Iterator[str | None]:
    """Makes ``folder`` and a marker file in it, both gone afterwards. Gives None, or why that failed."""
    made: list[Path] = []
    marker = Path(folder) / name
    error = None
    try:
        for path in (*reversed(marker.parent.parents), marker.parent):
            if not path.exists():
                path.mkdir()
                made.append(path)
        marker.touch()
    except OSError as problem:
        error = problem.strerror or str(problem)
    try:
        yield error
    finally:
        with contextlib.suppress(OSError):
            marker.unlink(missing_ok=True)
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()


def others(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The reports of all other nodes that are alive, each from a task pinned to it."""
    import logging

    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    own = ray.get_runtime_context().get_node_id()
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    names.pop(own, None)
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    tasks = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(spec): name
        for node, name in names.items()
    }
    done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=NODE_S) if tasks else ([], [])
    reports = []
    for reference in done:
        try:
            reports.append({**ray.get(reference), "node": tasks[reference]})
        except Exception as error:  # a node that went away: any of Ray's errors means the same to the reader
            reports.append({"node": tasks[reference], "silent": type(error).__name__})
    return reports + [{"node": tasks[item], "silent": f"no answer within {NODE_S:.0f} s"} for item in late]


def report(spec: dict[str, Any]) -> dict[str, Any]:
    """Everything that the client needs to decide."""
    here = look(spec)
    result: dict[str, Any] = {"here": here, "nodes": [], "unwritable": {}, "output": None, "tracking": None}
    result["cache"] = None
    if here["missing"] or sys.version_info < tuple(spec["python"]):
        return result
    for path in spec["markers"]:  # seen: out of the way, so that an empty output folder is empty
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)
    result["output"] = _refusal(lambda: _examine(spec))
    result["tracking"] = _refusal(lambda: _check_store(spec))
    name = f".gru-node-{spec['nonce']}"
    shared = [spec["output"]] if spec["output"] else []
    if spec["cache"]:
        from pipelines.prepare import cache_folder

        result["cache"] = str(cache_folder())
        shared.append(result["cache"])
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys([*spec["writes"], *shared]):
            if error := stack.enter_context(written(folder, name)):
                result["unwritable"][folder] = error
        if spec["every_node"]:
            result["nodes"] = others({**spec, "markers": [f"{folder}/{name}" for folder in shared]})
            for node in result["nodes"]:
                node["unseen"] = [path.removesuffix(f"/{name}") for path in node.get("unseen", ())]
    return result


def _refusal(check: Callable[[], object]) -> str | None:
    """The line with which ``check`` refuses its input, None where it does not."""
    from gru_core.errors import InputError

    try:
        check()
    except InputError as error:
        return str(error)
    return None


def _examine(spec: dict[str, Any]) -> None:
    from pipelines.mirror import of
    from pipelines.output import examine

    if spec["output"]:
        storage = of(spec.get("storage"))
        examine(Path(spec["output"]), overwrite=spec["overwrite"], resume=spec["resume"], storage=storage)


def _check_store(spec: dict[str, Any]) -> None:
    from pipelines import settings
    from pipelines.stores import check, resolve_uri

    if spec["tracking"]:  # the URI itself may hold a password, which a command line would show
        check(resolve_uri(settings.load("config.yaml").track))


def main() -> None:
    print(MARK + json.dumps(report(json.loads(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
