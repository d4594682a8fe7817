"""TOFU's evaluation against the usual way of doing it, on the same rows and the same model.

    python benchmarks/evaluate.py --model FOLDER --data FOLDER [--json] [--repeats 3] [--rows N] [--profile]

Rows: forget10_perturbed, retain_perturbed, real authors and world facts (1,017; ``--rows`` takes the first of each
set). Numbers on both sides: probability, ROUGE-L recall, truth ratio on all four sets; extraction strength and exact
memorisation on the forget set and the retain set.

The usual way (``benchmarks/usual_evaluation.py``) was written for this comparison only: one pass for each metric, one
answer at a time, in fixed batches of 32 rows in the benchmark's order, padded on the right, float32 logits of all
positions; generation with ``model.generate`` in batches of 32, padded on the left. Each metric makes the passes it
needs, whatever another one made before; ``passes shared`` is the same with every answer's pass made once for all
metrics that read it. Our side gets as many tokens a batch as 32 of the longest rows have. Each side runs in a process
of its own, in short turns (``benchmarks/turns.py``); time is the sum of its turns, without loading the model, and with
tokenising. Peak memory is the growth of resident memory at its peak. The floor is what the matrix products alone take,
of the tokens that any evaluation has to feed, at the rate of a large square product.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from turns import in_turns
from usual_evaluation import SETS, Usual

from gru_core import models
from gru_core.benchmarks import load_benchmark
from gru_core.benchmarks.base import Benchmark
from gru_core.config import BenchmarkConfig, EvaluateConfig, ModelConfig
from gru_core.metrics import evaluate, measure
from gru_core.metrics.tokens import encode_rows

BATCH, NEW_TOKENS = 32, 200
TURNS = {"usual": 7.5, "shared": 6.5, "ours": 1.5}
"""Seconds."""
METRICS = (
    "forget_probability", "retain_probability", "forget_rouge", "retain_rouge", "forget_truth_ratio",
    "retain_truth_ratio", "extraction_strength", "retain_extraction_strength", "exact_memorization",
    "retain_exact_memorization", "model_utility", "authors_probability", "authors_rouge", "authors_truth_ratio",
    "facts_probability", "facts_rouge", "facts_truth_ratio",
)  # fmt: skip


def side(args: argparse.Namespace, begin: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """One side, in this process; ``begin`` is called when everything is loaded."""
    torch.set_num_threads(args.threads)
    model, tokenizer = models.load_model(args.model, ModelConfig()).eval(), models.load_tokenizer(args.model)
    benchmark = load_benchmark(BenchmarkConfig(name="tofu", split="forget10", data_dir=args.data))
    scored = {name: benchmark.scored[name][: args.rows] for name in SETS}
    benchmark = Benchmark(benchmark.name, benchmark.forget, benchmark.retain, scored)
    warm = Benchmark("warm", (), (), {name: rows[:2] for name, rows in scored.items()})
    config = EvaluateConfig(metrics=METRICS, max_new_tokens=NEW_TOKENS, batch_rows=BATCH)

    def ours(on: Benchmark) -> dict[str, float]:
        return evaluate(model, tokenizer, on, config, ModelConfig()).scores

    def usual(on: Benchmark) -> dict[str, float]:
        return Usual(model, tokenizer, BATCH, NEW_TOKENS, args.side == "shared").scores(on)

    work = ours if args.side == "ours" else usual
    work(warm)
    found = _watch(model) if args.side == "ours" else {}
    begin()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    used = time.process_time()
    scores = work(benchmark)
    used = time.process_time() - used
    return found | {"cpu_seconds": used, "peak_mib": (_resident("VmHWM") - before) / 1024, "scores": scores}


def floor(args: argparse.Namespace) -> dict[str, float]:
    """Tokens and CPU seconds that no evaluation of these rows can do without."""
    torch.set_num_threads(args.threads)
    model, tokenizer = models.load_model(args.model, ModelConfig()), models.load_tokenizer(args.model)
    benchmark = load_benchmark(BenchmarkConfig(name="tofu", split="forget10", data_dir=args.data))
    scored = [row for name in SETS for row in benchmark.scored[name][: args.rows]]
    tokens = predictions = 0
    for e in encode_rows(tokenizer, [(row, True) for row in scored], models.max_length(model), ModelConfig()):
        answers = [a.ids for a in (e.answer, e.paraphrase, *e.perturbed) if a is not None]
        fed = {ids[:k] for ids in answers for k in range(1, len(ids))}  # the last token tells of nothing
        tokens += len(fed)
        predictions += sum(len(ids) >= e.answer.prompt_length for ids in fed)
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    products = 2 * (tokens * sum(m.weight.numel() for m in layers) + predictions * head.weight.numel())
    square, n = torch.randn(2048, 2048), 20
    square @ square
    start = time.process_time()
    for _ in range(n):
        square @ square
    rate = 2 * n * 2048**3 / (time.process_time() - start)
    return {"tokens": tokens, "cpu_seconds": products / rate}


def _watch(model: Any) -> dict[str, Any]:
    """CPU seconds of the parts of our side, and the tokens that they feed, padding included."""
    found: dict[str, Any] = {"parts": {}, "tokens": {}}
    at = ""

    def timed(name: str) -> None:
        function = getattr(measure, name)

        def call(*given: Any, **named: Any) -> Any:
            nonlocal at
            start, at = time.process_time(), name
            try:
                return function(*given, **named)
            finally:
                found["parts"][name] = found["parts"].get(name, 0.0) + time.process_time() - start

        setattr(measure, name, call)

    for name in ("_tasks", "teacher_forced", "greedy"):
        timed(name)

    def count(_module: Any, _given: Any, named: dict[str, Any]) -> None:
        found["tokens"][at] = found["tokens"].get(at, 0) + named["input_ids"].numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    return found


def _resident(key: str) -> int:
    """KiB, as the kernel counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def profile(args: argparse.Namespace) -> list[str]:
    """Where our side's time goes: the parts that are timed apart, the rest is Python around them."""
    import cProfile
    import io
    import pstats

    recorded = cProfile.Profile()
    recorded.runcall(side, args)
    text = io.StringIO()
    pstats.Stats(recorded, stream=text).sort_stats("cumulative").print_stats(45)
    return text.getvalue().splitlines()


def _wait() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def once(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All sides in turns; a turn in proportion to what a side takes."""
    words = [sys.executable, __file__, "--model", args.model, "--data", args.data, "--threads", str(args.threads)]
    words += ["--rows", str(args.rows)] if args.rows else []
    return in_turns({which: [*words, "--side", which] for which in TURNS}, TURNS)


def processor() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def compare(args: argparse.Namespace) -> dict[str, Any]:
    rounds = []
    for number in range(args.repeats):
        rounds.append(once(args))
        took = {which: round(found["seconds"], 1) for which, found in rounds[-1].items()}
        print(f"round {number + 1} of {args.repeats}: seconds {took}", file=sys.stderr)
    ratios = {w: [each[w]["seconds"] / each["ours"]["seconds"] for each in rounds] for w in TURNS}
    usual, ours = rounds[0]["usual"]["scores"], rounds[0]["ours"]
    least = floor(args)
    return {
        "date": date.today().isoformat(), "torch": torch.__version__, "processor": processor(),
        "threads": args.threads, "rows": args.rows or 1017, "repeats": args.repeats,
        "speedup": statistics.median(ratios["usual"]), "speedups": ratios["usual"],
        "speedup_passes_shared": statistics.median(ratios["shared"]),
        "speedup_cpu": statistics.median(r["usual"]["cpu_seconds"] / r["ours"]["cpu_seconds"] for r in rounds),
        "cpu_seconds": {w: statistics.median(r[w]["cpu_seconds"] for r in rounds) for w in TURNS},
        "seconds": {w: statistics.median(r[w]["seconds"] for r in rounds) for w in TURNS},
        "peak_mib": {w: max(r[w]["peak_mib"] for r in rounds) for w in TURNS},
        "largest_difference": max(abs(usual[name] - ours["scores"][name]) for name in usual),
        "cpu_seconds_of_parts": ours["parts"], "tokens": ours["tokens"], "floor": least, "scores": ours["scores"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a small model that knows TOFU")
    parser.add_argument("--data", required=True, help="folder of TOFU's JSON files")
    parser.add_argument("--rows", type=int, help="first rows of each set; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", action="store_true", help="our side alone, where its time goes")
    parser.add_argument("--side", choices=("ours", "usual", "shared"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.profile:
        args.side = "ours"
        print("\n".join(profile(args)))
    elif args.side:
        print(json.dumps(side(args, _wait)))
    else:
        found = compare(args)
        if args.json:
            print(json.dumps(found, indent=1))
            return
        seconds = found["seconds"]
        print(f"usual {seconds['usual']:.1f} s, ours {seconds['ours']:.1f} s: {found['speedup']:.2f} x")
        print(f"usual with passes shared {seconds['shared']:.1f} s: {found['speedup_passes_shared']:.2f} x")
        print(f"peak memory: usual {found['peak_mib']['usual']:.0f} MiB, ours {found['peak_mib']['ours']:.0f} MiB")
        floor_s, used = found["floor"]["cpu_seconds"], found["cpu_seconds"]["ours"]
        print(f"floor: {floor_s:.1f} CPU seconds of {used:.1f}")
        print(f"largest difference of a score: {found['largest_difference']:.2g}")


if __name__ == "__main__":
    main()
