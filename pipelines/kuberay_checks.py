"""What a manifest for KubeRay is made from, and what is refused from the config alone: no pod is asked."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from gru_core.config import RunConfig
from gru_core.errors import ConfigError, InputError
from pipelines import authentication, ray_start, settings
from pipelines import package as packages
from pipelines.request import Request
from pipelines.stores import hide, secret, sqlite_file

NAME_LIMIT = 47
"""Characters that KubeRay allows: it appends to the name of a RayJob, and a label holds 63."""
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUANTITY = re.compile(r"[1-9][0-9]*(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?")
_MOUNT = re.compile(r"(/[A-Za-z0-9][A-Za-z0-9._-]*)+")
_TAKEN = {"bin", "boot", "dev", "etc", "lib", "lib64", "proc", "run", "sbin", "sys", "tmp", "usr"}


@dataclass(frozen=True)
class Options:
    """What the command line says of the pods.

    Attributes:
        image: container image with this Ray version and, without ``working_dir``, with gru.
        name: name of the RayJob; None: from command and output folder.
        namespace: None: the one that kubectl is set to.
        pvc: PersistentVolumeClaim that every pod mounts at ``mount``.
        secrets: Kubernetes Secrets whose keys become environment variables of the pods.
        working_dir: URI of a ``.zip`` with the code, for an image without gru.
        memory: memory of each pod, as Kubernetes writes it (``32Gi``); None: no limit.
    """

    image: str | None = None
    name: str | None = None
    namespace: str | None = None
    pvc: str | None = None
    mount: str = "/shared"
    secrets: tuple[str, ...] = ()
    working_dir: str | None = None
    memory: str | None = None


@dataclass(frozen=True)
class Pods:
    """The worker pods: number, fewest to go on with, and what each is given."""

    count: int
    fewest: int
    cpus: int
    gpus: int


def check_options(options: Options) -> None:
    """Whether names, image, paths and sizes are what Kubernetes takes.

    Raises:
        InputError: one line: option, value, what is allowed.
    """
    ray = ray_version()
    base = f"rayproject/ray:{ray}-py{sys.version_info[0]}{sys.version_info[1]}"
    if not options.image:
        raise InputError(f"--image: none given; name one with Ray {ray} and gru in it, such as one made FROM {base}")
    if not re.fullmatch(r"[\w][\w./:@-]*", options.image):
        raise InputError(f"--image: got {options.image!r}, allowed: REGISTRY/NAME:TAG")
    if options.name is not None and not (_LABEL.fullmatch(options.name) and len(options.name) <= NAME_LIMIT):
        allowed = f"a-z, 0-9 and -, from a letter to a letter or digit, at most {NAME_LIMIT} characters"
        raise InputError(f"--name: got {options.name!r}, allowed: {allowed}")
    named = [("--namespace", options.namespace), ("--pvc", options.pvc)]
    for option, value in [*named, *(("--secret", each) for each in options.secrets)]:
        if value is not None and not (_SUBDOMAIN.fullmatch(value) and len(value) <= 253):
            raise InputError(f"{option}: got {value!r}, allowed: a Kubernetes name (a-z, 0-9, - and .)")
    parts = options.mount.split("/")
    if not _MOUNT.fullmatch(options.mount) or parts[1] in _TAKEN:
        raise InputError(f"--mount: got {options.mount!r}, allowed: an absolute path outside the system, as /shared")
    if options.memory is not None and not _QUANTITY.fullmatch(options.memory):
        raise InputError(f"--memory: got {options.memory!r}, allowed: a Kubernetes quantity, such as 32Gi")
    uri = options.working_dir
    if uri is not None and (secret(uri) or not re.fullmatch(r"(https|s3|gs)://[\w./:%+=~-]+\.zip", uri)):
        allowed = "https://, s3:// or gs:// ending in .zip, without user, password or query"
        raise InputError(f"--working-dir: got {hide(uri).partition('?')[0]!r}, allowed: {allowed}")


def check(request: Request, options: Options) -> None:
    """Refuses what cannot work on pods: paths off the volume, a store that they cannot reach, GPUs for no worker.

    Raises:
        InputError: one line: field, value, what to do.
    """
    config, mount = request.config, options.mount
    _check_gpus(request)
    for key, value in settings.flat(config).items():
        if key != "track.uri" and isinstance(value, str) and secret(value):
            raise InputError(f"{key}: holds a user name or password, which no manifest may; put it into --secret NAME")
    if options.pvc is None and (request.command == "prepare" or config.output.storage is None):
        raise InputError(
            "--pvc: none given; pods lose their disks when the job ends, so name a volume claim that they share, "
            "or set output.storage"
        )
    if options.pvc is None and "prepared" in (config.model.path, config.retain_model) and plan(request).count:
        raise InputError("model.path: 'prepared' models are made once and read by all pods; give a volume with --pvc")
    if request.command != "prepare":
        _check_output(request, options)
        _check_tracking(config, options)
    for key, value in _paths(config):
        if options.pvc is None or not _under(value, mount):
            where = f"under {mount}, where --pvc is mounted" if options.pvc else "on a volume, given with --pvc"
            raise InputError(f"{key}: {str(value)!r} is a path of this machine; with --kuberay it must lie {where}")


def _check_gpus(request: Request) -> None:
    train = request.config.train
    ray_start.check_gpus(train)
    if train.gpus_per_worker == "auto":
        raise ConfigError("train.gpus_per_worker", "auto", "a number with --kuberay, which decides what pods get")
    if train.workers == 0 and float(train.gpus_per_worker) > 0:
        config = request.config
        makes = "prepare" if "prepared" in (config.model.path, config.retain_model) else None
        if on_head := makes if request.command == "search" else request.command:
            raise ConfigError("train.workers", 0, f"from 1 with GPUs: {on_head} would run on the head, which has none")


def _check_output(request: Request, options: Options) -> None:
    folder, mount = request.config.output.dir, options.mount
    fix = f"such as --set output.dir={mount}/runs/name"
    if request.shared_output:
        raise InputError(f"output.dir: a relative path means nothing on pods; allowed: a folder under {mount}, {fix}")
    if options.pvc is not None and not _under(folder, mount):
        raise InputError(f"output.dir: got {folder!r}, allowed: a folder under {mount}, where --pvc is mounted, {fix}")


def _check_tracking(config: RunConfig, options: Options) -> None:
    uri = str(config.track.uri)
    fix = "use a server that pods reach, such as --tracking-uri http://HOST:5000"
    if secret(uri) and not options.secrets:
        raise InputError(
            "track.uri: holds a user name or password, which no manifest may; put the whole URI into a Kubernetes "
            "Secret as MLFLOW_TRACKING_URI and name that with --secret"
        )
    database = sqlite_file(uri)
    if database is not None and (options.pvc is None or not _under(database, options.mount)):
        also = f", or --tracking-uri sqlite:///{options.mount}/mlflow.db" if options.pvc else ""
        raise InputError(f"track.uri: {uri} lies on this machine; {fix}{also}")
    if database is None and authentication.is_local(urlsplit(uri).hostname or ""):
        raise InputError(f"track.uri: {uri} means each pod itself; {fix}")


def _paths(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every file and folder that the job would read, as the config names it."""
    values = settings.flat(config)
    for key in ("benchmark.forget", "benchmark.retain", "benchmark.holdout", "benchmark.data_dir"):
        if values[key]:
            yield key, values[key]
    asked = config.evaluate.lm_eval
    yield from ((f"evaluate.lm_eval.data.{task}", file) for task, file in asked.data.items())
    if asked.include_path:
        yield "evaluate.lm_eval.include_path", asked.include_path
    for key in (*packages.MODELS, packages.TOKENIZER):
        if packages.is_folder(values[key]):
            yield key, values[key]


def _under(path: Any, mount: str) -> bool:
    """Whether ``path`` is a strict descendant of ``mount`` once ``..`` is resolved."""
    given = PurePosixPath(path)
    return given.is_absolute() and ".." not in given.parts and PurePosixPath(mount) in given.parents


def plan(request: Request) -> Pods:
    """Pods from the config: one worker each, or as many as share its one GPU; a search has room for its trials."""
    train = request.config.train
    gpus = float(train.gpus_per_worker)
    trials = (request.config.search.concurrent or 1) if request.command == "search" else 1
    slots = trials * (train.workers or (1 if request.command == "search" else 0))
    share = math.floor(1 / gpus + 1e-9) if 0 < gpus < 1 else 1
    count = math.ceil(slots / share)
    fewest = count if train.min_workers is None else min(count, train.min_workers)
    return Pods(count, fewest, train.cpus_per_worker * share, math.ceil(gpus))


def ray_version() -> str:
    """Version of Ray here, which the image must have too."""
    return version("ray")
