"""``gru plan``: what a run takes before money is spent on it.

Reads the config and the model's ``config.json``, no weights. The numbers come from ``gru_core.size`` and
``gru_core.cost``; here they are laid out, and a strategy is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gru_core import cost, models
from gru_core.config import LoraConfig, RunConfig
from gru_core.errors import ConfigError
from gru_core.size import Saved, saved, shape
from pipelines import plan_inputs, report
from pipelines.inputs import absolute
from pipelines.plan_inputs import Lengths

GIB = 2**30
MACHINE = 8
"""GPUs of one machine."""
OTHER = 2 * GIB
"""CUDA context, libraries and communication buffers of one GPU: an assumption, not measured."""
SLACK = 0.05
"""Share of a GPU's memory that the allocator cannot use (fragments): an assumption, not measured."""
NVLINK, NETWORK = 450.0, 50.0
"""GB/s that one GPU sends: within a machine of 8 (NVLink 4), and between machines (InfiniBand NDR, 400 Gb/s)."""


@dataclass(frozen=True)
class Device:
    """One GPU of the plan: memory in GiB, dense FLOPs a second, the share of them that is reached, GB/s it sends."""

    memory: float = 80.0
    flops: float = 989e12
    utilisation: float = 0.4
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("--gpu-memory", self.memory), ("--gpu-flops", self.flops)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(option, value, "a number above 0")
        if not 0 < self.utilisation <= 1:
            raise ConfigError("--utilisation", self.utilisation, "above 0, at most 1")
        if self.bandwidth is not None and not (math.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise ConfigError("--bandwidth", self.bandwidth, "GB/s above 0")


def run(
    config: RunConfig, *, gpus: int | None = None, device: Device | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """What ``config`` takes on each of ``gpus`` GPUs, and what to choose.

    Args:
        gpus: workers with a GPU each; None: ``train.workers``, at least 1.
        tokens: tokens of a row; None: of the benchmark's rows where they can be tokenised here, else 256.

    Raises:
        InputError: no such model or benchmark, more GPUs than rows of a batch, or a number out of range.
    """
    device = device or Device()
    workers = max(1, config.train.workers) if gpus is None else gpus
    rows = config.unlearn.batch_size
    if not 1 <= workers <= rows:
        raise ConfigError("--gpus", workers, f"1 to unlearn.batch_size ({rows}): each needs a row of every batch")
    config = absolute(config)
    settings, notes = plan_inputs.settings(config)
    lengths = plan_inputs.lengths(config, settings, tokens)
    planner = _Planner(config, settings, device, workers, lengths)
    tried = planner.candidates()
    chosen = _best(tried)
    adapters = None
    if config.model.lora is None:
        other = replace(config, model=replace(config.model, lora=LoraConfig()))
        adapters = _best(_Planner(other, settings, device, workers, lengths).candidates())
    return {
        "model": config.model.path,
        "parameters": planner.shape.parameters,
        "trained": planner.shape.trained,
        "gpus": workers,
        "steps": config.unlearn.steps,
        "gpu": asdict(device) | {"bandwidth": planner.bandwidth},
        "tokens": {"mean": lengths.mean, "longest": lengths.longest, "answer": lengths.answer},
        "as_configured": planner.as_configured(),
        "candidates": tried,
        "advice": chosen,
        "with_lora": adapters,
        "notes": [*notes, lengths.source, *planner.notes()],
    }


def _best(tried: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest of those that fit; host memory only where nothing else does, its copies are not in the time."""
    fitting = [c for c in tried if c["fits"]]
    return min(fitting, key=lambda c: (c["cpu_offload"], c["seconds"]["step"]), default=None)


class _Planner:
    """Numbers of one model under several strategies."""

    def __init__(self, config: RunConfig, settings: Any, device: Device, workers: int, lengths: Lengths) -> None:
        self.config, self.device, self.workers, self.lengths = config, device, workers, lengths
        self.settings, self.shape = settings, shape(settings, config.model)
        self.bandwidth = device.bandwidth or (NVLINK if workers <= MACHINE else NETWORK)
        self.rows = -(-config.unlearn.batch_size // workers)
        self.generated = config.evaluate.max_new_tokens if plan_inputs.generates(config) else 0
        self._saved: dict[bool, Saved] = {}

    def as_configured(self) -> dict[str, Any]:
        """What the config says, whether it fits or not."""
        train = self.config.train
        plan = cost.Plan(train.strategy, train.activation_checkpointing, train.cpu_offload)
        return self.option(plan, min(self.rows, train.micro_batch or self.rows))

    def candidates(self) -> list[dict[str, Any]]:
        """Each strategy, with the micro-batch to take."""
        plans = [cost.Plan(), cost.Plan(checkpointing=True)]
        if self.workers > 1:
            plans += [cost.Plan("fsdp"), cost.Plan("fsdp", True)]
        plans.append(cost.Plan("fsdp", True, True))
        return [self._largest(plan) for plan in plans]

    def _largest(self, plan: cost.Plan) -> dict[str, Any]:
        """With the largest micro-batch that fits; where none does, the one that takes least. A batch in one pass may
        take less than in two: gradients then come as activations go."""
        tried = [self.option(plan, size) for size in micro_batches(self.rows)]
        fitting = [o for o in tried if o["fits"]]
        return fitting[-1] if fitting else min(tried, key=lambda o: o["memory"]["total"])

    def option(self, plan: cost.Plan, micro_batch: int) -> dict[str, Any]:
        """One strategy and micro-batch: memory, bytes sent, time."""
        longest, answer = self.lengths.longest, self.lengths.answer
        work = cost.Work(
            self.workers, self.rows, micro_batch, longest, answer, self.config.evaluate.batch_rows, self.generated,
            compared=plan_inputs.compares(self.config),
        )  # fmt: skip
        memory = cost.memory(self.shape, self._kept(plan), self.config, work, plan)
        other = OTHER + round(SLACK * self.device.memory * GIB)
        traffic = cost.traffic(self.shape, self.config, work, plan)
        flops = cost.flops(self.shape, self.config, self.lengths.padded(micro_batch), self.rows, plan)
        compute = flops / (self.device.flops * self.device.utilisation)
        sending = traffic.total / (self.bandwidth * 1e9)
        return {
            "strategy": plan.strategy,
            "activation_checkpointing": plan.checkpointing,
            "cpu_offload": plan.offload,
            "micro_batch": micro_batch,
            "passes": work.passes,
            "memory": asdict(memory) | {"other": other, "total": memory.total + other},
            "fits": memory.total + other <= self.device.memory * GIB,
            "communication": asdict(traffic) | {"total": traffic.total},
            "flops": flops,
            "seconds": {"compute": compute, "communication": sending, "step": max(compute, sending)},
        }

    def _kept(self, plan: cost.Plan) -> Saved:
        model = self.config.model
        cast = plan.strategy == "fsdp" and models.compute_dtype(model) == torch.bfloat16
        if cast not in self._saved:
            self._saved[cast] = saved(self.settings, model, self.lengths.longest, cast)
        return self._saved[cast]

    def notes(self) -> list[str]:
        """What the numbers assume."""
        link = "NVLink within one machine" if self.workers <= MACHINE else "the network between machines"
        out = [
            f"other memory is assumed: {OTHER / GIB:g} GiB for CUDA and NCCL, {SLACK:.0%} of the GPU for fragments",
            f"time is assumed: {self.device.utilisation:.0%} of {self.device.flops / 1e12:g} TFLOP/s, evaluation and "
            "checkpoints left out",
        ]
        if self.workers > 1:
            out.append(
                f"communication is assumed: {self.bandwidth:g} GB/s from each GPU over {link}, hidden behind compute"
            )
        if self.config.model.dtype == "float32":
            out.append("model.dtype is float32: --gpu-flops should be the GPU's rate for it, not the one for bf16")
        return out


def micro_batches(rows: int) -> list[int]:
    """Sizes to choose from, ascending: powers of two up to ``rows``, and its divisors."""
    return [n for n in range(1, rows + 1) if rows % n == 0 or n & (n - 1) == 0]


PARTS = {
    "weights": "weights", "gradients": "gradients", "moving_average": "moving average (EMA)",
    "optimizer": "optimizer", "buckets": "DDP buckets", "reference": "starting model (kl)",
    "activations": "activations, logits", "other": "other (assumed)",
}  # fmt: skip


def lines(document: Mapping[str, Any]) -> list[str]:
    """The document of :func:`run` for people."""
    gpu, given = document["gpu"], document["as_configured"]
    room, trained = f"{gpu['memory']:g} GiB", document["trained"]
    what = "all trained" if trained == document["parameters"] else f"{count(trained)} of them trained"
    out = [
        f"{document['model']}: {count(document['parameters'])} parameters, {what}",
        f"on {document['gpus']} GPU(s) of {room}, as configured: {_named(given)}",
    ]
    memory = given["memory"]
    out += [f"  {label:<22}{amount(memory[name])}" for name, label in PARTS.items() if memory[name]]
    out.append(f"  {'peak, of each GPU':<22}{amount(memory['total'])}: {_verdict(given, room)}")
    out.append(f"  {'evaluation':<22}{amount(memory['evaluation'])} in place of gradients and activations")
    if memory["host"]:
        out.append(f"  {'host memory':<22}{amount(memory['host'])} for each worker")
    steps, step = document["steps"], given["seconds"]["step"]
    out.append(f"{steps} steps of {step:.3g} s: {duration(steps * step)} without evaluation and checkpoints")
    out += [
        "what it could be, each with the largest micro-batch that fits:",
        *report.table(_table(document["candidates"]), _COLUMNS),
    ]
    chosen = document["advice"]
    out.append(f"take: {settings_of(chosen, document['gpus'])}" if chosen else _too_large(document, room))
    if adapters := document["with_lora"]:
        out.append(
            f"with adapters (--set model.lora.rank=16): {_named(adapters)}, "
            f"{adapters['memory']['total'] / GIB:.1f} GiB, {adapters['seconds']['step']:.3g} s a step"
        )
    return out + [f"note: {note}" for note in document["notes"]]


_COLUMNS = ("strategy", "micro_batch", "GiB", "GiB host", "fits", "GB sent", "s compute", "s sending", "s a step")


def _table(options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "strategy": _kind(o), "micro_batch": o["micro_batch"], "GiB": f"{o['memory']['total'] / GIB:.1f}",
            "GiB host": f"{o['memory']['host'] / GIB:.1f}" if o["memory"]["host"] else "",
            "fits": "yes" if o["fits"] else "no", "GB sent": f"{o['communication']['total'] / 1e9:.3g}",
            "s compute": f"{o['seconds']['compute']:.3g}", "s sending": f"{o['seconds']['communication']:.3g}",
            "s a step": f"{o['seconds']['step']:.3g}",
        }
        for o in options
    ]  # fmt: skip


def _kind(option: Mapping[str, Any]) -> str:
    extra = [" + activation checkpointing"] * option["activation_checkpointing"] + [" + cpu_offload"] * option[
        "cpu_offload"
    ]
    return option["strategy"] + "".join(extra)


def _named(option: Mapping[str, Any]) -> str:
    times = "" if option["passes"] == 1 else f" x {option['passes']}"
    return f"{_kind(option)}, micro-batch {option['micro_batch']}{times}"


def _verdict(option: Mapping[str, Any], room: str) -> str:
    return f"fits into {room}" if option["fits"] else f"does not fit into {room}"


def _too_large(document: Mapping[str, Any], room: str) -> str:
    least = min(document["candidates"], key=lambda o: o["memory"]["total"])
    return (
        f"nothing fits: {_named(least)} still takes {least['memory']['total'] / GIB:.1f} of {room}; "
        "more GPUs, shorter rows, a smaller evaluate.batch_rows or adapters (model.lora) take less"
    )


def settings_of(option: Mapping[str, Any], workers: int) -> str:
    """The options that make a config what was chosen."""
    values = {
        "workers": workers, "strategy": option["strategy"], "micro_batch": option["micro_batch"],
        "activation_checkpointing": str(option["activation_checkpointing"]).lower(),
        "cpu_offload": str(option["cpu_offload"]).lower(),
    }  # fmt: skip
    return " ".join(f"--set train.{key}={value}" for key, value in values.items() if value != "false")


def amount(size: float) -> str:
    """Bytes in a column; what is small beside a GPU still shows."""
    return f"{size / GIB:9.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:9.2f} MiB"


def duration(seconds: float) -> str:
    """4500 as 1.2 h."""
    unit, size = next(((u, s) for u, s in (("h", 3600), ("min", 60)) if seconds >= s), ("s", 1))
    return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"


def count(number: float) -> str:
    """1235814400 as 1.24B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
