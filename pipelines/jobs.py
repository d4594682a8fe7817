"""A gru command as a Ray job: checked here, checked there, sent, followed, stopped.

Parts: ``request`` understands the command line, ``cluster`` connects, ``package`` packs, ``preflight`` asks the
cluster what it can reach (``probe`` answers there), ``joblog`` follows.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import cluster as clusters
from pipelines import joblog, preflight, provenance
from pipelines import package as packages
from pipelines.cluster import Cluster
from pipelines.request import Request, check_data, parse
from pipelines.stores import hide, secret

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

Say = Callable[[str], None]

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how often reports are collected: a killed worker loses less
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_JOB_STOP_WAIT_TIME_S": "50",  # for the default grace period; see stop_wait
}
"""All that a job is given; secrets must be in the environment of the cluster's own processes."""
SECRETS = (
    "HF_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
)  # fmt: skip
"""Variables that runs use and that are never sent."""
LAST_S = 20
"""Seconds behind its grace period after which Ray kills a job that was told to stop."""
STOP_S = 30.0
"""Seconds behind the time that a job has for its end (:func:`stop_wait`) in which the cluster must say it is over."""


def submit(arguments: list[str], *, address: str | None, wait: bool, say: Say) -> dict[str, Any]:
    """Runs a gru command as a job on a running cluster.

    Args:
        arguments: the command line, such as ``["search", "-c", "study.yaml"]``.
        address: URL of the cluster's dashboard; None: the environment's, else this machine's.
        wait: follow the log until the job has ended. Ctrl-C then leaves the job alone.

    Returns:
        What :func:`status` returns, with ``model`` (or a search's ``frontier``: where it will lie), ``experiment``
        of MLflow and, for a followed command with ``--json``, its document as ``result``.

    Raises:
        InputError: bad input, or a cluster that cannot be reached, refuses, or cannot do this job.
        RuntimeError: the followed job failed or was stopped.
    """
    request = parse(arguments)
    check_data(request)
    cluster = clusters.connect(address, say)
    job = _send(cluster, request, say)
    if not wait:
        for line in _how(cluster, job):
            say(line)
        return _result(cluster, request, job)
    return _follow(cluster, job, say, request)


def _send(cluster: Cluster, request: Request, say: Say) -> str:
    """Packs, asks the cluster, submits; returns the job's id."""
    command, config = request.command, request.config
    with tempfile.TemporaryDirectory(prefix="gru-submit-") as name:
        package = packages.build(config, Path(name))
        inputs = f", {len(package.uploaded)} inputs" if package.uploaded else ""
        say(f"package: code, config{inputs}, {package.size / 2**20:.1f} MiB (limit {packages.LIMIT / 2**20:.0f})")
        output = Path(config.output.dir) if command != "prepare" else None
        spread = command == "search" or config.train.workers > 0
        plan = preflight.Plan(
            output=output,
            shared_output=request.shared_output,
            tracking=str(config.track.uri) if output else "",  # prepare records nothing
            overwrite="--overwrite" in request.flags,
            resume="--resume" in request.flags,
            every_node=spread,
            cache=spread and "prepared" in (config.model.path, config.retain_model),
            storage=config.output.storage,
        )
        for line in _kept_back(str(config.track.uri)):
            say(line)
        say(f"asking the cluster at {cluster.address} what it can reach")
        answer = preflight.check(cluster, package, plan, ENVIRONMENT)
        words = entrypoint(answer.python, request, "config.yaml", package.overrides())
        job = start(cluster, words, package.folder, metadata(request), name=command, grace=config.train.grace)
    say(f"submitted {job} to {cluster.address} ({answer.nodes} {'node' if answer.nodes == 1 else 'nodes'})")
    if output and not answer.shared:
        kept = config.output.storage or f"on the cluster: {output} is not shared with this machine"
        say(f"results stay {f'in {kept}' if config.output.storage else kept}")
    return job


def _kept_back(uri: str) -> list[str]:
    """Tells which secrets of this machine a job is not given: what a cluster is sent, it stores and shows."""
    found = [name for name in SECRETS if os.environ.get(name)]
    found += ["user and password of the tracking URI (MLFLOW_TRACKING_URI there)"] if secret(uri) else []
    if not found:
        return []
    return [f"not sent: {', '.join(found)}; a job takes secrets from the environment of the cluster's own processes"]


def entrypoint(python: str, request: Request, config: str, overrides: str = "") -> str:
    """The shell command of a job: ``exec``, so that what stops the job reaches the command itself.

    Args:
        python: interpreter on the cluster.
        config: path of the resolved config there.
        overrides: further ``--set`` words, quoted.
    """
    words = ["exec", shlex.quote(python), "-m", "pipelines", request.command, "-c", shlex.quote(config)]
    return f"{' '.join(words)}{overrides}{''.join(f' {flag}' for flag in request.flags)}"


def metadata(request: Request) -> dict[str, str]:
    """What the cluster shows of a job: command and, where it writes any, where its results go."""
    found = {"gru.command": request.command}
    if request.command != "prepare":
        config = request.config
        found |= {"gru.output": config.output.dir, "gru.tracking_uri": hide(str(config.track.uri))}
    return found


def stop_wait(grace: float) -> int:
    """Seconds that Ray gives a job told to stop, for a grace period in seconds; by itself it gives 3."""
    return math.ceil(grace) + LAST_S


def environment(grace: float = 30.0) -> dict[str, str]:
    """Variables of a job: the switches, and the commit of the code that is sent, which has no ``.git`` there.

    Args:
        grace: seconds that the job has for a checkpoint.
    """
    return {**ENVIRONMENT, "RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait(grace)), **provenance.carried()}


def start(
    cluster: Cluster, entrypoint: str, folder: Path, metadata: dict[str, str], *, name: str, grace: float = 30.0
) -> str:
    """Submits a shell command that runs in a copy of ``folder``; returns the job's id."""
    return cluster.client.submit_job(
        entrypoint=entrypoint,
        submission_id=f"gru-{name}-{secrets.token_hex(4)}",
        runtime_env={"working_dir": str(folder), "env_vars": environment(grace)},
        metadata=metadata,
    )


def _how(cluster: Cluster, job: str) -> list[str]:
    where = f"--address {cluster.address}"
    token = "RAY_AUTH_MODE=token " if cluster.token else ""  # Ray's own command does not look for one without it
    return [
        f"{job} runs on its own now",
        f"  how it is doing: gru submit status {job} {where}",
        f"  its log:         {token}ray job logs --follow {job} {where}",
        f"  stop it:         gru submit stop {job} {where}",
    ]


def _result(cluster: Cluster, request: Request, job: str) -> dict[str, Any]:
    found = _describe(cluster, clusters.details(cluster, job))
    if request.command == "prepare":  # its log tells where the two models are
        return found
    output = request.config.output.dir
    made = {
        "unlearn": {"model": f"{output}/model"},
        "requests": {"table": f"{output}/requests.csv"},
        "search": {"frontier": f"{output}/frontier.html"},
    }[request.command]
    return {**found, **made, "experiment": request.config.track.experiment}


def _follow(cluster: Cluster, job: str, say: Say, request: Request) -> dict[str, Any]:
    """Says the log until the job has ended; Ctrl-C leaves it running."""
    log = joblog.Log(say, job)
    try:
        found = asyncio.run(joblog.stream(cluster, job, log))
    except KeyboardInterrupt:
        for line in _how(cluster, job):
            say(line)
        return _result(cluster, request, job)
    joblog.finish(found, log)
    result = _result(cluster, request, job)
    if "--json" in request.flags:
        result["result"] = log.document()
    return result


def status(job_id: str, *, address: str | None) -> dict[str, Any]:
    """State, times (UTC), entry point and message of a job.

    Raises:
        InputError: no such job, or a cluster that cannot be reached or refuses.
    """
    cluster = clusters.connect(address)
    return _describe(cluster, clusters.details(cluster, job_id))


def stop(job_id: str, *, address: str | None) -> dict[str, Any]:
    """Asks a job to end and waits until it has; ``stopped`` tells whether it was still running.

    Raises:
        InputError: as :func:`status`.
        RuntimeError: it still runs ``STOP_S`` seconds after Ray should have killed it.
    """
    cluster = clusters.connect(address)
    patience = _own_stop_wait(clusters.details(cluster, job_id)) + STOP_S
    asked = cluster.client.stop_job(job_id)
    deadline = time.monotonic() + patience
    while not (found := clusters.details(cluster, job_id)).status.is_terminal():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{job_id} was asked to stop {patience:.0f} s ago and still runs")
        time.sleep(0.2)
    return {**_describe(cluster, found), "stopped": asked and found.status.value == "STOPPED"}


def _own_stop_wait(found: JobDetails) -> int:
    """What a job was given as :func:`stop_wait`; the default's where it cannot be told."""
    name = "RAY_JOB_STOP_WAIT_TIME_S"
    given = ((found.runtime_env or {}).get("env_vars") or {}).get(name, "")
    return int(given if str(given).isdecimal() else ENVIRONMENT[name])


def _describe(cluster: Cluster, found: JobDetails) -> dict[str, Any]:
    data = found.metadata or {}
    return {
        "job": found.submission_id,
        "status": found.status.value,
        "message": hide(_last_line(found.message or "")),
        "command": data.get("gru.command"),
        "output": data.get("gru.output"),
        "tracking_uri": data.get("gru.tracking_uri"),
        "entrypoint": found.entrypoint,
        "start": _moment(found.start_time),
        "end": _moment(found.end_time),
        "exit_code": found.driver_exit_code,
        "address": cluster.address,
    }


def _moment(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _last_line(message: str) -> str:
    """Of a failed job's message, which holds the end of its log, the line that says why."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else ""
