"""Relearning and quantisation on two ranks: one path for whole copies, DDP and FSDP2, the numbers of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from gru_core import models
from gru_core.config import LoraConfig, ModelConfig, QuantiseConfig, RunConfig
from gru_core.loop import Hooks, Run
from gru_core.losses import Rows
from gru_core.objectives import build_objective
from gru_core.parallel import Group, unwrap
from gru_core.placing import place, place_frozen
from gru_core.sharding import gathered, whole
from tests import robust, small

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# 3 rows a step on 2 ranks: unequal shares, and at last (1 row) a rank without any
RELEARN = replace(robust.QUICK, steps=3, every=1, batch_size=3)
EVERY = robust.config(
    "relearn", "relearn_retain", "quantise", relearn=RELEARN, quantise=QuantiseConfig(group_size=8)
)  # fmt: skip
LORA = LoraConfig(rank=2)
ALONE = Group()


def settings(folder: str, workers: int, strategy: str, lora: LoraConfig | None, **train: Any) -> RunConfig:
    config = small.config(4, train={"workers": workers, "strategy": strategy, **train}, evaluate_every=2)
    return replace(config, model=ModelConfig(path=folder, lora=lora), evaluate=EVERY)


def placed(config: RunConfig, group: Group, frozen: bool) -> nn.Module:
    path = config.model.path
    start = path if config.train.strategy == "fsdp" else lambda: models.load_model(path, config.model)
    return (place_frozen if frozen else place)(start, config.model, config.train, group)


def scores(config: RunConfig, group: Group, frozen: bool) -> dict[str, float]:
    """All scores; the model is as before."""
    net = placed(config, group, frozen)
    before = robust.state(net)
    found = robust.measured(net, config.evaluate, config.model, group).scores
    assert robust.same(robust.state(net), before), "the model is another one"
    return found


def _scores_are_those_of_one_process(folder: str, group: Group) -> None:
    for lora in (None, LORA):
        for frozen in (False, True):
            wanted = scores(settings(folder, 0, "ddp", lora), ALONE, frozen)
            for strategy in ("ddp", "fsdp"):
                found = scores(settings(folder, 2, strategy, lora), group, frozen)
                assert found.keys() == wanted.keys()
                apart = {k: abs(found[k] - wanted[k]) for k in found if abs(found[k] - wanted[k]) > 1e-8}
                assert not apart, (lora, frozen, strategy, apart)
    one_row = replace(EVERY, metrics=("relearn",), relearn=replace(RELEARN, batch_size=1))
    for strategy in ("ddp", "fsdp"):
        alone, two = (replace(settings(folder, n, strategy if n else "ddp", None), evaluate=one_row) for n in (0, 2))
        assert scores(two, group, False) == pytest.approx(scores(alone, ALONE, False), abs=1e-8)
    offload = settings(folder, 2, "fsdp", LORA, cpu_offload=True, activation_checkpointing=True)
    wanted = scores(settings(folder, 0, "ddp", LORA), ALONE, True)
    assert scores(offload, group, True) == pytest.approx(wanted, abs=1e-8)


def _trained(config: RunConfig, group: Group, measures: bool) -> Run:
    net = placed(config, group, False)

    def look(step: int, last: bool) -> None:
        if measures:
            robust.measured(net, EVERY, config.model, group)

    rows, objective = robust.tokens(robust.rows()), build_objective(config.unlearn)
    run = Run(net, config, objective, Rows(rows[:12]), Rows(rows[12:]), group, Hooks(evaluate=look))
    run()
    return run


def _training_takes_no_notice(folder: str, group: Group) -> None:
    """Metrics at every evaluation, or none: the same weights and moments, bit for bit."""
    for lora in (None, LORA):
        for strategy in ("ddp", "fsdp"):
            config = settings(folder, 2, strategy, lora)
            ends: list[list[torch.Tensor]] = []
            for measures in (False, True):
                run = _trained(config, group, measures)
                ends.append([t for _, t in whole(unwrap(run.step.model))])
                ends[-1] += [gathered(v) for s in run.step.optimizer.state.values() for v in s.values()]
            assert len(ends[0]) == len(ends[1]) > 10
            assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)), (lora, strategy)


def _rank(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = Group(rank, 2, torch.device("cpu"))
    _training_takes_no_notice(folder, group)
    models.weight_dtype = lambda config: torch.float64  # type: ignore[assignment]
    _scores_are_those_of_one_process(folder, group)
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    """The assertions are in the ranks."""
    folder = tmp_path / "model"
    models.save_model(robust.model(), robust.tokenizer(), folder)
    mp.spawn(_rank, args=(str(tmp_path / "store"), str(folder)), nprocs=2)
