"""TOFU's evaluation against the usual way of doing it, on the same rows and the same model.

    python benchmarks/evaluate.py --model FOLDER --data FOLDER [--json] [--repeats 3] [--rows N] [--profile]

Rows: forget10_perturbed, retain_perturbed, real authors and world facts (1,017; ``--rows`` takes the first of each
set). Numbers on both sides: probability, ROUGE-L recall, truth ratio on all four sets; extraction strength and exact
memorisation on the forget set and the retain set.

The usual way, written for this comparison only: one pass for each metric, one answer at a time, in fixed batches of 32
rows in the benchmark's order, padded on the right, float32 logits of all positions; generation with
``model.generate`` in batches of 32, padded on the left. Each metric makes the passes it needs, whatever another one
made before; ``passes shared`` is the same with every answer's pass made once for all metrics that read it. Our side
gets as many tokens a batch as 32 of the longest rows have. Each side runs in a process of its own, turn about; time is
without loading the model, and with tokenising. Peak memory is the growth of resident memory at its peak.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from gru_core import models
from gru_core.batch import IGNORE, Row, encode
from gru_core.benchmarks import load_benchmark
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.config import BenchmarkConfig, EvaluateConfig, ModelConfig
from gru_core.metrics import evaluate, measure
from gru_core.metrics.rouge import rouge_l_recall
from gru_core.metrics.tokens import encode_rows

BATCH, NEW_TOKENS = 32, 200
SETS = ("forget", "retain", "authors", "facts")
METRICS = (
    "forget_probability", "retain_probability", "forget_rouge", "retain_rouge", "forget_truth_ratio",
    "retain_truth_ratio", "extraction_strength", "retain_extraction_strength", "exact_memorization",
    "retain_exact_memorization", "model_utility", "authors_probability", "authors_rouge", "authors_truth_ratio",
    "facts_probability", "facts_rouge", "facts_truth_ratio",
)  # fmt: skip


def batches(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


class Usual:
    """One metric after the other, one answer at a time.

    Args:
        shared: make the pass over an answer once for all metrics that read it.
    """

    def __init__(self, model: Any, tokenizer: Any, shared: bool) -> None:
        self.model, self.tokenizer, self.shared = model, tokenizer, shared
        self.length = models.max_length(model)
        self.made: dict[Any, list[float]] = {}

    def logits(self, rows: Sequence[tuple[EvalRow, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 logits of all positions that predict, and what they are to predict, off the answer ``IGNORE``."""
        encoded = [encode(self.tokenizer, Row(r.id, r.prompt, a, r.kind), self.length) for r, a in rows]
        T = max(len(e.ids) for e in encoded)
        ids = torch.zeros((len(rows), T), dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
        for b, e in enumerate(encoded):
            ids[b, : len(e.ids)] = torch.tensor(e.ids)
            mask[b, : len(e.ids)] = 1
            labels[b, e.prompt_length : len(e.ids)] = ids[b, e.prompt_length : len(e.ids)]
        with torch.no_grad():
            out = self.model(input_ids=ids, attention_mask=mask).logits.float()
        return out[:, :-1], labels[:, 1:]

    def nll(self, rows: Sequence[EvalRow], name: str, answer: Callable[[EvalRow], str]) -> list[float]:
        """Mean NLL of an answer of each row."""
        if self.shared and name in self.made:
            return self.made[name]
        found = self.made[name] = []
        for batch in batches(rows):
            logits, labels = self.logits([(row, answer(row)) for row in batch])
            each = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none"
            )
            found += (each.sum(1) / (labels != IGNORE).sum(1)).tolist()
        return found

    def wrong(self, rows: Sequence[EvalRow], name: str) -> list[tuple[float, ...]]:
        """Mean NLL of each wrong answer of each row."""
        count = len(rows[0].perturbed)
        columns = [self.nll(rows, f"{name} wrong {k}", lambda r, k=k: r.perturbed[k]) for k in range(count)]  # type: ignore[misc]
        return list(zip(*columns, strict=True))

    def hits(self, rows: Sequence[EvalRow]) -> list[list[bool]]:
        """Arg-max hits of the answer's tokens before the closing one."""
        found: list[list[bool]] = []
        for batch in batches(rows):
            logits, labels = self.logits([(row, row.answer) for row in batch])
            right = logits.argmax(-1) == labels
            found += [r[m].tolist()[:-1] for r, m in zip(right, labels != IGNORE, strict=True)]
        return found

    def rouge(self, rows: Sequence[EvalRow]) -> float:
        recalls: list[float] = []
        for batch in batches(rows):
            encoded = [encode(self.tokenizer, Row(r.id, r.prompt, r.answer, r.kind), self.length) for r in batch]
            prompts = [list(e.ids[: e.prompt_length]) for e in encoded]
            S = max(map(len, prompts))
            ids = torch.tensor([[0] * (S - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (S - len(p)) + [1] * len(p) for p in prompts])
            room = min(NEW_TOKENS, self.length - S)
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=room, pad_token_id=0
            )
            texts = self.tokenizer.batch_decode(out[:, S:], skip_special_tokens=True)
            recalls += [rouge_l_recall(r.answer, text) for r, text in zip(batch, texts, strict=True)]
        return statistics.fmean(recalls)

    def scores(self, benchmark: Benchmark) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in SETS:
            rows = benchmark.scored[name]
            own = name in ("forget", "retain")
            p = [math.exp(-a) for a in self.nll(rows, f"{name} answer", lambda r: r.answer)]
            if not own:
                wrongs = self.wrong(rows, name)
                p = [a / (a + sum(math.exp(-x) for x in w)) for a, w in zip(p, wrongs, strict=True)]
            found[f"{name}_probability"] = statistics.fmean(p)
            right = self.nll(rows, f"{name} {'paraphrase' if own else 'answer'}", lambda r: r.paraphrase or r.answer)
            wrongs = self.wrong(rows, name)
            ratios = [math.exp(r - statistics.fmean(w)) for r, w in zip(right, wrongs, strict=True)]
            useful = [min(t, 1 / t) for t in ratios] if name == "forget" else [max(0.0, 1 - t) for t in ratios]
            found[f"{name}_truth_ratio"] = statistics.fmean(useful)
            found[f"{name}_rouge"] = self.rouge(rows)
            if own:
                prefix = "" if name == "forget" else "retain_"
                hits = self.hits(rows)
                found[f"{prefix}extraction_strength"] = statistics.fmean(map(_strength, hits))
                hits = hits if self.shared else self.hits(rows)
                found[f"{prefix}exact_memorization"] = statistics.fmean(map(statistics.fmean, hits))
        parts = [found[f"{s}_{m}"] for s in SETS[1:] for m in ("probability", "rouge", "truth_ratio")]
        found["model_utility"] = statistics.harmonic_mean(parts)
        return found


def _strength(hits: Sequence[bool]) -> float:
    missed = [k + 1 for k, hit in enumerate(hits) if not hit]
    return 1 - max(missed, default=0) / len(hits)


def side(args: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
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
        return Usual(model, tokenizer, args.side == "shared").scores(on)

    work = ours if args.side == "ours" else usual
    work(warm)
    found = _watch(model) if args.side == "ours" else {}
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    start, used = time.perf_counter(), time.process_time()
    scores = work(benchmark)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    found |= {
        "seconds": seconds,
        "cpu_seconds": used,
        "peak_mib": (_resident("VmHWM") - before) / 1024,
        "scores": scores,
    }
    if args.side == "ours":
        found["least_tokens"] = _least(benchmark, tokenizer, models.max_length(model))
    return found


def _watch(model: Any) -> dict[str, Any]:
    """Seconds of the parts of our side, and the tokens that it feeds, padding included."""
    found: dict[str, Any] = {"parts": {}, "tokens": {"answers": 0, "generation": 0}}

    def timed(name: str) -> None:
        function = getattr(measure, name)

        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                found["parts"][name] = found["parts"].get(name, 0.0) + time.perf_counter() - start

        setattr(measure, name, call)

    for name in ("_tasks", "teacher_forced", "greedy"):
        timed(name)

    def count(_module: Any, _given: Any, named: dict[str, Any]) -> None:
        ids = named["input_ids"]
        found["tokens"]["answers" if ids.shape[1] > 1 else "generation"] += ids.numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    return found


def _least(benchmark: Benchmark, tokenizer: Any, length: int) -> int:
    """Tokens that any evaluation has to feed: what answers to a prompt share once, their last ones not at all."""
    least = 0
    for rows in benchmark.scored.values():
        for e in encode_rows(tokenizer, [(row, True) for row in rows], length, ModelConfig()):
            answers = [a.ids for a in (e.answer, e.paraphrase, *e.perturbed) if a is not None]
            least += len({ids[:k] for ids in answers for k in range(1, len(ids))})
    return least


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


def once(args: argparse.Namespace, which: str) -> dict[str, Any]:
    words = [sys.executable, __file__, "--side", which, "--model", args.model, "--data", args.data]
    words += ["--threads", str(args.threads)] + (["--rows", str(args.rows)] if args.rows else [])
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=dict(os.environ))
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace) -> dict[str, Any]:
    sides = ("usual", "shared", "ours")
    turns = [{which: once(args, which) for which in sides} for _ in range(args.repeats)]
    ratios = {w: [turn[w]["seconds"] / turn["ours"]["seconds"] for turn in turns] for w in sides[:2]}
    usual, ours = turns[0]["usual"]["scores"], turns[0]["ours"]["scores"]
    return {
        "date": date.today().isoformat(), "torch": torch.__version__, "processor": platform.processor(),
        "threads": args.threads, "rows": args.rows or 1017, "repeats": args.repeats,
        "speedup": statistics.median(ratios["usual"]), "speedups": ratios["usual"],
        "speedup_passes_shared": statistics.median(ratios["shared"]),
        "speedup_cpu": statistics.median(t["usual"]["cpu_seconds"] / t["ours"]["cpu_seconds"] for t in turns),
        "cpu_seconds": {w: statistics.median(t[w]["cpu_seconds"] for t in turns) for w in sides},
        "seconds": {w: statistics.median(t[w]["seconds"] for t in turns) for w in sides},
        "peak_mib": {w: max(t[w]["peak_mib"] for t in turns) for w in sides},
        "largest_difference": max(abs(usual[name] - ours[name]) for name in usual),
        "parts": turns[0]["ours"]["parts"], "tokens": turns[0]["ours"]["tokens"],
        "least_tokens": turns[0]["ours"]["least_tokens"], "scores": ours,
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
        print(json.dumps(side(args)))
    else:
        found = compare(args)
        if args.json:
            print(json.dumps(found, indent=1))
            return
        seconds = found["seconds"]
        print(f"usual {seconds['usual']:.1f} s, ours {seconds['ours']:.1f} s: {found['speedup']:.2f} x")
        print(f"usual with passes shared {seconds['shared']:.1f} s: {found['speedup_passes_shared']:.2f} x")
        print(f"peak memory: usual {found['peak_mib']['usual']:.0f} MiB, ours {found['peak_mib']['ours']:.0f} MiB")
        print(f"largest difference of a score: {found['largest_difference']:.2g}")


if __name__ == "__main__":
    main()
