"""The measuring: teacher forcing over answers, greedy generations and gradients, spread over the ranks by row."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from gru_core import models
from gru_core.batch import TokenRow
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.config import EvaluateConfig, ModelConfig
from gru_core.metrics.base import Kind, Measurements, Need, RowScores, Tail
from gru_core.metrics.forced import Forced, teacher_forced
from gru_core.metrics.generate import greedy
from gru_core.metrics.gradients import gradient_norms
from gru_core.metrics.rouge import rouge_l_recall
from gru_core.metrics.scorer import Scorer
from gru_core.metrics.tokens import EncodedRow, encode_row
from gru_core.parallel import Group, is_sharded, lockstep, unwrap


class _Task(NamedTuple):
    set: str
    row: EvalRow
    kinds: frozenset[Kind]
    encoded: EncodedRow


def scored_rows(benchmark: Benchmark, name: str, limit: int | None) -> tuple[EvalRow, ...]:
    """The rows of set ``name`` that are scored: the first ``limit``; empty where the benchmark lacks the set."""
    return tuple(benchmark.scored.get(name, ()))[:limit]


def measure(
    model: nn.Module,
    tokenizer: Any,
    benchmark: Benchmark,
    needs: Sequence[Need],
    config: EvaluateConfig,
    model_config: ModelConfig,
    group: Group,
    texts: bool = False,
) -> Measurements:
    """Measure ``needs`` on this rank's share of the rows; every rank gets all of them back.

    Consumes no random numbers and leaves the model's train mode as it was. All ranks tokenise all rows, so that
    a bad row is an error on each of them and none is left waiting. Generated texts are kept with ``texts`` only.

    Raises:
        InputError: a row has no answer token within the model's length, or the model cannot generate.
    """
    plain = unwrap(model)
    tasks = _tasks(plain, tokenizer, benchmark, needs, config, model_config)
    mine = group.share(tasks)
    with scoring(model, model_config, group) as scorer:
        forced = teacher_forced(scorer, *_asked(mine), pad_id(tokenizer), config.batch_rows)
        made = _generated(scorer, tokenizer, mine, config)
    gradients = _gradients(plain, mine, scorer.device, model_config)
    scores = [_row(task, forced, made.get(task), gradients.get(task), texts) for task in mine]
    sets: dict[str, list[RowScores]] = {}
    for task, row in zip(tasks, group.gather_shared(scores), strict=True):
        sets.setdefault(task.set, []).append(row)
    return Measurements({name: tuple(rows) for name, rows in sets.items()})


def _tasks(
    model: nn.Module,
    tokenizer: Any,
    benchmark: Benchmark,
    needs: Sequence[Need],
    config: EvaluateConfig,
    model_config: ModelConfig,
) -> list[_Task]:
    kinds: dict[str, set[Kind]] = {}
    for need in needs:
        kinds.setdefault(need.set, set()).add(need.kind)
    length = models.max_length(model)
    return [
        _Task(
            name,
            row,
            frozenset(kinds[name]),
            encode_row(tokenizer, row, length, model_config, "truth" in kinds[name]),
        )
        for name in sorted(kinds)
        for row in scored_rows(benchmark, name, config.rows)
    ]


@contextmanager
def scoring(model: nn.Module, model_config: ModelConfig, group: Group) -> Iterator[Scorer]:
    """A window in which ``model``, wrapped or sharded, answers forward passes on every rank of ``group``, in evaluation
    mode and in the type it computes in; see :func:`~gru_core.parallel.lockstep`."""
    plain = unwrap(model)
    device = group.device if is_sharded(model) else next(plain.parameters()).device  # shards may rest on the host
    bf16 = torch.autocast(device.type, dtype=torch.bfloat16, enabled=model_config.dtype == "bfloat16")
    with _evaluating(plain), bf16, lockstep(model, group) as forward:
        yield Scorer(plain, forward, device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every submodule's own mode back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _asked(tasks: Sequence[_Task]) -> tuple[dict[TokenRow, None], set[TokenRow]]:
    """The answers that ``tasks`` ask for, equal ones once; and those of them whose tails are asked for."""
    wanted: dict[TokenRow, None] = {}
    for task in tasks:
        rows = [task.encoded.answer] if task.kinds & {"answer", "tail"} else []
        if "truth" in task.kinds:
            rows += [*([task.encoded.paraphrase] if task.encoded.paraphrase else []), *task.encoded.perturbed]
        wanted |= dict.fromkeys(rows)
    return wanted, {task.encoded.answer for task in tasks if "tail" in task.kinds}


def _gradients(
    model: nn.Module, tasks: Sequence[_Task], device: torch.device, config: ModelConfig
) -> dict[_Task, float]:
    """Gradient norms of the tasks that ask for one."""
    asked = [task for task in tasks if "gradient" in task.kinds]
    if not asked:
        return {}
    with _evaluating(model), torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16"):
        return dict(zip(asked, gradient_norms(model, [t.encoded.answer for t in asked], device), strict=True))


def _generated(scorer: Scorer, tokenizer: Any, tasks: Sequence[_Task], config: EvaluateConfig) -> dict[_Task, str]:
    """The greedy generation of every task that asks for ROUGE."""
    asked = [t for t in tasks if "rouge" in t.kinds]
    if not asked:
        return {}
    made = greedy(
        scorer,
        [t.encoded.answer.ids[: t.encoded.answer.prompt_length] for t in asked],
        stop=stop_tokens(scorer.model, tokenizer),
        pad_id=pad_id(tokenizer),
        max_new_tokens=config.max_new_tokens,
        batch_rows=config.batch_rows,
    )
    return dict(zip(asked, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True))


def stop_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Every end-of-sequence token of the tokenizer and of the model's generation settings."""
    settings = getattr(model, "generation_config", None)
    of_model = getattr(settings, "eos_token_id", None)
    listed = of_model if isinstance(of_model, list | tuple) else [of_model]
    return {int(i) for i in (*listed, tokenizer.eos_token_id) if i is not None}


def pad_id(tokenizer: Any) -> int:
    """Any token serves: padding is masked."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _row(task: _Task, forced: Forced, made: str | None, gradient: float | None, texts: bool) -> RowScores:
    found = forced.get(task.encoded.answer)
    answer, hits = (found.scores, found.hits) if found and "answer" in task.kinds else (None, None)
    tail = found.tail if found and "tail" in task.kinds else None
    paraphrase = task.encoded.paraphrase if "truth" in task.kinds else None
    perturbed = task.encoded.perturbed if "truth" in task.kinds else ()
    return RowScores(
        id=task.row.id,
        answer=answer,
        hits=hits,
        paraphrase=forced[paraphrase].scores if paraphrase else None,
        perturbed=tuple(forced[p].scores for p in perturbed),
        rouge=rouge_l_recall(task.row.answer, made) if made is not None else None,
        tail=Tail(*tail, len(zlib.compress(task.row.answer.encode()))) if tail else None,
        gradient=gradient,
        generation=made if texts else None,
    )
