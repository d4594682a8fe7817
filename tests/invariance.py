"""The same run on any number of workers: every objective, rule and retain loss, under every layout of the workers.

One process group runs the whole matrix. A layout is a number of workers, a strategy and a micro-batch; each is compared
with one process that takes the global batch at once.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gru_core import models
from gru_core.config import LoraConfig, ModelConfig, RectifyConfig, RetainConfig, RunConfig
from gru_core.errors import ConfigError
from gru_core.loop import Hooks, Run
from gru_core.losses import Rows
from gru_core.objectives import OBJECTIVES, build_objective
from gru_core.parallel import Group
from gru_core.placing import frozen, place
from gru_core.rectify import RULES
from gru_core.retain import RETAIN_LOSSES
from gru_core.sharding import whole
from tests import small

STEPS = 20
WORKERS = 4


@dataclass(frozen=True)
class Layout:
    """How the global batch is spread; ``micro``: rows per forward pass on each worker, None: all at once;
    ``offload``: shards rest in host memory."""

    workers: int
    strategy: str = "ddp"
    micro: int | None = None
    offload: bool = False

    def __str__(self) -> str:
        micro = f", micro-batch {self.micro}" if self.micro else ""
        return f"{self.workers} x {self.strategy}{micro}" + (", CPU offload" if self.offload else "")


ALL = [
    Layout(1, micro=3), Layout(2), Layout(2, micro=2), Layout(4), Layout(4, micro=1),
    Layout(2, "fsdp"), Layout(2, "fsdp", micro=2), Layout(4, "fsdp"), Layout(4, "fsdp", micro=2),
]  # fmt: skip
LAYOUTS = [Layout(1, micro=3), Layout(2), Layout(4, micro=1), Layout(2, "fsdp", micro=2), Layout(4, "fsdp")]
FEWER = [Layout(2, micro=3), Layout(2, "fsdp", micro=3), Layout(4, "fsdp")]
HOST = [Layout(2, "fsdp", micro=3, offload=True)]


@dataclass(frozen=True)
class Case:
    """One cell: what is run. ``batch``: 10 rows on 4 workers are shares of 3, 3, 2 and 2; ``cancels``: the rows to
    keep are those to forget, and 99 % of every gradient is removed."""

    objective: str
    rule: str
    retain: str = "nll"
    lora: bool = False
    batch: int = 10
    forget: int = 12
    checkpointing: bool = False
    cancels: bool = False

    def config(self, layout: Layout, folder: str, lr: float = 1e-3) -> RunConfig:
        base = small.config(
            STEPS, objective=self.objective, lr=lr, batch_size=self.batch, evaluate_every=STEPS,
            train={
                "strategy": layout.strategy, "workers": layout.workers, "micro_batch": layout.micro,
                "cpu_offload": layout.offload,
                "activation_checkpointing": self.checkpointing and layout.workers > 1,
            },
        )  # fmt: skip
        lora = LoraConfig(rank=2) if self.lora else None
        return replace(
            base, model=ModelConfig(path=folder, lora=lora), rectify=_NEARLY if self.cancels else _rectify(self.rule),
            retain=RetainConfig(loss=self.retain),
        )  # fmt: skip


_NEARLY = RectifyConfig(strength=0.99, ema=1.0)
"""Where the gradients are opposite: what is left is measured, since the Gram matrix has lost its digits."""


def _rectify(rule: str) -> RectifyConfig:
    """The rule with its defaults, or, where it needs a retain weight, with 1."""
    try:
        config = RectifyConfig(rule=rule)
        RULES[rule](config)
    except ConfigError:
        return RectifyConfig(rule=rule, retain_weight=1.0)
    return config


def matrix() -> Iterator[tuple[Case, list[Layout]]]:
    """Every cell, with its layouts. What is registered later is in it by itself."""
    for objective in OBJECTIVES:
        for rule in RULES:
            yield Case(objective, rule), ALL if (objective, rule) == ("npo", "gru") else LAYOUTS
            yield Case(objective, rule, lora=True), FEWER
    for retain in RETAIN_LOSSES:
        for rule in RULES:
            if retain != "nll":
                yield Case("npo", rule, retain), LAYOUTS
                yield Case("ga", rule, retain, lora=True), FEWER
    yield Case("npo", "gru", forget=1), LAYOUTS  # ranks without a row to measure the reference on
    yield Case("npo", "gru", batch=4, checkpointing=True), LAYOUTS
    yield Case("ga", "gru", batch=12, cancels=True), [Layout(2), Layout(2, "fsdp"), Layout(4, "fsdp", micro=2)]
    yield Case("npo", "gru", "kl", checkpointing=True), HOST  # two models, both in host memory
    yield Case("npo", "gru", "kl", lora=True, checkpointing=True), HOST


@dataclass(frozen=True)
class Difference:
    """A layout against one process: of the weights, relative to the norm of the whole update; of the tracked step
    metrics, the largest relative one."""

    case: Case
    layout: Layout
    precision: str
    weights: float
    metrics: float


Trace = tuple[torch.Tensor, list[dict[str, float]]]


def _run(case: Case, layout: Layout, group: Group, folder: str, dtype: torch.dtype, sgd: bool) -> Trace:
    """Final trained weights and the metrics of every step."""
    # SGD's updates must be well above the rounding of the weights themselves; adapters scale them up, and a run that
    # diverges multiplies every rounding error
    config = case.config(layout, folder, (2e-3 if case.lora else 0.02) if sgd else 1e-3)
    rows = small.token_rows()
    kept = rows[:12] if case.cancels else rows[12:]

    def start() -> Any:
        return models.load_model(folder, config.model)

    source = folder if layout.strategy == "fsdp" else start
    net = place(source, config.model, config.train, group)
    compares = RETAIN_LOSSES[case.retain].needs_frozen
    other = frozen(net, source, config.model, config.train, group) if compares else None
    trace: list[dict[str, float]] = []
    hooks = Hooks(log=lambda step, metrics: trace.append(metrics))
    run = Run(
        net, config, build_objective(config.unlearn), Rows(rows[: case.forget]), Rows(kept), group, hooks,
        frozen=other,
    )  # fmt: skip
    if sgd:
        run.step.optimizer = torch.optim.SGD(run.step.parameters)  # type: ignore[assignment]
    assert run().steps == STEPS
    model = run.step.model.module if hasattr(run.step.model, "module") else run.step.model
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    return torch.cat([t.reshape(-1) for _, t in whole(model, names)]), trace


def _metrics_apart(a: list[dict[str, float]], b: list[dict[str, float]]) -> float:
    assert len(a) == len(b)
    worst = 0.0
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            worst = max(worst, abs(left[key] - right[key]) / max(1e-3, abs(left[key])))
    return worst


def _work(rank: int, store: str, folder: str, out: str, precision: str, only: list[int]) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    groups = {n: dist.new_group(list(range(n))) for n in (1, 2, 4)}
    dtype = torch.float64 if precision.startswith("fp64") else torch.float32
    models.weight_dtype = lambda config: dtype  # type: ignore[assignment]
    sgd = precision.endswith("sgd")
    found: list[Difference] = []
    for number, (case, layouts) in enumerate(matrix()):
        if only and number not in only:
            continue
        alone = begin = None
        if rank == 0:
            alone = _run(case, Layout(1), Group(), folder, dtype, sgd)
            net = place(lambda: models.load_model(folder, ModelConfig()), case.config(Layout(1), folder).model,
                        small.config().train, Group())  # fmt: skip
            begin = torch.cat([p.detach().reshape(-1) for p in net.parameters() if p.requires_grad])
        for layout in layouts:
            if rank >= layout.workers:
                continue
            group = Group(rank, layout.workers, torch.device("cpu"), groups[layout.workers])
            weights, trace = _run(case, layout, group, folder, dtype, sgd)
            if alone is not None and begin is not None:
                apart = float((weights - alone[0]).norm() / (alone[0] - begin).norm())
                found.append(Difference(case, layout, precision, apart, _metrics_apart(alone[1], trace)))
    if rank == 0:
        Path(out).write_text(json.dumps([asdict(d) for d in found]))
    dist.barrier()
    dist.destroy_process_group()


def measure(precision: str, only: list[int] | None = None) -> list[Difference]:
    """Run the matrix. ``precision``: ``fp64-adamw``, ``fp32-sgd`` or ``fp32-adamw``; ``only``: numbers of cells."""
    with tempfile.TemporaryDirectory() as place_:
        folder, store, out = (str(Path(place_) / name) for name in ("model", "store", "out.json"))
        models.save_model(small.model(), small.tokenizer(), Path(folder))
        mp.spawn(_work, args=(store, folder, out, precision, only or []), nprocs=WORKERS)
        rows = json.loads(Path(out).read_text())
    return [Difference(Case(**row.pop("case")), Layout(**row.pop("layout")), **row) for row in rows]
