"""Peak memory of real steps against what `gru plan` predicts, for small models.

    python benchmarks/memory.py [--json] [--device cpu|cuda] [--case NAME ...]

Each case runs in processes of its own, one for each worker. On the CPU the peak is the resident memory (VmHWM, reset
behind a warm-up with a tiny model) above what stood before the model was built; on a GPU, the allocator's peak. Rows
have random tokens. Largest error: the largest distance between predicted and measured, in shares of the measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gru_core import adapters, cost, models, parallel, sharding, size
from gru_core.batch import TokenRow
from gru_core.blocks import checkpoint_activations
from gru_core.config import LoraConfig, ModelConfig, RectifyConfig, RetainConfig, RunConfig, TrainConfig, UnlearnConfig
from gru_core.logprobs import CACHED, ELEMENTS
from gru_core.losses import Rows
from gru_core.metrics.forced import teacher_forced
from gru_core.metrics.generate import greedy
from gru_core.metrics.passes import Look
from gru_core.metrics.scorer import Scorer
from gru_core.objectives import build_objective
from gru_core.parallel import Group
from gru_core.step import Step

SMALL = {
    "hidden_size": 384, "num_hidden_layers": 10, "num_attention_heads": 6, "num_key_value_heads": 6,
    "intermediate_size": 1280, "vocab_size": 8192, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
WIDE = SMALL | {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 4,
                "intermediate_size": 2048, "tie_word_embeddings": False}  # fmt: skip
TINY = SMALL | {"hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 64}


@dataclass(frozen=True)
class Case:
    """One run to measure: ``rows`` of ``tokens`` tokens in each stream, over all workers.

    ``evaluated``: rows in an evaluation batch behind the steps, 0: none; ``answers`` to each prompt, ``generated``
    tokens for each, 0: none.
    """

    shape: str = "small"
    rows: int = 8
    tokens: int = 128
    micro_batch: int | None = None
    rule: str = "gru"
    retain_loss: str = "nll"
    dtype: str = "float32"
    lora: bool = False
    checkpointing: bool = False
    strategy: str = "ddp"
    workers: int = 1
    evaluated: int = 0
    answers: int = 1
    generated: int = 0

    def config(self) -> RunConfig:
        lora = LoraConfig() if self.lora else None
        return RunConfig(
            model=ModelConfig(path="benchmark", dtype=self.dtype, lora=lora),  # type: ignore[arg-type]
            unlearn=UnlearnConfig(objective="ga", batch_size=self.rows, lr=1e-6),
            rectify=RectifyConfig(rule=self.rule),
            retain=RetainConfig(loss=self.retain_loss),
            train=TrainConfig(
                workers=self.workers, micro_batch=self.micro_batch, strategy=self.strategy,  # type: ignore[arg-type]
                activation_checkpointing=self.checkpointing,
            ),
        )  # fmt: skip

    def settings(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(**{"small": SMALL, "wide": WIDE, "tiny": TINY}[self.shape])


CASES = {
    "gru": Case(),
    "gru, 4 micro-batches": Case(micro_batch=2),
    "none": Case(rule="none"),
    "gru, long rows": Case(rows=4, tokens=512, micro_batch=2),
    "gru, untied, grouped heads": Case("wide", rows=4),
    "kl": Case(retain_loss="kl"),
    "checkpointing": Case(checkpointing=True),
    "bfloat16": Case(dtype="bfloat16"),
    "pure_bfloat16": Case(dtype="pure_bfloat16"),
    "lora": Case(lora=True),
    "lora, bfloat16": Case(lora=True, dtype="bfloat16"),
    "lora, kl, checkpointing": Case(lora=True, retain_loss="kl", checkpointing=True),
    "ddp, 2 workers": Case(workers=2),
    "fsdp, 2 workers": Case(workers=2, strategy="fsdp"),
    "evaluation": Case(micro_batch=2, evaluated=128),
    "evaluation, bfloat16": Case(micro_batch=2, evaluated=64, dtype="bfloat16"),
    "evaluation, four answers to a prompt": Case(micro_batch=2, evaluated=128, answers=4),
    "evaluation, generating": Case(micro_batch=2, evaluated=32, generated=64),
}


def predict(case: Case, device: str = "cpu") -> cost.Memory:
    """What the plan says of a case."""
    config, settings = case.config(), case.settings()
    plan = cost.Plan(config.train.strategy, case.checkpointing)
    cast = case.strategy == "fsdp" and case.dtype != "float32"
    rows = -(-case.rows // case.workers)
    work = cost.Work(
        case.workers, rows, min(rows, case.micro_batch or rows), case.tokens, case.tokens - case.tokens // 4,
        case.evaluated, case.generated, _slice(case, device), case.answers > 1,
    )  # fmt: skip
    kept = size.saved(settings, config.model, case.tokens, cast)
    return cost.memory(size.shape(settings, config.model), kept, config, work, plan)


def _slice(case: Case, device: str) -> int:
    """Logits held in float32 at a time; a bf16 product on a CPU without bf16 instructions holds all of them."""
    if device != "cpu":
        return ELEMENTS
    return CACHED if case.dtype == "float32" else case.evaluated * case.tokens * case.settings().vocab_size


def build(case: Case, group: Group) -> tuple[nn.Module, nn.Module]:
    """Random weights: the model alone, and as the strategy wraps it."""
    from transformers import LlamaForCausalLM

    config = case.config()
    torch.manual_seed(0)
    model = LlamaForCausalLM(case.settings()).to(group.device, models.weight_dtype(config.model))
    if config.model.lora is not None:
        adapters.add(model, config.model.lora)
        adapters.initialise(model, 0)
    if case.checkpointing:
        checkpoint_activations(model)
    models.set_dropout(model, False)
    if case.strategy == "fsdp":
        sharding.shard(model, config.model, config.train, group)
        return model, model
    return model, parallel.wrap(model, group)


def token_rows(case: Case, seed: int) -> list[TokenRow]:
    """Rows of which every second is a token shorter, so that there is a mask."""
    generator = torch.Generator().manual_seed(seed)
    words = case.settings().vocab_size
    lengths = [case.tokens - (i // case.workers) % 2 for i in range(case.rows)]
    ids = [torch.randint(1, words, (n,), generator=generator).tolist() for n in lengths]
    return [TokenRow(f"r{i}", tuple(row), case.tokens // 4) for i, row in enumerate(ids)]


def steps(case: Case, group: Group, count: int = 2) -> None:
    """The first step makes the optimizer's state, the second meets it."""
    config = case.config()
    model, wrapped = build(case, group)
    frozen = None
    if case.retain_loss == "kl":
        other = None if case.lora else build(replace(case, workers=1), group)[0].requires_grad_(False)
        frozen = lambda: adapters.switched_off(model) if other is None else nullcontext(other)  # noqa: E731
    forget, retain = Rows(token_rows(case, 1)), Rows(token_rows(case, 2))
    step = Step(wrapped, config, build_objective(config.unlearn), forget, retain, group, frozen)
    for number in range(count):
        step(number)
    if case.evaluated:
        evaluate(case, model, group)


def evaluate(case: Case, model: nn.Module, group: Group) -> None:
    """What is measured at an evaluation: answers under teacher forcing, then generations that nothing ends."""
    rows = token_rows(replace(case, rows=case.evaluated), 3)
    others = [
        TokenRow(f"{row.id} {n}", (*row.ids[: row.prompt_length], *other.ids[row.prompt_length :]), row.prompt_length)
        for n in range(1, case.answers)
        for row, other in zip(rows, token_rows(replace(case, rows=case.evaluated), 3 + n), strict=True)
    ]
    half = torch.autocast(group.device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")
    model.eval()
    with half, parallel.lockstep(model, group) as forward:
        scorer = Scorer(model, forward, group.device)
        teacher_forced(scorer, dict.fromkeys([*rows, *others], Look.HITS), 0, case.evaluated)
        if case.generated:
            prompts = [row.ids for row in rows]
            greedy(
                scorer, prompts, stop=(), pad_id=0, max_new_tokens=case.generated, batch_rows=case.evaluated
            )  # fmt: skip


def measure(case: Case, group: Group) -> int:
    """Peak bytes of this process above what it had before the model."""
    steps(replace(case, shape="tiny", tokens=16), group)  # lazily loaded libraries, thread pools, buffers
    gc.collect()
    if group.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps(case, group)
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    steps(case, group)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A size of this process in bytes, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


@contextmanager
def _joined(case: Case, device: str) -> Iterator[Group]:
    rank = int(os.environ.get("RANK", 0))
    target = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if case.workers == 1 and case.strategy == "ddp":
        yield Group(device=target)
        return
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=os.environ["MEET"], rank=rank, world_size=case.workers
    )
    try:
        yield Group(rank, case.workers, target)
    finally:
        dist.destroy_process_group()


def measured(case: Case, device: str) -> int:
    """The largest peak over the workers of a case, each a process of its own.

    Large blocks come from the kernel and go back to it at once, so that resident memory is what is allocated.
    """
    block = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--device", device, "--one", json.dumps(dataclasses.asdict(case))]
    with tempfile.TemporaryDirectory() as folder:
        meet = {"MEET": f"file://{folder}/meet"}
        ranks = [
            subprocess.Popen(command, env={**os.environ, **block, **meet, "RANK": str(r)}, stdout=subprocess.PIPE)
            for r in range(case.workers)
        ]
        outs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"a worker of {case} failed")
    return max(int(out.split()[-1]) for out in outs)


def compare(names: list[str], device: str) -> list[dict[str, Any]]:
    """Predicted and measured bytes of each case, and the error as a share of the measured."""
    found = []
    for name in names:
        case = CASES[name]
        memory, real = predict(case, device), measured(case, device)
        found.append({
            "case": name, "settings": dataclasses.asdict(case), "parts": dataclasses.asdict(memory),
            "predicted_bytes": memory.total, "measured_bytes": real, "error": memory.total / real - 1,
        })  # fmt: skip
        print(f"{name:<28}{memory.total / 2**20:9.1f} MiB predicted{real / 2**20:9.1f} measured  "
              f"{memory.total / real - 1:+.1%}", file=sys.stderr, flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        case = Case(**json.loads(args.one))
        torch.set_num_threads(1)
        with _joined(case, args.device) as group:
            print(measure(case, group))
        return
    cases = compare(args.case or list(CASES), args.device)
    document = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "largest_error": max(abs(c["error"]) for c in cases),
        "cases": cases,
    }
    print(json.dumps(document, indent=1) if args.json else f"largest error {document['largest_error']:.1%}")


if __name__ == "__main__":
    main()
