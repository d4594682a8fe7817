"""Small models, questions and helpers for the tests of lm-eval's tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gru_core import models
from gru_core.batch import TokenRow, collate
from gru_core.benchmarks.base import Benchmark
from gru_core.config import EvaluateConfig, LmEvalConfig, ModelConfig, PrepareConfig
from gru_core.metrics.subject import Subject
from gru_core.parallel import Group

SHAPE = PrepareConfig(tokenizer="bpe", vocab_size=400, hidden=32, layers=2, heads=4, intermediate=48)
THINGS = ["amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "loch"]
INTRO = "The following are multiple choice questions (with answers) about biology.\n\n"
NOTHING = Benchmark("nothing", (), (), {})


def questions(n: int) -> list[dict[str, Any]]:
    """Made-up questions of four choices; answers spread over the positions."""
    return [
        {
            "question": f"Which of these stands at place {i} of the {THINGS[i % 12]}?" + " Say which." * (i % 4),
            "choices": [THINGS[(i * 5 + c * 3 + 1) % 12] + (" and stone" * (c % 2)) for c in range(4)],
            "answer": (i * 7 + i // 3) % 4,
        }
        for i in range(n)
    ]


def prompt(row: dict[str, Any]) -> str:
    """lm-eval's prompt of WMDP, by hand."""
    lines = [row["question"], *(f"{label}. {text}" for label, text in zip("ABCD", row["choices"], strict=True))]
    return INTRO + "\n".join(lines) + "\nAnswer:"


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text(json.dumps(rows))
    return str(file)


def tokenizer() -> Any:
    texts = [prompt(row) for row in questions(60)]
    return models.build_tokenizer([*texts, " A B C D", "Say which is which, and where."], SHAPE)


def llama(tok: Any, positions: int = 256) -> nn.Module:
    return models.build_small(tok, SHAPE, 0, positions=positions).eval()


def gpt2(tok: Any, positions: int) -> nn.Module:
    """Learned positions: one beyond the last is an error, not a number."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(5)
        shape = GPT2Config(
            vocab_size=len(tok), n_positions=positions, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4,
            bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
        )  # fmt: skip
        return GPT2LMHeadModel(shape).eval()


def subject(model: nn.Module, tok: Any, group: Group | None = None, **settings: Any) -> Subject:
    config = EvaluateConfig(batch_rows=4, **settings)
    return Subject(model, tok, NOTHING, config, ModelConfig(), group or Group(), dict.fromkeys)


def asking(name: str, **settings: Any) -> EvaluateConfig:
    """``lm_eval:name`` and nothing else, on both ends of the trade-off; ``settings`` are those of lm-eval."""
    metric = f"lm_eval:{name}"
    own = LmEvalConfig(**settings)
    return EvaluateConfig(metrics=(metric,), unlearning=metric, retention=metric, batch_rows=4, lm_eval=own)


def teach(model: nn.Module, tok: Any, rows: list[dict[str, Any]], steps: int = 60) -> None:
    """Trains ``model`` until it answers ``rows`` by their labels."""
    encoded = [tuple(tok.encode(f"{prompt(row)} {'ABCD'[row['answer']]}")) for row in rows]
    batch = collate([TokenRow("", ids, len(ids) - 1) for ids in encoded], range(len(rows)), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, labels=batch.labels_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
