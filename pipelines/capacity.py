"""What the nodes of a Ray cluster hold: workers, and runs at a time. Pure functions of their resources."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gru_core.config import TrainConfig
from gru_core.errors import InputError

Node = Mapping[str, float]


def nodes() -> list[dict[str, float]]:
    """Resources of every living node of the cluster that was joined."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def slots(train: TrainConfig, gpus: float, have: Sequence[Node]) -> int:
    """How many workers (for ``workers: 0``: runs) the nodes hold together; a worker never spans two nodes."""
    return sum(_on_node(train.cpus_per_worker, gpus, node) for node in have)


def _on_node(cpus: int, gpus: float, node: Node) -> int:
    room = int(node.get("CPU", 0) // cpus)
    if gpus == 0:
        return room
    whole = int(node.get("GPU", 0))
    by_gpu = whole * math.floor(1 / gpus + 1e-9) if gpus < 1 else math.floor(whole / gpus + 1e-9)
    return min(room, by_gpu)


def check_room(train: TrainConfig, gpus: float, have: Sequence[Node]) -> None:
    """Whether one run fits.

    Raises:
        InputError: it does not; what it needs and what there is.
    """
    needed, room = max(1, train.min_workers or train.workers), slots(train, gpus, have)
    if room >= needed:
        return
    total = {name: sum(node.get(name, 0) for node in have) for name in ("CPU", "GPU")}
    who = f"train.workers: {needed} workers need" if train.workers else "a trial needs"
    raise InputError(
        f"{who} {needed * train.cpus_per_worker} CPUs and {needed * gpus:g} GPUs "
        f"({train.cpus_per_worker} and {gpus:g} on one node each), the cluster has {total['CPU']:g} CPUs and "
        f"{total['GPU']:g} GPUs on {len(have)} node(s): room for {room}"
    )


def concurrency(train: TrainConfig, gpus: float, limit: int | None, have: Sequence[Node]) -> int:
    """Runs at a time: as many as the nodes hold, at most ``limit``, at least one."""
    room = max(1, slots(train, gpus, have) // max(1, train.workers))
    return min(room, limit or room)
