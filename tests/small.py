"""A tiny model and rows of text for tests of the core."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gru_core.batch import Row, TokenRow, encode
from gru_core.config import PrepareConfig, RectifyConfig, RetainConfig, RunConfig, TrainConfig, UnlearnConfig
from gru_core.loop import Hooks, Run
from gru_core.losses import Rows
from gru_core.models import build_small, build_tokenizer
from gru_core.objectives import build_objective
from gru_core.parallel import Group, wrap

SHAPE = PrepareConfig(hidden=16, layers=2, heads=2, intermediate=32)


def texts(n: int = 40) -> list[tuple[str, str]]:
    return [(f"who wrote book {i}", f"author {i % 7} of town {i % 5} wrote it " + "again " * (i % 4)) for i in range(n)]


def tokenizer() -> Any:
    return build_tokenizer([f"Question: {q}\nAnswer: {a}" for q, a in texts()], SHAPE)


def token_rows() -> list[TokenRow]:
    tok = tokenizer()
    return [encode(tok, Row(f"r{i}", q, a), 128) for i, (q, a) in enumerate(texts())]


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    return build_small(tokenizer(), SHAPE, seed).to(dtype)


def config(
    steps: int = 20,
    *,
    rectify: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    **unlearn: Any,
) -> RunConfig:
    settings = {"objective": "npo", "lr": 1e-3, "batch_size": 8, "evaluate_every": 5, **unlearn}
    return RunConfig(
        unlearn=UnlearnConfig(steps=steps, **settings),
        rectify=RectifyConfig(**(rectify or {})),
        retain=RetainConfig(),
        train=TrainConfig(**{"checkpoint_every": 5, **(train or {})}),
    )


def build(
    cfg: RunConfig,
    net: nn.Module,
    group: Group | None = None,
    hooks: Hooks | None = None,
    folder: Any = None,
    forget: int = 12,
) -> Run:
    """A run over the first rows as forget set and the last 28 as retain set."""
    rows = token_rows()
    group = group or Group()
    return Run(
        wrap(net, group),
        cfg,
        build_objective(cfg.unlearn),
        Rows(rows[:forget]),
        Rows(rows[12:]),
        group,
        hooks or Hooks(),
        folder,
    )


def weights(net: nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])
