"""What a run reads before its first step: model, tokenizer, tokenised rows, scores of the two end points."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gru_core import adapters, models
from gru_core.batch import Row, TokenRow, encode_whole
from gru_core.benchmarks import load_benchmark
from gru_core.benchmarks.base import Benchmark
from gru_core.config import ModelConfig, RunConfig
from gru_core.metrics import Baseline, Evaluation, Progress, evaluate
from gru_core.parallel import Group
from gru_core.placing import Start, place_frozen
from pipelines import alive
from pipelines.stores import hide

Pieces = tuple[TokenRow, ...]
"""What one row of a benchmark trains as. Settings count rows (``retain.size``); a batch is drawn from pieces."""


@dataclass(frozen=True)
class Shared:
    """Inputs that all trials of a search have in common; picklable, weights as arrays without copies.

    Attributes:
        packed: the starting model, as :func:`gru_core.models.pack_weights` gives it; None where each worker reads
            its own part of it (strategy ``fsdp``).
        forget: tokenised forget set: the pieces of each row (a long text has several).
        retain: tokenised retain set likewise, scored rows included (the retain subset chooses among them).
        baseline: scores of starting model and retain model, or None before they are measured.
    """

    packed: tuple[str, dict[str, Any]] | None
    tokenizer: Any
    benchmark: Benchmark
    forget: tuple[Pieces, ...]
    retain: tuple[Pieces, ...]
    baseline: Baseline | None = None

    def start(self, config: ModelConfig) -> Start:
        """Where a fresh copy of the starting model comes from."""
        packed = self.packed
        return config.path if packed is None else lambda: models.unpack_weights(packed, config)

    def with_baseline(self, baseline: Baseline) -> Shared:
        return replace(self, baseline=baseline)


def absolute(config: RunConfig) -> RunConfig:
    """The config with local input paths made absolute: a Ray worker runs in another working folder."""

    def path(value: str | None) -> str | None:
        local = value and value != "prepared" and Path(value).expanduser().exists()
        return str(Path(str(value)).expanduser().absolute()) if local else value

    data, model, asked = config.benchmark, config.model, config.evaluate.lm_eval
    asked = replace(
        asked,
        include_path=path(asked.include_path),
        data={task: path(file) or file for task, file in asked.data.items()},
    )
    return replace(
        config,
        benchmark=replace(
            data,
            forget=path(data.forget),
            retain=path(data.retain),
            holdout=path(data.holdout),
            data_dir=path(data.data_dir),
        ),
        model=replace(model, path=path(model.path) or model.path, tokenizer=path(model.tokenizer)),
        retain_model=path(config.retain_model),
        evaluate=replace(config.evaluate, start=path(config.evaluate.start), lm_eval=asked),
        prepare=replace(config.prepare, base=path(config.prepare.base)),
    )


def without_secrets(config: RunConfig) -> RunConfig:
    """The config as it may be written: ``track.uri`` without user name and password."""
    uri = config.track.uri
    return config if uri is None else replace(config, track=replace(config.track, uri=hide(uri)))


def tokenise(tokenizer: Any, rows: tuple[Row, ...], limit: int, config: ModelConfig) -> tuple[Pieces, ...]:
    """The pieces of each row, with the model's template, at most ``limit`` tokens a piece."""
    return tuple(encode_whole(tokenizer, row, limit, config.system_prompt, config.chat_date) for row in rows)


def flat(rows: Iterable[Pieces]) -> list[TokenRow]:
    """The pieces of all rows, in order: what a stream of training rows draws from."""
    return [piece for pieces in rows for piece in pieces]


def load(config: RunConfig) -> Shared:
    """Read model, tokenizer and benchmark; ``model.path`` must not be ``prepared`` any more.

    Raises:
        InputError: anything that cannot be read, by name.
    """
    benchmark = load_benchmark(config.benchmark)
    tokenizer = models.tokenizer_of(config.model.path, config.model)
    whole = config.train.strategy != "fsdp"
    shape = models.load_settings(config.model.path)
    if config.model.lora is not None:
        adapters.check(shape, config.model.lora)  # before anything is written, or workers are started
    limit = models.max_length_of(shape)
    return Shared(
        packed=models.pack_weights(models.load_model(config.model.path, config.model)) if whole else None,
        tokenizer=tokenizer,
        benchmark=benchmark,
        forget=tokenise(tokenizer, benchmark.forget, limit, config.model),
        retain=tokenise(tokenizer, benchmark.retain, limit, config.model),
    )


def measure_baseline(config: RunConfig, shared: Shared, group: Group, progress: Progress) -> Baseline:
    """Scores of the starting model and, where there is one, of the retain model, on all ranks of ``group``.

    Args:
        progress: keeps what is measured until all is.
    """
    retain: Evaluation | None = None
    if config.retain_model is not None:
        other = place_frozen(config.retain_model, config.model, config.train, group, "retain_model")
        alive.follow(other)
        tokenizer = models.tokenizer_of(config.retain_model, config.model, "retain_model")
        # The reference of forget quality is the retain model itself: its truth ratios are measured here.
        asked = config.evaluate
        names = ("forget_truth_ratio" if n == "forget_quality" else n for n in (*asked.metrics, *asked.final))
        settings = replace(asked, metrics=tuple(dict.fromkeys(names)), final=())
        retain = evaluate(
            other, tokenizer, shared.benchmark, settings, config.model, group=group, progress=progress.within("retain")
        )
        del other
        _release()
    reference = retain.measurements if retain else None
    first = config.evaluate.start
    if first is None:
        tokenizer = shared.tokenizer
        start_model = place_frozen(shared.start(config.model), config.model, config.train, group)
    else:
        tokenizer = models.tokenizer_of(first, config.model, "evaluate.start")
        start_model = place_frozen(first, config.model, config.train, group, "evaluate.start")
    alive.follow(start_model)
    start = evaluate(
        start_model, tokenizer, shared.benchmark, config.evaluate, config.model, group=group,
        reference=reference, progress=progress.within("start"),
    )  # fmt: skip
    del start_model
    _release()
    progress.drop()
    return Baseline(start, retain)


def _release() -> None:
    """Gives a model's memory back before the next one is loaded: sharded ones stand in reference cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def store_baseline(baseline: Baseline, file: Path) -> None:
    """Numbers and ids only, for a resumed run and for whoever reads the folder."""
    document = {"start": baseline.start.to_json(), "retain": baseline.retain.to_json() if baseline.retain else None}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(document))
    part.rename(file)


def read_baseline(file: Path) -> Baseline | None:
    """What :func:`store_baseline` wrote, or None."""
    if not file.exists():
        return None
    document = json.loads(file.read_text())
    retain = document["retain"]
    return Baseline(Evaluation.from_json(document["start"]), Evaluation.from_json(retain) if retain else None)
