"""A gru command as a KubeRay ``RayJob``: a manifest that brings its own cluster and config, for ``kubectl create``.

Nothing is sent and nobody is asked: what cannot work on pods is refused from the config alone. The config travels
as a ``ConfigMap`` in the same document stream; code comes with the image or with ``--working-dir``; data, models
and results lie on the volume of ``--pvc``; secrets come from ``--secret`` and never stand in the manifest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pipelines import jobs, settings
from pipelines.inputs import without_secrets
from pipelines.kuberay_checks import NAME_LIMIT, Options, Pods, check, check_options, plan, ray_version
from pipelines.request import Request, check_data, parse

Say = Callable[[str], None]
Document = dict[str, Any]

CONFIG = "/etc/gru"
"""Folder of ``config.yaml`` on the head."""
POD_S = 10
"""Seconds that a pod has behind the time in which its job must stop."""
_PLAIN = re.compile(r"[\w ./:@+=,~-]*")
"""Text that a shell leaves as it is between double quotes, where KubeRay puts metadata."""


def manifest(arguments: list[str], options: Options, say: Say) -> list[Document]:
    """The ConfigMap and the RayJob of a command line (see :func:`to_yaml`).

    Args:
        arguments: the command line, such as ``["search", "-c", "study.yaml"]``.

    Raises:
        InputError: bad input, or a job that cannot work on pods; one line: what, given, allowed.
    """
    check_options(options)
    request = parse(arguments)
    check(request, options)
    check_data(request)
    pods = plan(request)
    name = options.name or _name(request)
    for line in _notes(request, options, pods, name):
        say(line)
    place = {"namespace": options.namespace} if options.namespace else {}
    labels = {"app.kubernetes.io/name": "gru", "app.kubernetes.io/component": request.command}
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-config", **place, "labels": labels},
        "data": {"config.yaml": settings.to_yaml(without_secrets(request.config))},
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, **place, "labels": labels},
        "spec": _spec(request, options, pods, name),
    }
    return [config, job]


class _Dumper(yaml.SafeDumper):
    """No anchors, and texts of several lines as such: a manifest is read by people, too."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _text)


def to_yaml(documents: list[Document]) -> str:
    """One stream of YAML documents, as ``kubectl`` takes it."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
    return text


def _spec(request: Request, options: Options, pods: Pods, name: str) -> Document:
    wait = jobs.stop_wait(request.config.train.grace)
    environment = {**jobs.ENVIRONMENT, "RAY_JOB_STOP_WAIT_TIME_S": str(wait)}
    if options.pvc:
        environment["GRU_CACHE"] = f"{options.mount}/gru-cache"
    runtime: Document = {"env_vars": environment}
    if options.working_dir:
        runtime["working_dir"] = options.working_dir
    head = _template("ray-head", options, request.config.train.cpus_per_worker, 0, wait, config=name)
    group = {
        "groupName": "workers",
        "replicas": pods.count,
        "minReplicas": pods.fewest,
        "maxReplicas": pods.count,
        "rayStartParams": {},
        "template": _template("ray-worker", options, pods.cpus, pods.gpus, wait),
    }
    return {
        "entrypoint": jobs.entrypoint("python", request, f"{CONFIG}/config.yaml"),
        "runtimeEnvYAML": yaml.safe_dump(runtime, sort_keys=False),
        "metadata": {key: text for key, text in jobs.metadata(request).items() if _PLAIN.fullmatch(text)},
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 300,
        "backoffLimit": 0,
        "rayClusterSpec": {
            "rayVersion": ray_version(),
            "authOptions": {"mode": "token"},
            "headGroupSpec": {"rayStartParams": {"num-cpus": "0"} if pods.count else {}, "template": head},
            "workerGroupSpecs": [group] if pods.count else [],
        },
    }


def _template(container: str, options: Options, cpus: int, gpus: int, wait: int, config: str | None = None) -> Document:
    """A pod template.

    Args:
        wait: seconds that a job on the pod may take to stop; Kubernetes by itself gives a pod 30.
        config: name of the job whose ConfigMap the pod mounts.
    """
    resources: Document = {"cpu": str(cpus)}
    if options.memory:
        resources["memory"] = options.memory
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    volumes: list[Document] = []
    mounts: list[Document] = []
    if options.pvc:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": options.pvc}})
        mounts.append({"name": "shared", "mountPath": options.mount})
    if config:
        volumes.append({"name": "config", "configMap": {"name": f"{config}-config"}})
        mounts.append({"name": "config", "mountPath": CONFIG, "readOnly": True})
    pod: Document = {"name": container, "image": options.image}
    if options.secrets:
        pod["envFrom"] = [{"secretRef": {"name": each}} for each in options.secrets]
    pod |= {"resources": {"requests": resources, "limits": dict(resources)}}
    pod |= {"volumeMounts": mounts} if mounts else {}
    found: Document = {"terminationGracePeriodSeconds": wait + POD_S, "containers": [pod]}
    return {"spec": found | ({"volumes": volumes} if volumes else {})}


def _notes(request: Request, options: Options, pods: Pods, name: str) -> Iterator[str]:
    shape = f"{pods.cpus} CPUs and {pods.gpus} GPUs" if pods.gpus else f"{pods.cpus} CPUs"
    yield f"RayJob {name}: a head and {pods.count} worker pods with {shape} each; KubeRay from 1.5.1"
    if not options.working_dir:
        yield f"code: what {options.image} holds; with other code give --working-dir URI"
    if options.memory is None:
        yield "memory: no limit; pods may be evicted, set one with --memory 32Gi"
    if request.command == "search" and request.config.search.concurrent is None:
        yield "room for one trial at a time; for more set search.concurrent"


def _name(request: Request) -> str:
    """A valid name from command and output folder, the same each time."""
    folder = "" if request.command == "prepare" else Path(request.config.output.dir).name
    text = re.sub(r"[^a-z0-9]+", "-", f"gru-{request.command}-{folder}".lower())
    return text[:NAME_LIMIT].strip("-")
