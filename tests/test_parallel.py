"""Two workers take the step of one: same data order, same gradients, same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gru_core.parallel import Group, current_group
from tests import small

CASES: list[dict[str, Any]] = [
    {"objective": "npo"},
    {"objective": "ga", "rectify": {"strength": 2.0, "ema": 1.0}, "train": {"micro_batch": 2}},
    {"objective": "wga", "rectify": {"rule": "sum", "retain_weight": 1.0}, "batch_size": 7},
    {"objective": "simnpo", "rectify": {"rule": "none"}, "train": {"micro_batch": 3}},
    {"objective": "npo", "rectify": {"rule": "none"}, "forget": 1},  # a rank without a reference row
]


def settings(case: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in case.items() if k != "forget"}


def _rank(rank: int, size: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    group = current_group(torch.device("cpu"))
    results = []
    for case in CASES:
        net = small.model(torch.float64)
        small.build(small.config(20, **settings(case)), net, group, forget=case.get("forget", 12))()
        results.append(small.weights(net))
    torch.save(results, f"{out}-{rank}")
    parts = group.gather_shared(group.share(list(range(7))))
    assert parts == list(range(7))
    assert group.sum([rank + 1.0, 0.5]) == [3.0, 1.0]
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_are_one(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(2, str(tmp_path / "store"), str(tmp_path / "weights")), nprocs=2)
    first, second = (torch.load(tmp_path / f"weights-{r}", weights_only=True) for r in range(2))
    for case, a, b in zip(CASES, first, second, strict=True):
        assert torch.equal(a, b), f"ranks differ: {case}"
        net = small.model(torch.float64)
        small.build(small.config(20, **settings(case)), net, forget=case.get("forget", 12))()
        alone, start = small.weights(net), small.weights(small.model(torch.float64))
        relative = (a - alone).norm() / (alone - start).norm()
        assert relative < 1e-8, f"{case}: {relative:.2e} of the update's norm"


def test_a_group_of_one() -> None:
    group = Group()
    assert group.share([1, 2, 3]) == [1, 2, 3]
    assert group.sum([1, 2]) == [1.0, 2.0]
    assert group.gather("x") == ["x"]
    assert group.gather_shared([3, 4]) == [3, 4]
