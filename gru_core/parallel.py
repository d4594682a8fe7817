"""The worker group as the core sees it: sums, gathers, no-sync windows. One process is a group of one.

Only scalars and small Python objects travel here. Gradients travel through DDP or FSDP2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Ranks that run the same step on different rows.

    Attributes:
        rank: this process, 0 to size - 1.
        size: number of processes.
        device: where this rank's model computes.
        process_group: its ``torch.distributed`` group; None: the default one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    process_group: Any = None

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's items, every size-th: shares differ by at most one item."""
        return list(items[self.rank :: self.size])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise float64 sum over ranks, the same on every rank."""
        if self.size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.process_group)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order, on every rank (small picklable objects only)."""
        if self.size == 1:
            return [value]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, value, group=self.process_group)
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
            dist.barrier(group=self.process_group)


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
    return DistributedDataParallel(
        model, device_ids=ids, process_group=group.process_group, gradient_as_bucket_view=False
    )


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread the parameters over the ranks: every forward pass is then a collective."""
    return isinstance(unwrap(model), FSDPModule)


def no_sync(model: nn.Module, active: bool) -> AbstractContextManager[Any]:
    """A window in which backward accumulates locally, without communication.

    Not under FSDP2, where it would hold whole gradients: there every micro-batch is reduced into the shards.
    """
    return model.no_sync() if active and isinstance(model, DistributedDataParallel) else nullcontext()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor (the same memory), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Give whole weights back after forward passes without a backward, which leave the root's together; the model's
    parameters are its shards again. Nothing to do where the model is not sharded."""
    plain = unwrap(model)
    if isinstance(plain, FSDPModule):
        plain.reshard()


Forward = Callable[..., Any]


@contextmanager
def lockstep(model: nn.Module, group: Group) -> Iterator[Forward]:
    """A forward pass without gradients that ranks may call a different number of times, or never.

    It goes past DDP, which may start a collective in its forward that a rank without rows would not join. Under FSDP2
    each pass is a collective: ranks that are done take empty passes until the last one is done, so leave the window
    on every rank, and do not raise in it on one of them alone.
    """
    plain = unwrap(model)
    if not is_sharded(model) or group.size == 1:
        with torch.no_grad():
            yield plain
        reshard(plain)
        return

    def forward(**inputs: Any) -> Any:
        group.sum([1.0])
        return plain(**inputs)

    token = torch.zeros((1, 1), dtype=torch.int64, device=group.device)
    with torch.no_grad():
        yield forward
        while group.sum([0.0])[0] > 0:
            plain(input_ids=token, use_cache=False)
    reshard(plain)
