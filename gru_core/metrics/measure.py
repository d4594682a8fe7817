"""The measuring: teacher forcing over answers and greedy generations, spread over the ranks by row.

Shape legend: B rows of a batch, T tokens of its longest row, K kept positions (from the first that predicts an
answer token), K1 = K - 1 predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from gru_core import models
from gru_core.batch import TokenRow, collate
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.config import EvaluateConfig, ModelConfig
from gru_core.logprobs import answer_counts, answer_nll_and_hits, sequence_nll
from gru_core.metrics.base import LOST_NLL, AnswerScores, Hits, Kind, Measurements, Need, RowScores
from gru_core.metrics.generate import greedy
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
) -> Measurements:
    """Measure ``needs`` on this rank's share of the rows; every rank gets all of them back.

    Consumes no random numbers and leaves the model's train mode as it was. All ranks tokenise all rows, so that
    a bad row is an error on each of them and none is left waiting.

    Raises:
        InputError: a row has no answer token within the model's length, or the model cannot generate.
    """
    plain = unwrap(model)
    tasks = _tasks(plain, tokenizer, benchmark, needs, config, model_config)
    mine = group.share(tasks)
    device = group.device if is_sharded(model) else next(plain.parameters()).device  # shards may rest on the host
    bf16 = torch.autocast(device.type, dtype=torch.bfloat16, enabled=model_config.dtype == "bfloat16")
    with _evaluating(plain), bf16, lockstep(model, group) as forward:
        scorer = Scorer(plain, forward, device)
        forced = _teacher_forced(scorer, tokenizer, mine, config.batch_rows)
        rouge = _rouges(scorer, tokenizer, mine, config)
    scores = [_row(task, forced, rouge) for task in mine]
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every submodule's own mode back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


Forced = dict[TokenRow, tuple[AnswerScores, Hits]]


def _teacher_forced(scorer: Scorer, tokenizer: Any, tasks: Sequence[_Task], batch_rows: int) -> Forced:
    """Scores of every answer that ``tasks`` ask for; equal token rows are scored once."""
    wanted: dict[TokenRow, None] = {}
    for task in tasks:
        rows = [task.encoded.answer] if "answer" in task.kinds else []
        if "truth" in task.kinds:
            rows += [*([task.encoded.paraphrase] if task.encoded.paraphrase else []), *task.encoded.perturbed]
        wanted |= dict.fromkeys(rows)
    ordered = sorted(wanted, key=lambda r: (-len(r.ids), r.prompt_length))  # longest first: memory fails early
    pad_id = _pad_id(tokenizer)
    out: Forced = {}
    for start in range(0, len(ordered), batch_rows):
        batch = ordered[start : start + batch_rows]
        out |= zip(batch, _score_batch(scorer, batch, pad_id), strict=True)
    return out


def _score_batch(scorer: Scorer, rows: Sequence[TokenRow], pad_id: int) -> list[tuple[AnswerScores, Hits]]:
    """One forward pass, without the logits of positions before the first answer where the model can leave them out."""
    device = scorer.device
    batch = collate(rows, range(len(rows)), pad_id).to(device)
    first = min(r.prompt_length for r in rows) - 1
    K = batch.ids_BT.shape[1] - first
    options = {"logits_to_keep": K} if scorer.takes("logits_to_keep") else {}
    logits = scorer.forward(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False, **options).logits
    labels_BK = batch.labels_BT[:, first:]
    nll_BK1, hits_BK1 = answer_nll_and_hits(logits[:, -K:], labels_BK)
    nll_BK1 = nll_BK1.double().nan_to_num(nan=LOST_NLL, posinf=LOST_NLL).clamp(max=LOST_NLL)
    begin_B = torch.tensor([r.prompt_length - 1 - first for r in rows], device=device)
    end_B = torch.tensor([len(r.ids) - 1 - first - r.has_eos for r in rows], device=device)
    column_K1 = torch.arange(K - 1, device=device)
    plain_BK1 = (column_K1 >= begin_B[:, None]) & (column_K1 < end_B[:, None])  # the closing token left out
    missed_BK1 = plain_BK1 & ~hits_BK1
    matched_B = (plain_BK1 & hits_BK1).sum(1)
    prefix_B = ((missed_BK1 * (column_K1 + 1)).amax(1) - begin_B).clamp(min=0)
    nll_B, tokens_B = sequence_nll(nll_BK1), answer_counts(labels_BK)
    columns = (t.tolist() for t in (nll_B, tokens_B, matched_B, prefix_B, end_B - begin_B))
    return [(AnswerScores(nll, n), Hits(m, k, length)) for nll, n, m, k, length in zip(*columns, strict=True)]


def _rouges(scorer: Scorer, tokenizer: Any, tasks: Sequence[_Task], config: EvaluateConfig) -> dict[_Task, float]:
    """ROUGE-L recall of every task that asks for it; the generated texts end here."""
    asked = [t for t in tasks if "rouge" in t.kinds]
    if not asked:
        return {}
    made = greedy(
        scorer,
        [t.encoded.answer.ids[: t.encoded.answer.prompt_length] for t in asked],
        stop=stop_tokens(scorer.model, tokenizer),
        pad_id=_pad_id(tokenizer),
        max_new_tokens=config.max_new_tokens,
        batch_rows=config.batch_rows,
    )
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    return {t: rouge_l_recall(t.row.answer, text) for t, text in zip(asked, texts, strict=True)}


def stop_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Every end-of-sequence token of the tokenizer and of the model's generation settings."""
    settings = getattr(model, "generation_config", None)
    of_model = getattr(settings, "eos_token_id", None)
    listed = of_model if isinstance(of_model, list | tuple) else [of_model]
    return {int(i) for i in (*listed, tokenizer.eos_token_id) if i is not None}


def _pad_id(tokenizer: Any) -> int:
    """Any token serves: padding is masked."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _row(task: _Task, forced: Forced, rouge: dict[_Task, float]) -> RowScores:
    answer, hits = forced[task.encoded.answer] if "answer" in task.kinds else (None, None)
    paraphrase = task.encoded.paraphrase if "truth" in task.kinds else None
    perturbed = task.encoded.perturbed if "truth" in task.kinds else ()
    return RowScores(
        id=task.row.id,
        answer=answer,
        hits=hits,
        paraphrase=forced[paraphrase][0] if paraphrase else None,
        perturbed=tuple(forced[p][0] for p in perturbed),
        rouge=rouge.get(task),
    )
