"""One optimizer step: retain gradient, forget gradient, Gram matrix, rule, combine, clip, AdamW.

The same code runs in one process, under DDP and under FSDP2. Under DDP gradients are equal on all ranks and so is
their Gram matrix; under FSDP2 each rank has its shards, and the inner products travel with the two losses: one message
of a few float64 numbers a step. Losses: :mod:`gru_core.losses`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gru_core.batch import Stream
from gru_core.config import RunConfig, UnlearnConfig
from gru_core.errors import NonFiniteError
from gru_core.losses import Frozen, Losses, Rows
from gru_core.objectives import Objective
from gru_core.parallel import Group, is_sharded, local, unwrap
from gru_core.rectify import Gram, Rule, build_rule, combine, gram, squared_norm
from gru_core.retain import build_retain_loss

_CANCELLED = 1e-3
"""Below this share of ``||g_u||^2`` the norm of the update from the Gram matrix has lost digits."""


@dataclass
class Drift:
    """Smoothed retain loss against its start, nats: the small state that a repair margin reads."""

    start: float | None = None
    smoothed: float = 0.0

    def update(self, retain_loss: float, ema: float) -> None:
        if self.start is None:
            self.start = self.smoothed = retain_loss
        else:
            self.smoothed = ema * retain_loss + (1 - ema) * self.smoothed

    @property
    def value(self) -> float:
        return 0.0 if self.start is None else max(0.0, self.smoothed - self.start)


def learning_rate(config: UnlearnConfig, step: int) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up, then constant, or down a line or cosine that would
    reach 0 one step behind the last."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: nn.Module, config: UnlearnConfig) -> torch.optim.AdamW:
    """AdamW in one fused pass; vectors (norms, biases) do not decay, as in the Hugging Face trainer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, fused=True)


class Step:
    """The state of one run between steps: model, optimizer, EMA buffer, drift.

    Args:
        model: plain, DDP-wrapped or sharded; already on the group's device.
        forget: rows to forget, with reference losses where the objective needs them.
        retain: the retain subset; unused by rules without a retain gradient, but for the collapse probe.
        frozen: the starting model, where the retain loss compares with it.

    Attributes:
        momentum: the retain gradient's moving average ``m``, one tensor (or shard) per parameter; None before the
            first retain pass.
        stop: whether any rank was told to stop, as of the last step; the same on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        objective: Objective,
        forget: Rows,
        retain: Rows,
        group: Group,
        frozen: Frozen | None = None,
    ) -> None:
        self.model, self.config, self.objective, self.group = model, config, objective, group
        self.sharded = is_sharded(model)
        self.forget, self.retain = forget, retain
        self.retain_loss = build_retain_loss(config.retain.loss)
        self.rule: Rule = build_rule(config.rectify)
        self.reads_retain = "ema" in self.rule.uses
        self.losses = Losses(model, config.model, group, config.train.micro_batch, frozen)
        self.parameters = [p for p in unwrap(model).parameters() if p.requires_grad]
        self.optimizer = build_optimizer(unwrap(model), config.unlearn)
        seed, size = config.train.seed, config.unlearn.batch_size
        self.forget_stream = Stream(len(forget.rows), size, seed, "forget")
        self.retain_stream = Stream(len(retain.rows), size, seed, "retain") if retain.rows else None
        self.momentum: list[torch.Tensor] | None = None
        self.drift = Drift()
        self.stop = False

    def __call__(self, step: int, stop: bool = False) -> dict[str, float]:
        """Take step number ``step`` (from 0). ``stop``: this rank was told to stop (see :attr:`stop`).

        Returns:
            The step's metrics, named as they are tracked (without ``train/``).

        Raises:
            NonFiniteError: a loss or the Gram matrix is not finite; no weight was changed.
        """
        ema = self.config.rectify.ema
        if self.config.unlearn.dropout:  # the same masks after a resume, other ones on each rank
            torch.manual_seed(hash((self.config.train.seed, self.group.rank, step)) % 2**63)
        retain_part = self._retain_pass(step, ema) if self.reads_retain else 0.0
        forget_part = self._forget_pass(step)
        update = [local(g) for g in self._gradients()]
        momentum = [local(m) for m in self.momentum or []]
        raw = gram(update, momentum) if self.reads_retain else Gram(squared_norm(update), 0.0, 0.0)
        retain_loss, forget_loss, raw = self._agree(retain_part, forget_part, raw, stop)
        self._require_finite(step, {"retain loss": retain_loss, "forget loss": forget_loss})
        out = {"forget_loss": forget_loss, "lr": learning_rate(self.config.unlearn, step)}
        if self.reads_retain:
            out |= self._rectify(step, update, momentum, raw, retain_loss)
        else:
            self._require_finite(step, {"forget gradient's squared norm": raw.uu})
            out |= {"update_norm": self._apply(update, [], raw, 1.0, 0.0)}
        for settings in self.optimizer.param_groups:
            settings["lr"] = out["lr"]
        self.optimizer.step()
        for p in self.parameters:
            p.grad = None
        if ema == 1:
            self.momentum = None
        return out

    def _agree(self, retain: float, forget: float, mine: Gram, stop: bool) -> tuple[float, float, Gram]:
        """Global losses and Gram matrix, the same on every rank, in one message."""
        retain, forget, stops, *sums = self.group.sum([retain, forget, float(stop), mine.uu, mine.ur, mine.rr])
        self.stop = stops > 0
        # Replicated gradients are equal, but unlike devices may round their products differently: all take the mean.
        uu, ur, rr = sums if self.sharded else (value / self.group.size for value in sums)
        return retain, forget, Gram(uu, ur, rr)

    def probe(self) -> float:
        """Mean retain loss of the first retain batch, without gradients: tells a collapse where the rule
        takes no retain pass."""
        positions = range(min(len(self.retain.rows), self.config.unlearn.batch_size))
        return self.losses.mean(self.retain, positions, self.retain_loss)

    def _retain_pass(self, step: int, ema: float) -> float:
        """Leave ``m_t = ema g_r + (1 - ema) m_(t-1)`` in ``momentum``; returns this rank's retain loss.

        The average costs no buffer of its own: backward accumulates into ``(1 - ema) m_(t-1)``.
        """
        assert self.retain_stream is not None
        if self.momentum is not None:
            torch._foreach_mul_([local(m) for m in self.momentum], 1 - ema)
            for p, m in zip(self.parameters, self.momentum, strict=True):
                p.grad = m
        positions = self.retain_stream.rows(step)
        loss = self.retain_loss
        part = self.losses.accumulate(
            self.retain, positions, loss.loss_sum, loss.unit, ema, divergence=loss.needs_frozen
        )
        self.momentum = self._gradients()
        for p in self.parameters:
            p.grad = None
        return part

    def _forget_pass(self, step: int) -> float:
        positions = self.forget_stream.rows(step)
        weight = self.config.unlearn.forget_weight
        objective = self.objective
        return self.losses.accumulate(self.forget, positions, objective.loss_sum, objective.unit, weight)

    def _gradients(self) -> list[torch.Tensor]:
        for p in self.parameters:
            if p.grad is None:  # a parameter that this loss does not reach
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.parameters if p.grad is not None]

    def _rectify(
        self, step: int, update: list[torch.Tensor], momentum: list[torch.Tensor], raw: Gram, retain_loss: float
    ) -> dict[str, float]:
        ema = self.config.rectify.ema
        self._require_finite(step, {"Gram matrix": raw.uu + abs(raw.ur) + raw.rr})
        self.drift.update(retain_loss, ema)
        # m starts at 0, so it is small at first; rules see m / (1 - (1-ema)^t). The projection does not care.
        debias = 1 / (1 - (1 - ema) ** (step + 1))
        seen = raw.scaled(debias)
        w_u, w_r = self.rule.weights(seen, self.drift.value)
        norm = self._apply(update, momentum, raw, w_u, w_r * debias)
        return {
            "retain_loss": retain_loss, "cosine": seen.cosine, "conflict": float(seen.ur < 0),
            "weight_forget": w_u, "weight_retain": w_r, "update_norm": norm,
        }  # fmt: skip

    def _apply(
        self, update: list[torch.Tensor], momentum: list[torch.Tensor], g: Gram, w_u: float, w_r: float
    ) -> float:
        """Combine and clip in one pass; returns the norm of what the optimizer gets."""
        norm, clip = g.norm(w_u, w_r), self.config.unlearn.clip
        measured = norm * norm < _CANCELLED * w_u * w_u * g.uu
        if measured:  # nearly all of g_u was removed: count what is left instead of subtracting
            combine(update, momentum, w_u, w_r)
            left = squared_norm(update)
            norm, w_u, w_r = math.sqrt(self.group.sum([left])[0] if self.sharded else left), 1.0, 0.0
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        combine(update, momentum, w_u * factor, w_r * factor)
        return norm * factor

    def _require_finite(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(step + 1, name, value)  # people count from 1

    def state(self) -> dict[str, Any]:
        """The small state that a checkpoint keeps beside tensors."""
        return {"drift_start": self.drift.start, "drift_smoothed": self.drift.smoothed}

    def restore(self, state: dict[str, Any], momentum: list[torch.Tensor] | None) -> None:
        self.drift = Drift(state["drift_start"], state["drift_smoothed"])
        self.momentum = momentum
