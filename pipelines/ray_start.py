"""Joins the Ray cluster at hand, or starts a local one, and refuses what it cannot hold before waiting."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gru_core.config import TrainConfig
from gru_core.errors import InputError
from pipelines import capacity
from pipelines.launch import QUIET

Say = Callable[[str], None]


def connect(train: TrainConfig, say: Say) -> float:
    """Make Ray ready for ``train``.

    Returns:
        GPUs of each worker (of each trial with ``workers: 0``).

    Raises:
        InputError: the cluster cannot be reached, or has too few CPUs or GPUs.
    """
    start(say)
    import ray

    gpus = gpus_per_worker(train, ray.cluster_resources().get("GPU", 0.0))
    capacity.check_room(train, gpus, capacity.nodes())
    return gpus


def start(say: Say) -> None:
    """``ray.init``: the cluster of ``RAY_ADDRESS`` (set inside a Ray job), else one on this machine."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    verbose = os.environ.get("GRU_VERBOSE") == "1"
    options: dict[str, Any] = {"log_to_driver": verbose, "configure_logging": verbose}
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        say("starting Ray on this machine")
        options |= {"include_dashboard": False}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"no Ray cluster answers at {address or 'this machine'}: {reason}") from error
    _tighten_token()


def _tighten_token() -> None:
    """Ray writes its token readable for all; it is a password."""
    with contextlib.suppress(OSError):
        token = Path.home() / ".ray" / "auth_token"
        if token.exists():
            token.chmod(0o600)


def gpus_per_worker(train: TrainConfig, in_cluster: float) -> float:
    """GPUs of each worker, ``auto`` resolved."""
    if train.gpus_per_worker == "auto":
        return 1.0 if in_cluster >= max(1, train.workers) else 0.0
    return float(train.gpus_per_worker)
