"""Asks the cluster, before a job is submitted, whether it can do it; each refusal is one line with a way out.

A small job runs :mod:`pipelines.probe` on the head node, and through it on every other node. That a path means the
same folder here and there is shown by a marker file, written here and looked for there.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gru_core.errors import InputError
from pipelines.cluster import CHECK, Cluster
from pipelines.package import LIMIT, Input, Package
from pipelines.probe import MARK
from pipelines.stores import hide, sqlite_file

START_S = 90.0
"""Longest wait for the answer."""

PYTHON = (3, 11)
MINIMUM = {"torch": "2.11", "transformers": "5", "ray": "2.54", "mlflow": "3.10"}
"""Lowest versions; those that pyproject.toml names."""

MODULES = {
    name: name
    for name in (
        "torch", "transformers", "safetensors", "tokenizers", "numpy", "datasets", "peft", "ray", "mlflow", "optuna",
        "moocore", "scipy", "typer", "rich", "pydantic", "plotly", "matplotlib", "pandas", "pyarrow", "jinja2",
    )
} | {"rouge_score": "rouge-score", "yaml": "pyyaml"}  # fmt: skip
"""Import name to the name under which it is installed."""


@dataclass(frozen=True)
class Plan:
    """What a job needs of the cluster.

    Attributes:
        output: absolute output folder; None where the command writes none.
        shared_output: it was given as a relative path, so it has to be the client's own folder.
        tracking: resolved tracking URI; empty where the command records nothing.
        every_node: the command uses all nodes, not the head alone.
        cache: workers on other nodes read the prepared models that the head keeps in its cache.
        storage: shared storage of the output; ``output`` is then each machine's own copy.
    """

    output: Path | None
    shared_output: bool
    tracking: str
    overwrite: bool = False
    resume: bool = False
    every_node: bool = True
    cache: bool = False
    storage: str | None = None
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True)
class Answer:
    """What the cluster said, once nothing stands against the job.

    Attributes:
        python: the interpreter of the cluster's workers.
        shared: the output folder is the same one here and there.
        nodes: number of nodes that answered.
    """

    python: str
    shared: bool
    nodes: int


def check(cluster: Cluster, package: Package, plan: Plan, env_vars: dict[str, str]) -> Answer:
    """Runs the probe and judges its report.

    Raises:
        InputError: the cluster cannot do the job; the line names field, value and what to do.
    """
    with markers(plan) as marks:
        database = sqlite_file(plan.tracking)
        spec = {
            "nonce": plan.nonce,
            "python": PYTHON,
            "modules": list(MODULES),
            "versions": list(MINIMUM),
            "inputs": [_listed(item) for item in package.remote],
            "markers": list(marks.values()),
            "output": str(plan.output) if plan.output else None,
            "storage": plan.storage,
            "overwrite": plan.overwrite,
            "resume": plan.resume,
            "tracking": bool(plan.tracking),
            "writes": [str(path) for path in (plan.output, database.parent if database else None) if path],
            "every_node": plan.every_node,
            "cache": plan.cache,
        }
        report = _run(cluster, package, spec, env_vars)
    judge(report, plan, package.remote, marks)
    unseen = report["here"]["unseen"]
    shared = "output" in marks and marks["output"] not in unseen
    return Answer(report["here"]["python"], shared, 1 + len(report["nodes"]))


def _listed(item: Input) -> dict[str, Any]:
    return {"key": item.key, "path": str(item.path), "files": item.listing()}


@contextlib.contextmanager
def markers(plan: Plan) -> Iterator[dict[str, str]]:
    """Marker files next to what has to be shared: ``output`` and ``tracking`` to their paths; gone afterwards.

    An absolute output folder whose parent cannot be written here gets none: it may be the cluster's alone.

    Raises:
        InputError: a folder that has to be shared cannot be written.
    """
    wanted: dict[str, tuple[Path, bool]] = {}
    if plan.output:
        wanted["output"] = (plan.output, plan.shared_output)
    if (database := sqlite_file(plan.tracking)) is not None:
        wanted["tracking"] = (database.parent, True)
    marks: dict[str, str] = {}
    try:
        for name, (path, needed) in wanted.items():
            folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
            marker = folder / f".gru-{name}-{plan.nonce}"
            try:
                marker.touch(exist_ok=False)
            except OSError as error:
                if needed:
                    field_name = {"output": "output.dir", "tracking": "track.uri"}[name]
                    reason = error.strerror or error
                    raise InputError(f"{field_name}: {folder} cannot be written here ({reason})") from None
                continue
            marks[name] = str(marker)
        yield marks
    finally:
        for path_name in marks.values():
            with contextlib.suppress(OSError):
                Path(path_name).unlink(missing_ok=True)


def _run(cluster: Cluster, package: Package, spec: dict[str, Any], env_vars: dict[str, str]) -> dict[str, Any]:
    """Submits the probe, waits for it and returns its report.

    What it is to look for stands in its command and not in the package: the job that follows then finds its inputs
    at the same path as an earlier one with the same config, and can resume it.
    """
    client = cluster.client
    job = client.submit_job(
        entrypoint=f"exec sh find_python.sh -m pipelines.probe {shlex.quote(json.dumps(spec))}",
        submission_id=f"{CHECK}{spec['nonce']}",
        metadata={"gru.command": "check"},
        runtime_env={"working_dir": str(package.folder), "env_vars": env_vars},
    )
    deadline = time.monotonic() + START_S
    try:
        while not (status := client.get_job_status(job)).is_terminal():
            if time.monotonic() > deadline:
                raise InputError(
                    f"the cluster at {cluster.address} did not answer the check within {START_S:.0f} s; "
                    f"is it starting up or out of memory? ({status.value.lower()})"
                )
            time.sleep(0.2)
        found = [line for line in client.get_job_logs(job).splitlines() if line.startswith(MARK)]
        if not found:
            last = ((client.get_job_info(job).message or "").strip().splitlines() or ["no message"])[-1]
            raise InputError(f"the cluster at {cluster.address} could not run the check: {hide(last)}")
    finally:
        with contextlib.suppress(Exception):  # of an interrupted client; nothing to do about one that is gone
            if not client.get_job_status(job).is_terminal():
                client.stop_job(job)
    report: dict[str, Any] = json.loads(found[-1].removeprefix(MARK))
    return report


def judge(report: dict[str, Any], plan: Plan, remote: Sequence[Input], marks: dict[str, str]) -> None:
    """Raises the first thing that stands against the job: Python, inputs, output folder, tracking store.

    Raises:
        InputError: one line: field, value, what to do.
    """
    _judge_node(report["here"], "the cluster's head", remote)
    for node in report["nodes"]:
        if "silent" in node:
            raise InputError(f"node {node['node']} of the cluster does not run tasks ({node['silent']})")
        _judge_node(node, f"node {node['node']}", remote)
    _judge_output(report, plan, marks)
    _judge_cache(report)
    _judge_tracking(report, plan, marks)


def _judge_node(node: dict[str, Any], where: str, remote: Sequence[Input]) -> None:
    python, version = node["python"], node["version"]
    if _numbers(version) < PYTHON:
        raise InputError(f"{where} runs Python {version} ({python}), at least 3.11 is needed there")
    lacking = [MODULES[name] for name in node["missing"]]
    versions = {name: found for name, found in node["versions"].items() if name not in node["missing"]}
    old = [name for name, found in versions.items() if _numbers(found or "0") < _numbers(MINIMUM[name])]
    if lacking or old:
        what = [*lacking, *(f"{name}>={MINIMUM[name]} (has {versions[name]})" for name in old)]
        words = " ".join([*lacking, *(f"'{name}>={MINIMUM[name]}'" for name in old)])
        raise InputError(f"{where} lacks {', '.join(what)}; install there: {python} -m pip install {words}")
    for item in remote:
        problem = node["inputs"][item.key]
        if problem != "same":
            size = item.size / 2**20
            why = f" and is too large to be sent ({size:.0f} MiB, limit {LIMIT / 2**20:.0f} MiB)" if item.files else ""
            raise InputError(
                f"{item.key}: {item.path} {problem} on {where}{why}; put it on storage that the cluster mounts "
                "at the same path"
            )


def _numbers(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` as (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)


def _judge_output(report: dict[str, Any], plan: Plan, marks: dict[str, str]) -> None:
    if plan.output is None:
        return
    fix = "set a folder that the cluster shares, such as --set output.dir=/shared/runs/name"
    if plan.shared_output and not plan.storage and marks["output"] in report["here"]["unseen"]:
        raise InputError(f"output.dir: {plan.output} of this machine is not on the cluster's head; {fix}")
    if error := report["unwritable"].get(str(plan.output)):
        raise InputError(f"output.dir: the cluster's head cannot write {plan.output} ({error}); {fix}")
    if report["output"]:
        raise InputError(f"on the cluster: {report['output']}")
    for node in report["nodes"]:
        if str(plan.output) in node["unseen"] and not plan.storage:
            raise InputError(f"output.dir: node {node['node']} does not see {plan.output} of the head; {fix}")


def _judge_cache(report: dict[str, Any]) -> None:
    cache = report["cache"]
    fix = "start the cluster's Ray with GRU_CACHE set to a folder that all nodes share"
    if error := report["unwritable"].get(cache):
        raise InputError(f"prepared models: the cluster's head cannot write {cache} ({error}); {fix}")
    for node in report["nodes"]:
        if cache in node["unseen"]:
            raise InputError(f"prepared models: node {node['node']} does not see {cache} of the head; {fix}")


def _judge_tracking(report: dict[str, Any], plan: Plan, marks: dict[str, str]) -> None:
    shown = hide(plan.tracking)
    fix = "use a server that both can reach, such as --tracking-uri http://HOST:5000"
    if report["tracking"]:
        raise InputError(f"track.uri: {shown} cannot be used from the cluster: {report['tracking']}; {fix}")
    database = sqlite_file(plan.tracking)
    if database is None:
        return
    if marks["tracking"] in report["here"]["unseen"]:
        raise InputError(f"track.uri: {shown} of this machine is not on the cluster's head; {fix}")
    if error := report["unwritable"].get(str(database.parent)):
        raise InputError(f"track.uri: the cluster's head cannot write {database.parent} ({error}); {fix}")
