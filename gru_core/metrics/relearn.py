"""Relearning: how fast a few steps of fine-tuning bring back what was forgotten (arXiv 2406.13356, 2402.16835).

``relearn`` learns a share of the forget set again, ``relearn_retain`` retain data alone; the study's forget metric
(``evaluate.unlearning``), taken on the way, is the curve. A model that never saw the forget set starts as low and rises
slowly; one that only hides it comes back at once.

What the run trains is trained here: all weights, or the adapters. A frozen model (start and retain model of a run, the
model of ``gru evaluate``) learns the same way, with new adapters where ``model.lora`` asks for some, so that curves
compare. Besides the model that takes, on each worker, the gradients and AdamW's two moments of what is trained, on the
model's device, and one copy of it in host memory; under FSDP2 of its shards alone.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from gru_core import adapters, models
from gru_core.batch import Row, Stream, TokenRow, encode_whole
from gru_core.benchmarks import retain_subset
from gru_core.benchmarks.base import Benchmark
from gru_core.benchmarks.read import key
from gru_core.config import EvaluateConfig, RelearnConfig, RetainConfig, UnlearnConfig
from gru_core.errors import ConfigError, InputError
from gru_core.losses import Losses, Rows
from gru_core.metrics.base import LOST_NLL
from gru_core.metrics.lent import learning
from gru_core.metrics.measure import scored_rows
from gru_core.metrics.subject import ModelMetric, Subject, row_metrics
from gru_core.objectives.learn import Learn
from gru_core.parallel import Group, reshard, unwrap

_CURVE = re.compile(r"(relearn(?:_retain)?)/step_(\d+)")


def forget_rows(benchmark: Benchmark, config: RelearnConfig) -> list[Row]:
    """The forget rows that are learned again: a prefix of one permutation, which ``config.seed`` alone draws."""
    order = list(range(len(benchmark.forget)))
    random.Random(f"relearn subset {config.seed}").shuffle(order)
    return [benchmark.forget[i] for i in order[: round(config.share * len(order))]]


def retain_rows(benchmark: Benchmark, config: RelearnConfig) -> list[Row]:
    """The retain rows that are learned: no more than the steps take, and none that scores retention."""
    chosen = retain_subset(benchmark, RetainConfig(), config.seed)
    return [benchmark.retain[i] for i in chosen[: config.steps * config.batch_size]]


def curves(scores: Mapping[str, float]) -> dict[int, dict[str, float]]:
    """Relearning step -> ``NAME/forgetting`` -> forget metric after it, for every curve in ``scores``."""
    out: dict[int, dict[str, float]] = {}
    for name, value in scores.items():
        if found := _CURVE.fullmatch(name):
            out.setdefault(int(found[2]), {})[f"{found[1]}/forgetting"] = value
    return dict(sorted(out.items()))


def _check(config: EvaluateConfig, benchmark: Benchmark | None) -> None:
    row_metrics(config, "relearn")
    if benchmark is not None and not forget_rows(benchmark, config.relearn):
        count = len(benchmark.forget)
        raise ConfigError("evaluate.relearn.share", config.relearn.share, f"enough for one of {count} forget rows")


def _check_retain(config: EvaluateConfig, benchmark: Benchmark | None) -> None:
    row_metrics(config, "relearn_retain")
    if benchmark is not None and len(benchmark.retain_scored) == len(benchmark.retain):
        raise InputError(f"relearn_retain cannot be computed on {benchmark.name}: every retain row scores retention")


def _forget(subject: Subject) -> dict[str, float]:
    rows = forget_rows(subject.benchmark, subject.config.relearn)
    return _relearn(subject, "relearn", rows, _without(subject, rows))


def _retain(subject: Subject) -> dict[str, float]:
    return _relearn(subject, "relearn_retain", retain_rows(subject.benchmark, subject.config.relearn), None)


def _without(subject: Subject, rows: Sequence[Row]) -> Benchmark | None:
    """The benchmark without the scored forget rows that are learned; None where no other would be left, or where the
    forget metric reads rows of another form (MUSE's), of which nobody can say which were learned."""
    from gru_core.metrics import METRICS  # which imports this

    if any(need.set != "forget" for need in METRICS[subject.config.unlearning].needs):
        return None
    benchmark, learned = subject.benchmark, {key(row) for row in rows}
    left = tuple(r for r in scored_rows(benchmark, "forget", subject.config.rows) if key(r) not in learned)
    return replace(benchmark, scored={**benchmark.scored, "forget": left}) if left else None


def _relearn(subject: Subject, name: str, rows: Sequence[Row], unseen: Benchmark | None) -> dict[str, float]:
    """Learn ``rows``, measure on the way, and leave the model as it was.

    Returns:
        ``NAME`` (the study's forget metric after the last step), ``NAME/step_N`` (after step N), and after the last
        step ``NAME/loss`` (mean NLL of the rows that it learned, nats per token, 1e9 where learning diverged), the
        retention metric as ``NAME/retention``, and the forget metric over the rows of ``unseen`` as ``NAME/unseen``.
    """
    config, model = subject.config.relearn, unwrap(subject.model)
    forgetting, *retention = row_metrics(subject.config, name)
    reshard(model)  # its parameters are then what the optimizer steps
    data = Rows(_tokens(subject, rows))
    scores: dict[str, float] = {}
    with _trained(subject, model) as parameters, learning(model, parameters):
        learner = _Learner(subject, model, parameters, data)
        scores[f"{name}/step_0"] = subject.score([forgetting])[forgetting]
        for step in range(1, config.steps + 1):
            scores[f"{name}/loss"] = learner.step(step - 1)
            if step == config.steps or step % config.every == 0:
                scores[f"{name}/step_{step}"] = subject.score([forgetting])[forgetting]
        if retention:
            scores[f"{name}/retention"] = subject.score(retention)[retention[0]]
        if unseen is not None:
            scores[f"{name}/unseen"] = subject.score([forgetting], unseen)[forgetting]
    return {name: scores[f"{name}/step_{config.steps}"], **scores}


def _tokens(subject: Subject, rows: Sequence[Row]) -> list[TokenRow]:
    settings, limit = subject.model_config, models.max_length(unwrap(subject.model))
    pieces = (encode_whole(subject.tokenizer, row, limit, settings.system_prompt, settings.chat_date) for row in rows)
    return [piece for row in pieces for piece in row]


@contextmanager
def _trained(subject: Subject, model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """What the run trains; of a frozen model all weights, or new adapters where the config asks for them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    lora = subject.model_config.lora
    if parameters:
        yield parameters
    elif lora is None:
        yield list(model.parameters())
    else:
        with adapters.lent(model, lora, subject.config.relearn.seed, subject.group.device):
            yield [p for p in model.parameters() if p.requires_grad]


class _Learner:
    """Steps of AdamW without weight decay on the answers' NLL; the same on any number of workers.

    The forward goes past DDP, which then takes no notice of the backward: whatever FSDP2 has not reduced is reduced
    here. One path serves whole copies, DDP and shards.
    """

    def __init__(self, subject: Subject, model: nn.Module, parameters: list[nn.Parameter], data: Rows) -> None:
        config = subject.config.relearn
        self.group, self.parameters, self.data = subject.group, parameters, data
        self.losses = Losses(model, subject.model_config, subject.group, config.micro_batch)
        self.stream = Stream(len(data.rows), config.batch_size, config.seed, "relearn")
        self.objective = Learn(UnlearnConfig())
        self.optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)

    def step(self, number: int) -> float:
        """Take step ``number`` (from 0). Returns the mean loss before it, nats per token, finite."""
        rows, learn = self.stream.rows(number), self.objective
        part = self.losses.accumulate(self.data, rows, learn.loss_sum, learn.unit, 1.0)
        _average(self.parameters, self.group)
        self.optimizer.step()
        for p in self.parameters:
            p.grad = None
        (loss,) = self.group.sum([part])
        return loss if math.isfinite(loss) else LOST_NLL


def _average(parameters: Sequence[nn.Parameter], group: Group) -> None:
    """Mean gradient over the ranks, in place; a rank that had no rows adds nothing. Shards have it already."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if group.size > 1 and not isinstance(p, DTensor):
            dist.all_reduce(p.grad, group=group.process_group)
            p.grad /= group.size


forget = ModelMetric("forget", _forget, _check)
retain = ModelMetric("forget", _retain, _check_retain)
