"""Any number of workers takes the steps of one: same data order, same losses, same Gram matrix, same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gru_core.objectives import OBJECTIVES
from gru_core.parallel import Group, current_group
from gru_core.rectify import RULES
from gru_core.retain import RETAIN_LOSSES
from tests import invariance


def test_the_matrix_has_everything_that_is_registered() -> None:
    cases = [case for case, _ in invariance.matrix()]
    for lora in (False, True):
        assert {(c.objective, c.rule) for c in cases if c.lora is lora} >= {(o, r) for o in OBJECTIVES for r in RULES}
    assert {c.retain for c in cases} == set(RETAIN_LOSSES)
    layouts = {layout for _, every in invariance.matrix() for layout in every}
    assert {(x.workers, x.strategy) for x in layouts} == {(1, "ddp"), (2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")}
    host = [case for case, layouts in invariance.matrix() if any(layout.offload for layout in layouts)]
    assert {case.lora for case in host} == {False, True}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_layout_takes_the_steps_of_one_process() -> None:
    """fp64 under AdamW: 20 steps agree within 1e-8 of the update's norm, and so does every tracked step metric."""
    found = invariance.measure("fp64-adamw")
    assert len(found) == sum(len(layouts) for _, layouts in invariance.matrix())
    worst = max(found, key=lambda d: d.weights)
    assert worst.weights < 1e-8, f"{worst.case}, {worst.layout}: {worst.weights:.1e} of the update's norm"
    worst = max(found, key=lambda d: d.metrics)
    assert worst.metrics < 1e-7, f"{worst.case}, {worst.layout}: a step metric differs by {worst.metrics:.1e}"


@pytest.mark.slow
def test_in_single_precision_too() -> None:
    """fp32 under SGD, for the rectified step with each objective and retain loss, adapters included; but for gradients
    that nearly cancel, of which little is left beside rounding."""
    every = enumerate(invariance.matrix())
    chosen = [i for i, (c, _) in every if c.rule == "gru" and c.forget == 12 and not c.cancels]
    found = invariance.measure("fp32-sgd", chosen)
    worst = max(found, key=lambda d: d.weights)
    assert worst.weights < 1e-5, f"{worst.case}, {worst.layout}: {worst.weights:.1e} of the update's norm"


def _rank(rank: int, size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    group = current_group(torch.device("cpu"))
    assert group.gather_shared(group.share(list(range(7)))) == list(range(7))
    assert group.sum([rank + 1.0, 0.5]) == [3.0, 1.0]
    assert group.gather(rank) == [0, 1]
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_group_of_two(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(2, str(tmp_path / "store")), nprocs=2)


def test_a_group_of_one() -> None:
    group = Group()
    assert group.share([1, 2, 3]) == [1, 2, 3]
    assert group.sum([1, 2]) == [1.0, 2.0]
    assert group.gather("x") == ["x"]
    assert group.gather_shared([3, 4]) == [3, 4]
