"""What rectification costs on several workers: the gru step against the sum step, time and bytes communicated.

    python benchmarks/scaling.py [--json] [--workers 1 2 4] [--strategies ddp fsdp] [--shape 24m|1b] [--rounds 15]
                                 [--rows 8] [--length 128] [--device cpu|cuda] [--peak-flops 989e12]

``sum`` (gradient difference) takes the same two gradients with the same moving average and adds them with fixed
weights; ``gru`` also rectifies. ``joint`` is the least that a sum of two losses needs: both backward passes into one
gradient, reduced once; no rule that looks at the two gradients apart can have that. All run in the same processes, in
turns, on the same rows; a ratio is the median over rounds. A round's time is the slowest rank's. Bytes are the whole
tensors of the collectives that a rank joins in a step, whatever the algorithm makes of them on the wire, counted in a
step of its own.

Rectification is to cost at most 5 % over ``sum``; whatever ratio is larger stands in the result as ``above_limit``,
with its reason.

On a GPU (``--device cuda``, one worker each) it also gives tokens per second, model FLOPs utilisation and peak memory
for rule none, sum and gru; there the collectives are NCCL's.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import step as single
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from gru_core import sharding
from gru_core.config import RectifyConfig, TrainConfig
from gru_core.losses import Rows
from gru_core.objectives import build_objective
from gru_core.parallel import Group, no_sync, unwrap, wrap
from gru_core.step import Step

RULES = {
    "none": RectifyConfig(rule="none"),
    "joint": RectifyConfig(rule="sum", retain_weight=1.0),
    "sum": RectifyConfig(rule="sum", retain_weight=1.0),
    "gru": RectifyConfig(rule="gru"),
}


LIMIT = 1.05
"""Most that a gru step may take, in sum steps."""

REASONS = {
    "gru_over_sum": "not by design: both take the same gradients and the same message; noise, or something got slower",
    "gru_over_joint": "joint reduces one gradient, the sum of both losses'; any rule that looks at the two apart, sum "
    "included, reduces two. It is no part of the limit",
}


@dataclass(frozen=True)
class Setting:
    """What every rank of one measurement runs."""

    strategy: str
    workers: int
    shape: str
    rows: int
    length: int
    rounds: int
    device: str
    peak_flops: float


def build(rule: str, setting: Setting, group: Group) -> Step:
    """A step with a model of its own, the same on every rank."""
    model = single.build(setting.shape, group.device)
    config = replace(
        single.settings(setting.rows, group.device), rectify=RULES[rule],
        train=TrainConfig(workers=setting.workers, strategy=setting.strategy),  # type: ignore[arg-type]
    )  # fmt: skip
    if setting.strategy == "fsdp":
        sharding.shard(model, config.model, config.train, group)
    net = wrap(model, group) if setting.strategy == "ddp" else model
    vocabulary = single.SHAPES[setting.shape]["vocab_size"]
    rows = [Rows(single.token_rows(4 * setting.rows, setting.length, vocabulary, seed)) for seed in (1, 2)]
    return Step(net, config, build_objective(config.unlearn), *rows, group)


def joint(step: Step) -> Callable[[int], None]:
    """The loop of a plain sum of two losses, with one reduction of the gradient."""

    def run(number: int) -> None:
        retain, forget, order = step.retain_loss, step.objective, step.retain_stream
        assert order is not None
        with no_sync(step.model, active=True):
            step.losses.accumulate(step.retain, order.rows(number), retain.loss_sum, retain.unit, 1.0)
        step.losses.accumulate(step.forget, step.forget_stream.rows(number), forget.loss_sum, forget.unit, 1.0)
        torch.nn.utils.clip_grad_norm_(step.parameters, 1.0)
        step.optimizer.step()
        step.optimizer.zero_grad(set_to_none=True)

    return run


def slowest(step: Callable[[int], object], number: int, group: Group) -> float:
    """Seconds of one step, the slowest rank's."""
    group.barrier()
    return max(group.gather(single.clock(step, number, group.device)))


_WHOLE = ("all_reduce",)
_GATHERS = ("all_gather_single", "all_gather_into_tensor")  # the name depends on torch's version
_SCATTERS = ("reduce_scatter_single", "reduce_scatter_tensor")


@contextmanager
def counted(step: Step) -> Iterator[dict[str, int]]:
    """Bytes that this rank hands to collectives, by kind."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    found: dict[str, int] = {}
    originals = {name: getattr(dist, name) for name in (*_WHOLE, *_GATHERS, *_SCATTERS) if hasattr(dist, name)}

    def counting(name: str, original: Any) -> Any:
        names = list(inspect.signature(original).parameters)
        place = 0 if name in (*_WHOLE, *_GATHERS) else 1  # a gather's result, a scatter's input: the whole tensor

        def call(*args: Any, **options: Any) -> Any:
            tensor = args[place] if len(args) > place else options[names[place]]
            kind = "scalars" if tensor.dtype == torch.float64 else name.removesuffix("_single").split("_into")[0]
            found[kind] = found.get(kind, 0) + tensor.numel() * tensor.element_size()
            return original(*args, **options)

        return call

    for name, original in originals.items():
        setattr(dist, name, counting(name, original))
    if isinstance(step.model, DistributedDataParallel):

        def hook(group: Any, bucket: Any) -> Any:
            return allreduce_hook(group, bucket)  # DDP's own all-reduce, where it can be seen

        hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}  # it is read
        step.model.register_comm_hook(None, hook)
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def work(rank: int, store: str, out: str, setting: Setting) -> None:
    """One rank: times of sum and gru in turns, then the bytes of a step."""
    torch.set_num_threads(1)
    device = torch.device(setting.device, rank) if setting.device == "cuda" else torch.device("cpu")
    if setting.device == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if setting.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=setting.workers)
    group = Group(rank, setting.workers, device)
    steps = {rule: build(rule, setting, group) for rule in ("joint", "sum", "gru")}
    runs: dict[str, Callable[[int], object]] = {**steps, "joint": joint(steps["joint"])}
    taken: dict[str, list[float]] = {rule: [] for rule in steps}
    for number in range(setting.rounds + 2):
        for rule in list(runs)[:: 1 if number % 2 else -1]:
            seconds = slowest(runs[rule], number, group)
            if number >= 2:  # the first two fill optimizer state and caches
                taken[rule].append(seconds)
    sent = {}
    for rule, step in steps.items():
        with counted(step) as found:
            runs[rule](setting.rounds + 2)
        sent[rule] = found
    if rank == 0:
        ratios = {
            f"gru_over_{rule}": statistics.median(a / b for a, b in zip(taken["gru"], taken[rule], strict=True))
            for rule in ("sum", "joint")
        }
        medians = {rule: statistics.median(values) for rule, values in taken.items()}
        document = {
            "workers": setting.workers, "strategy": setting.strategy, "seconds": medians, **ratios, "bytes": sent,
        }  # fmt: skip
        if setting.device == "cuda":
            document["gpu"] = utilisation(setting, group)
        Path(out).write_text(json.dumps(document))
    group.barrier()
    dist.destroy_process_group()


def utilisation(setting: Setting, group: Group) -> dict[str, dict[str, float]]:
    """Tokens per second, share of the GPU's peak FLOPs, peak bytes: of each rule, one after the other."""
    found = {}
    for rule in ("none", "sum", "gru"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = build(rule, setting, group)
        taken = [single.clock(step, number, group.device) for number in range(setting.rounds + 2)][2:]
        seconds = statistics.median(taken)
        streams = 1 if rule == "none" else 2
        tokens = streams * setting.rows * setting.length
        parameters = sum(p.numel() for p in unwrap(step.model).parameters())
        found[rule] = {
            "seconds": seconds, "tokens_per_second": tokens / seconds,
            "model_flops_utilisation": 6 * parameters * tokens / seconds / setting.peak_flops,
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }  # fmt: skip
        del step
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All strategies and numbers of workers, one after the other."""
    points = []
    for strategy in args.strategies:
        for workers in args.workers:
            setting = Setting(
                strategy, workers, args.shape, args.rows, args.length, args.rounds, args.device, args.peak_flops
            )
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out.json"
                mp.spawn(work, args=(f"{folder}/store", str(out), setting), nprocs=workers)
                points.append(json.loads(out.read_text()))
    cuda = args.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "shape": args.shape, "rows_per_stream": args.rows, "tokens_per_row": args.length, "rounds": args.rounds,
        "limit": LIMIT, "above_limit": above(points), "points": points,
    }  # fmt: skip


def above(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios above :data:`LIMIT`, each with its reason."""
    return [
        {"strategy": p["strategy"], "workers": p["workers"], "ratio": name, "value": p[name], "reason": reason}
        for p in points
        for name, reason in REASONS.items()
        if p[name] > LIMIT
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", choices=("ddp", "fsdp"), default=["ddp", "fsdp"])
    parser.add_argument("--shape", choices=single.SHAPES, default="24m")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=8, help="rows of each stream per step, over all workers")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak-flops", type=float, default=989e12, help="of the GPU, dense bf16 (default: H100)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    found = measure(args)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['shape']}, {found['device']}, {found['cores']} core(s), {args.rows} rows a stream")
    for point in found["points"]:
        rules = "  ".join(f"{rule} {seconds * 1e3:7.1f} ms" for rule, seconds in point["seconds"].items())
        sent = {rule: sum(kinds.values()) for rule, kinds in point["bytes"].items()}
        print(
            f"  {point['strategy']:<4} {point['workers']} workers  {rules}  gru/sum {point['gru_over_sum']:.3f}  "
            f"gru/joint {point['gru_over_joint']:.3f}  MB a step: "
            + ", ".join(f"{rule} {size / 1e6:.3f}" for rule, size in sent.items())
        )
    for each in found["above_limit"]:
        print(f"  above {LIMIT}: {each['strategy']} {each['workers']} workers, {each['ratio']} {each['value']:.3f}: "
              f"{each['reason']}")  # fmt: skip


if __name__ == "__main__":
    main()
