"""The measuring: teacher forcing over answers, greedy generations and gradients, spread over the ranks by row.

Rows go in parts of like lengths, each measured whole and then kept, so that an evaluation that was interrupted goes on
behind the last part. The parts are the same whatever was done before, and so are the numbers.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from gru_core import models
from gru_core.batch import TokenRow
from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.config import EvaluateConfig, ModelConfig
from gru_core.metrics.base import Kind, Measurements, Need, RowScores, Tail
from gru_core.metrics.forced import Answer, Forced, teacher_forced
from gru_core.metrics.generate import greedy
from gru_core.metrics.generations import GENERATIONS, Made
from gru_core.metrics.gradients import gradient_norms
from gru_core.metrics.passes import Look
from gru_core.metrics.progress import Progress
from gru_core.metrics.scorer import Scorer
from gru_core.metrics.tokens import EncodedRow, encode_rows
from gru_core.parallel import Group, is_sharded, lockstep, unwrap

T = TypeVar("T")
PARTS = 8
"""A part has this many times ``evaluate.batch_rows`` rows."""


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
    progress: Progress | None = None,
) -> Measurements:
    """Measure ``needs`` on this rank's share of the rows; every rank gets all of them back.

    Consumes no random numbers and leaves the model's train mode as it was. All ranks tokenise all rows, so that
    a bad row is an error on each of them and none is left waiting. Generated texts are kept with ``texts`` only.

    Args:
        progress: where parts are kept as they are measured, and where those of an interrupted evaluation stand.

    Raises:
        InputError: a row has no answer token within the model's length, or the model cannot generate.
    """
    plain = unwrap(model)
    tasks = _tasks(plain, tokenizer, benchmark, needs, config, model_config)
    done = progress.read(_digest(tasks, config, model_config, texts)) if progress else {}
    found = {i: RowScores.from_json(done[key]) for i, t in enumerate(tasks) if (key := _key(t, i)) in done}
    # longest first: memory fails early, and rows of a part are of like lengths on every rank
    order = sorted(range(len(tasks)), key=lambda i: -_tokens(tasks[i]))
    mine: list[tuple[int, RowScores]] = []
    with scoring(model, model_config, group) as scorer:
        for part in batched(group.share(order), PARTS * config.batch_rows):
            left = [i for i in part if i not in found]
            scores = _measure_part(scorer, tokenizer, [tasks[i] for i in left], config, texts)
            mine += zip(left, scores, strict=True)
            if progress and left:
                progress.add({_key(tasks[i], i): row.to_json(texts) for i, row in zip(left, scores, strict=True)})
    for share in group.gather(mine):
        found |= dict(share)
    sets: dict[str, list[RowScores]] = {}
    for i, task in enumerate(tasks):
        sets.setdefault(task.set, []).append(found[i])
    return Measurements({name: tuple(rows) for name, rows in sets.items()})


def _key(task: _Task, place: int) -> str:
    """A task in the progress of its evaluation; ids alone may repeat."""
    return f"{task.set} {place}"


def _tokens(task: _Task) -> int:
    """Of its longest sequence."""
    encoded = task.encoded
    answers = (encoded.answer, encoded.paraphrase, *encoded.perturbed)
    return max(len(answer.ids) for answer in answers if answer is not None)


def _digest(tasks: Sequence[_Task], config: EvaluateConfig, model_config: ModelConfig, texts: bool) -> str:
    """Of everything that the numbers of these tasks depend on, besides the model's weights."""
    digest = hashlib.sha256(repr((config.max_new_tokens, config.convention, model_config.dtype, texts)).encode())
    for task in tasks:
        answers = [a.ids for a in (task.encoded.answer, task.encoded.paraphrase, *task.encoded.perturbed) if a]
        digest.update(repr((task.set, task.row.id, task.row.answer, sorted(task.kinds), answers)).encode())
    return digest.hexdigest()[:16]


def _measure_part(
    scorer: Scorer, tokenizer: Any, tasks: Sequence[_Task], config: EvaluateConfig, texts: bool
) -> list[RowScores]:
    if not tasks:
        return []
    forced = teacher_forced(scorer, _asked(tasks), pad_id(tokenizer), config.batch_rows)
    made = _generated(scorer, tokenizer, tasks, forced, config)
    gradients = _gradients(scorer.model, tasks, scorer.device)
    return [_row(task, forced, made.get(task), gradients.get(task), texts) for task in tasks]


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
    rows = [(name, row) for name in sorted(kinds) for row in scored_rows(benchmark, name, config.rows)]
    wanted = ((row, "truth" in kinds[name]) for name, row in rows)
    encoded = encode_rows(tokenizer, wanted, models.max_length(model), model_config)
    return [_Task(name, row, frozenset(kinds[name]), e) for (name, row), e in zip(rows, encoded, strict=True)]


def batched(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Runs of ``size`` items in order; the last may be shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


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


def _asked(tasks: Sequence[_Task]) -> dict[TokenRow, Look]:
    """The answers that ``tasks`` ask for, equal ones once, each as closely as any of them asks."""
    wanted: dict[TokenRow, Look] = {}

    def want(row: TokenRow, look: Look) -> None:
        wanted[row] = max(look, wanted.get(row, look))

    for task in tasks:
        if task.kinds & {"answer", "tail", *GENERATIONS}:
            want(task.encoded.answer, Look.TAIL if "tail" in task.kinds else Look.HITS)
        if "truth" in task.kinds:
            for row in (task.encoded.paraphrase, *task.encoded.perturbed):
                if row is not None:
                    want(row, Look.LIKELIHOOD)
    return wanted


def _gradients(model: nn.Module, tasks: Sequence[_Task], device: torch.device) -> dict[_Task, float]:
    """Gradient norms of the tasks that ask for one."""
    asked = [task for task in tasks if "gradient" in task.kinds]
    if not asked:
        return {}
    return dict(zip(asked, gradient_norms(model, [t.encoded.answer for t in asked], device), strict=True))


def _generated(
    scorer: Scorer, tokenizer: Any, tasks: Sequence[_Task], forced: Forced, config: EvaluateConfig
) -> dict[_Task, Made]:
    """The greedy generation of every task that asks for one, from where it leaves the true answer on, scored; of
    several kinds on one row, the scores of all."""
    out: dict[_Task, Made] = {}
    for kind, generation in GENERATIONS.items():
        asked = [t for t in tasks if kind in t.kinds]
        if not asked:
            continue
        made = greedy(
            scorer,
            [t.encoded.answer.ids[: t.encoded.answer.prompt_length] for t in asked],
            stop=stop_tokens(scorer.model, tokenizer),
            pad_id=pad_id(tokenizer),
            max_new_tokens=generation.new_tokens or config.max_new_tokens,
            batch_rows=config.batch_rows,
            begun=[_begun(t.encoded.answer, forced[t.encoded.answer]) for t in asked],
        )
        for task, text in zip(asked, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
            score = generation.score(tokenizer, task.row.answer, text, config.convention)
            out[task] = score.joined(out.get(task))
    return out


def _begun(row: TokenRow, found: Answer) -> list[int]:
    """The first tokens of the generation behind the prompt of ``row``, as its teacher-forced pass tells them."""
    first = list(row.ids[row.prompt_length : row.prompt_length + found.led])
    return first if found.next is None else [*first, found.next]


def stop_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Every end-of-sequence token of the tokenizer and of the model's generation settings."""
    settings = getattr(model, "generation_config", None)
    of_model = getattr(settings, "eos_token_id", None)
    listed = of_model if isinstance(of_model, list | tuple) else [of_model]
    return {int(i) for i in (*listed, tokenizer.eos_token_id) if i is not None}


def pad_id(tokenizer: Any) -> int:
    """Any token serves: padding is masked."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _row(task: _Task, forced: Forced, made: Made | None, gradient: float | None, texts: bool) -> RowScores:
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
        rouge=made.rouge if made else None,
        f1=made.f1 if made else None,
        tail=Tail(*tail, len(zlib.compress(task.row.answer.encode()))) if tail else None,
        gradient=gradient,
        generation=made.text if made and texts else None,
    )
