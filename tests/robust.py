"""A benchmark of the small rows, and a model that knows some of them: for metrics that work on the model itself."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gru_core.batch import Row, TokenRow, collate, encode
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.config import EvaluateConfig, ModelConfig, PrepareConfig, RelearnConfig
from gru_core.logprobs import answer_nll
from gru_core.metrics import Evaluation, evaluate
from gru_core.models import build_small, build_tokenizer
from gru_core.parallel import Group
from tests.study import WORDS

FORGET = 12
SHAPE = PrepareConfig(hidden=32, layers=2, heads=2, intermediate=64)


@functools.cache
def rows() -> tuple[Row, ...]:
    """Answers that nothing but memory can give."""
    draw = random.Random(3)
    return tuple(
        Row(f"r{i}", f"what does {draw.choice(WORDS)} {i} say", " ".join(draw.choices(WORDS, k=3 + i % 3)))
        for i in range(40)
    )


@functools.cache
def tokenizer() -> Any:
    return build_tokenizer([f"Question: {r.prompt}\nAnswer: {r.answer}" for r in rows()], SHAPE)


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return build_small(tokenizer(), SHAPE, 0).to(dtype)


def benchmark() -> Benchmark:
    """12 rows to forget, 28 to keep, of which the last 8 score retention."""
    every = rows()
    scored = [EvalRow(r.id, r.prompt, r.answer) for r in every]
    return Benchmark(
        "small", tuple(every[:FORGET]), tuple(every[FORGET:]),
        {"forget": tuple(scored[:FORGET]), "retain": tuple(scored[-8:])}, retain_scored=frozenset(range(20, 28)),
    )  # fmt: skip


def tokens(chosen: Sequence[Row]) -> list[TokenRow]:
    return [encode(tokenizer(), row, 512) for row in chosen]


def config(*metrics: str, **settings: Any) -> EvaluateConfig:
    """Probabilities as the study's two metrics: they move with every step, and tell any two models apart."""
    ends = {"unlearning": "forget_probability", "retention": "retain_probability"}
    return EvaluateConfig(metrics=metrics or ("forget_probability",), **{**ends, **settings})


QUICK = RelearnConfig(share=0.5, steps=5, every=2, lr=1e-3, batch_size=4)
MODEL = ModelConfig()


def measured(
    net: nn.Module, settings: EvaluateConfig, model: ModelConfig = MODEL, group: Group | None = None
) -> Evaluation:
    return evaluate(net, tokenizer(), benchmark(), settings, model, group=group)


def state(net: nn.Module) -> dict[str, Any]:
    """All that a metric must leave alone: weights, gradients, flags, modes, modules, random state."""
    plain = net.module if hasattr(net, "module") else net
    return {
        "weights": {n: p.detach().clone() for n, p in plain.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in plain.named_parameters()},
        "trained": {n: p.requires_grad for n, p in plain.named_parameters()},
        "modes": {n: m.training for n, m in plain.named_modules()},
        "modules": {n: id(m) for n, m in plain.named_modules()},
        "attributes": sorted(vars(plain)),
        "random": torch.get_rng_state(),
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        a, b = (t.to_local() if hasattr(t, "to_local") else t for t in (a, b))
        return torch.equal(a, b)
    return a == b


def train(net: nn.Module, chosen: Sequence[Row], steps: int = 100, lr: float = 1e-2) -> nn.Module:
    """Plain fine-tuning on ``chosen``, all rows a step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, chosen).backward()
        optimizer.step()
    return net


def loss(net: nn.Module, chosen: Sequence[Row]) -> torch.Tensor:
    """Mean NLL of the rows' answers, nats per token."""
    batch = collate(tokens(chosen), range(len(chosen)), 0)
    logits = net(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False).logits
    return answer_nll(logits, batch.labels_BT).sum() / (batch.labels_BT >= 0).sum()


def row_nll(net: nn.Module, row: TokenRow) -> torch.Tensor:
    """Summed NLL of one row's answer, from its logits and nothing else."""
    logp = net(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    places = torch.arange(row.prompt_length, len(row.ids))
    return -logp[places - 1, torch.tensor(row.ids)[places]].sum()
