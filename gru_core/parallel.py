"""The worker group as the core sees it: sums, gathers, no-sync windows. One process is a group of one.

Shape legend: none; only scalars and small Python objects travel here. Gradients travel through DDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Ranks that run the same step on different rows.

    Attributes:
        rank: this process, 0 to size - 1.
        size: number of processes.
        device: where this rank's model lives.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's items, every size-th: shares differ by at most one item."""
        return list(items[self.rank :: self.size])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise float64 sum over ranks, the same on every rank."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order, on every rank (small picklable objects only)."""
        if self.size == 1:
            return [value]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, value)
        return parts

    def gather_shared(self, mine: Sequence[T]) -> list[T]:
        """Undo :meth:`share`: every rank's results back in the order of the items that were shared."""
        parts = self.gather(list(mine))
        out: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            out[rank :: self.size] = part
        return out

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def current_group(device: torch.device | None = None) -> Group:
    """The group of the initialised ``torch.distributed`` process group, or a group of one."""
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if dist.is_available() and dist.is_initialized():
        return Group(dist.get_rank(), dist.get_world_size(), device)
    return Group(device=device)


def wrap(model: nn.Module, group: Group) -> nn.Module:
    """DDP around ``model`` where there is more than one rank; the module itself otherwise.

    ``gradient_as_bucket_view`` stays off: a stashed gradient would alias the next stream's.
    """
    if group.size == 1:
        return model
    ids = [group.device.index] if group.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=False)


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def no_sync(model: nn.Module, active: bool) -> AbstractContextManager[Any]:
    """A window in which backward accumulates locally, without communication."""
    return model.no_sync() if active and isinstance(model, DistributedDataParallel) else nullcontext()
