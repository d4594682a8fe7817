"""Ray for this process: join the cluster at ``RAY_ADDRESS`` or start one here; refuse what it cannot hold.

Everything that Ray prints or reports by itself is switched off unless ``--verbose`` was given.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from gru_core.config import TrainConfig
from gru_core.errors import ConfigError, InputError
from pipelines import authentication, capacity
from pipelines.console import verbose
from pipelines.launch import QUIET

Say = Callable[[str], None]

SWITCHES = {
    **QUIET,
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a config mean the same in every process
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials keep their own journals
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a failed trial is one line of ours
    "RAY_AIR_NEW_OUTPUT": "0",  # prints tables even when told to be silent
}
REACH_S = 5.0
"""Longest wait for a connection to a cluster that is named."""


def connect(train: TrainConfig, say: Say) -> float:
    """Make Ray ready for ``train``; does nothing twice.

    Returns:
        GPUs of each worker (of each trial with ``workers: 0``).

    Raises:
        InputError: the cluster cannot be reached or refuses us, or has too few CPUs or GPUs.
    """
    start(say)
    import ray

    gpus = gpus_per_worker(train, ray.cluster_resources().get("GPU", 0.0))
    capacity.check_room(train, gpus, capacity.nodes())
    return gpus


def start(say: Say) -> None:
    """Joins the cluster at ``RAY_ADDRESS``, or starts Ray on this machine; nothing where it runs already.

    Ray that is started here asks for this user's token; a cluster that asks for one gets it; one over a network
    that does not is worth a warning.

    Raises:
        InputError: the cluster at ``RAY_ADDRESS`` cannot be reached, or refuses us.
    """
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    import ray

    _keep_keys_back()
    if ray.is_initialized():
        return
    _quiet_loggers()
    address = os.environ.get("RAY_ADDRESS", "").strip()
    _check_address(address)
    say(f"joining the Ray cluster at {address}" if address else "starting Ray on this machine")
    options: dict[str, Any] = {"log_to_driver": verbose(), "logging_level": _level()}
    if address:
        options |= {"address": address, "runtime_env": {"env_vars": _new_variables()}}
    else:
        options |= {"address": "local", "include_dashboard": False}
    _token(address, say)
    on_stop = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if not address:
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"RAY_ADDRESS: the Ray cluster at {address} cannot be joined: {line[:200]}") from None
    finally:
        authentication.keep_private()
        if callable(on_stop) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_stop)  # Ray puts one there that ends the process on the spot
    _warn_open(address, say)


def _keep_keys_back() -> None:
    """Ray Tune hands AWS keys to its trials in a runtime environment, which Ray's logs show in clear.

    Trials have them without that: from the environment of the Ray processes that start them.
    """
    with contextlib.suppress(ImportError, AttributeError):  # a Ray that does not do that
        from ray.tune.execution import class_cache

        class_cache.ENV_VARS_TO_PROPAGATE -= {n for n in class_cache.ENV_VARS_TO_PROPAGATE if n.startswith("AWS_")}


def _level() -> str:
    return "INFO" if verbose() else "ERROR"


def _quiet_loggers() -> None:
    if not verbose():
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # "Trials did not complete" is said by us


def _check_address(address: str) -> None:
    """A cluster that does not answer is told within seconds; Ray itself tries for a minute."""
    if not address or address in ("auto", "local"):
        return
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"RAY_ADDRESS: got {address!r}, a dashboard, which takes jobs (`gru submit`); allowed here: auto, "
            "HOST:6379, ray://HOST:10001, or unset for this machine"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"RAY_ADDRESS: got {address!r}, allowed: auto, HOST:6379, ray://HOST:10001, or unset")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except OSError as error:
        raise InputError(f"RAY_ADDRESS: no Ray cluster answers at {address} ({error.strerror or error})") from None


def _new_variables() -> dict[str, str]:
    """Switches for the workers of a cluster, less those that a Ray job has set for us: Ray refuses both."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    taken = (job.get("runtime_env") or {}).get("env_vars") or {}
    names = (*SWITCHES, "GRU_VERBOSE", "TOKENIZERS_PARALLELISM", "MLFLOW_DISABLE_TELEMETRY")
    return {name: os.environ[name] for name in names if name in os.environ and name not in taken}


def _token(address: str, say: Say) -> None:
    """Has the token ready that Ray is to ask for, or that the cluster at ``address`` asks for.

    Raises:
        InputError: the cluster asks for a token and there is none here, or refuses it.
    """
    if not address or address == "local":
        if os.environ.get(authentication.MODE, "token").lower() != "token":
            say("warning: RAY_AUTH_MODE switches authentication off: whoever reaches this machine can use its Ray")
            return
        authentication.make_token()
        authentication.switch_on()
    elif ":" in address and "://" not in address and authentication.asks(address):
        found = authentication.find_token()
        if not found or authentication.asks(address, found[0]):
            what = f"refuses the token from {found[1]}" if found else "asks for a token and none was found here"
            way = "set RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token) to the token of that cluster"
            raise InputError(f"RAY_ADDRESS: the Ray cluster at {address} {what}; {way}")
        authentication.switch_on()  # Ray does that by itself for a cluster that it finds on this machine


def _warn_open(address: str, say: Say) -> None:
    """Warns of a cluster over a network that asks nobody for a token; inside a job its submitter was warned."""
    import ray

    if not address or address == "local" or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return
    client = address.startswith("ray://")
    place = address.removeprefix("ray://") if client else str(ray.get_runtime_context().gcs_address)
    if authentication.is_local(place.rpartition(":")[0]):
        return
    token = os.environ.get(authentication.MODE, "").lower() == "token"
    if (not token) if client else authentication.asks(place) is False:
        say(authentication.warning(place))


def check_gpus(train: TrainConfig) -> None:
    """Refuses shares of a GPU that cannot work, whatever the machine has.

    Raises:
        ConfigError: a fraction above 1, or any fraction where several workers would meet on one GPU (NCCL refuses
            two ranks on one device).
    """
    gpus = train.gpus_per_worker
    if gpus == "auto" or float(gpus).is_integer():
        return
    if train.workers > 1:
        raise ConfigError("train.gpus_per_worker", gpus, f"auto or a whole number with {train.workers} workers")
    if float(gpus) > 1:
        raise ConfigError("train.gpus_per_worker", gpus, "auto, a fraction below 1, or a whole number")


def gpus_per_worker(train: TrainConfig, in_cluster: float) -> float:
    """GPUs of each worker, ``auto`` resolved: 1 where the cluster has any, be they enough for all or not.

    Raises:
        ConfigError: as :func:`check_gpus`.
    """
    check_gpus(train)
    if train.gpus_per_worker == "auto":
        return 1.0 if in_cluster > 0 else 0.0
    return float(train.gpus_per_worker)


def local_gpus(train: TrainConfig) -> float:
    """GPUs for work in this process (``workers: 0``), ``auto`` resolved; 0 means the CPU.

    Raises:
        ConfigError: as :func:`check_gpus`, or more than this machine has.
    """
    import torch

    check_gpus(train)
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if train.gpus_per_worker == "auto":
        return 1.0 if here else 0.0
    gpus = float(train.gpus_per_worker)
    if gpus > here:
        raise ConfigError("train.gpus_per_worker", train.gpus_per_worker, f"auto, or at most {here}, which is here")
    return gpus
