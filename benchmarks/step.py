"""What rectification costs: our GRU step with EMA against a plain PyTorch loop, and against a naive projection.

    python benchmarks/step.py [--json] [--shape 24m|1b] [--rounds 9] [--rows 8] [--length 128]

- ``ratio_step``: time of our step over the plain loop's (median of rounds, measured in turns). The plain loop
  runs both losses' backward into the same ``.grad``: no second buffer, no Gram matrix, no clipping, the same
  fused AdamW.
- ``ratio_memory``: peak memory over the plain loop's, in units of one gradient copy, each in a process of its own.
- ``ratio_naive``: a projection that flattens both gradients to the CPU in float64, over the plain loop.

On a GPU the same script takes a 1B-shaped random Llama in bf16: ``--shape 1b``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gru_core.batch import TokenRow, collate
from gru_core.config import ModelConfig, RunConfig, UnlearnConfig
from gru_core.logprobs import answer_counts, answer_nll
from gru_core.losses import Rows
from gru_core.models import set_dropout
from gru_core.objectives import build_objective
from gru_core.parallel import Group
from gru_core.step import Step, build_optimizer

SHAPES: dict[str, dict[str, int]] = {
    "24m": {
        "hidden_size": 384, "num_hidden_layers": 10, "num_attention_heads": 6, "intermediate_size": 1280,
        "vocab_size": 8192,
    },
    "1b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256,
    },
}  # fmt: skip
KINDS = ("plain", "ours", "naive")


def build(shape: str, device: torch.device) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, pad_token_id=0))
    set_dropout(model, False)
    return model


def token_rows(count: int, length: int, vocabulary: int, seed: int) -> list[TokenRow]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (count, length), generator=generator)
    return [TokenRow(f"r{i}", tuple(row.tolist()), length // 4) for i, row in enumerate(ids)]


def settings(rows: int, device: torch.device) -> RunConfig:
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return RunConfig(
        model=ModelConfig(path="benchmark", dtype=dtype),  # type: ignore[arg-type]
        unlearn=UnlearnConfig(objective="ga", batch_size=rows, lr=1e-6),
    )


def step_of(kind: str, args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Callable[[int], object]]:
    """A model of its own and a function that takes one step of the given kind."""
    model = build(args.shape, device)
    vocabulary = SHAPES[args.shape]["vocab_size"]
    forget, retain = (Rows(token_rows(4 * args.rows, args.length, vocabulary, seed)) for seed in (1, 2))
    config = settings(args.rows, device)
    step = Step(model, config, build_objective(config.unlearn), forget, retain, Group(device=device))
    if kind == "ours":
        return model, step
    optimizer = build_optimizer(model, config.unlearn)
    backward = _backward(model, step, device)
    return model, (lambda i: plain(i, backward, optimizer)) if kind == "plain" else (
        lambda i: naive(i, backward, optimizer, model)
    )


def _backward(model: nn.Module, step: Step, device: torch.device) -> Callable[[int, str], None]:
    """Loss and backward of one stream; the loss itself is computed as our step computes it, so that the
    comparison is about the step."""

    def run(number: int, stream: str) -> None:
        data, order = (step.forget, step.forget_stream) if stream == "forget" else (step.retain, step.retain_stream)
        assert order is not None
        batch = collate([data.rows[i] for i in order.rows(number)], range(step.config.unlearn.batch_size), 0).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False).logits
        loss = answer_nll(logits, batch.labels_BT).sum() / answer_counts(batch.labels_BT).sum()
        del logits  # as in our step: what the backward pass does not need is gone before it
        (loss if stream == "retain" else -loss).backward()
        float(loss.detach())  # a loop logs its loss

    return run


def plain(number: int, backward: Callable[[int, str], None], optimizer: torch.optim.Optimizer) -> None:
    """Gradient difference as everybody writes it."""
    backward(number, "retain")
    backward(number, "forget")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def naive(
    number: int, backward: Callable[[int, str], None], optimizer: torch.optim.Optimizer, model: nn.Module
) -> None:
    """Flatten, copy to the host, project in float64 NumPy, copy back."""
    import numpy as np

    def flat() -> Any:
        out = np.concatenate(
            [p.grad.reshape(-1).cpu().double().numpy() for p in model.parameters() if p.grad is not None]
        )
        optimizer.zero_grad(set_to_none=True)
        return out

    backward(number, "retain")
    g_r = flat()
    backward(number, "forget")
    g_u = flat()
    x = torch.from_numpy(g_u + max(0.0, -(g_u @ g_r)) / (g_r @ g_r) * g_r)
    place = 0
    for p in model.parameters():
        p.grad = x[place : place + p.numel()].view_as(p).to(p)
        place += p.numel()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def clock(run: Callable[[int], object], number: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(number)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def times(args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each round, the kinds in turns so that noise hits all of them."""
    steps = {kind: step_of(kind, args, device)[1] for kind in KINDS}
    out: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(args.rounds + 2):
        for kind in KINDS:
            taken = clock(steps[kind], number, device)
            if number >= 2:  # the first two fill optimizer state and caches
                out[kind].append(taken)
    return out


def peak(kind: str, args: argparse.Namespace, device: torch.device) -> int:
    """Peak bytes of three steps in this process."""
    _, run = step_of(kind, args, device)
    for number in range(3):
        run(number)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peaks(args: argparse.Namespace) -> dict[str, int]:
    command = [sys.executable, __file__, "--shape", args.shape, "--rows", str(args.rows), "--length", str(args.length)]
    out = {}
    for kind in ("plain", "ours"):
        done = subprocess.run([*command, "--peak", kind], check=True, capture_output=True, text=True)
        out[kind] = int(done.stdout.strip().splitlines()[-1])
    return out


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    memory = peaks(args)
    taken = times(args, device)
    parameters = sum(p.numel() for p in build(args.shape, torch.device("meta")).parameters())
    median = {kind: statistics.median(values) for kind, values in taken.items()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "shape": args.shape,
        "parameters": parameters,
        "rows_per_stream": args.rows,
        "tokens_per_row": args.length,
        "rounds": args.rounds,
        "seconds": median,
        "peak_bytes": memory,
        "gradient_bytes": 4 * parameters,
        "ratio_step": statistics.median(a / b for a, b in zip(taken["ours"], taken["plain"], strict=True)),
        "ratio_memory": (memory["ours"] - memory["plain"]) / (4 * parameters),
        "ratio_naive": statistics.median(a / b for a, b in zip(taken["naive"], taken["plain"], strict=True)),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, default="24m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=8, help="rows of each stream per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.peak:
        print(peak(args.peak, args, device))
        return
    found = measure(args, device)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['parameters'] / 1e6:.1f}M parameters, {found['device']}, {found['threads']} thread(s)")
    for kind in KINDS:
        print(f"  {kind:<6} {found['seconds'][kind] * 1e3:9.1f} ms per step")
    for name in ("ratio_step", "ratio_memory", "ratio_naive"):
        print(f"  {name:<13} {found[name]:6.3f}")


if __name__ == "__main__":
    main()
