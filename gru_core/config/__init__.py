"""One run's configuration: frozen dataclasses that refuse a bad value at construction.

``pipelines.settings`` reads YAML into these. Every section can be built on its own, so that ``gru_core`` is
usable as a library. An error is a :class:`~gru_core.errors.ConfigError`: field, value, what is allowed. Every key is
documented where it is defined: ``model.py``, ``training.py``, ``evaluation.py``, ``study.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gru_core.config.checks import STRICT, check
from gru_core.config.evaluation import BestConfig, EvaluateConfig, LmEvalConfig, QuantiseConfig, RelearnConfig
from gru_core.config.model import BenchmarkConfig, LoraConfig, ModelConfig
from gru_core.config.study import (
    FamilyConfig,
    OutputConfig,
    PrepareConfig,
    RequestsConfig,
    SearchConfig,
    TrackConfig,
)
from gru_core.config.training import RectifyConfig, RetainConfig, TrainConfig, UnlearnConfig


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run, a search, a preparation or an evaluation."""

    __pydantic_config__ = STRICT
    model: ModelConfig = field(default_factory=ModelConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    rectify: RectifyConfig = field(default_factory=RectifyConfig)
    retain: RetainConfig = field(default_factory=RetainConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    retain_model: str | None = None
    """Folder or hub id of a model trained without the forget set, ``prepared``, or null."""
    search: SearchConfig = field(default_factory=SearchConfig)
    requests: RequestsConfig = field(default_factory=RequestsConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        workers, batch = self.train.workers, self.unlearn.batch_size
        if workers > 1:
            check(batch >= workers, "unlearn.batch_size", batch, f"at least train.workers ({workers})")
        tokenizer, prepared = self.model.tokenizer, "prepared" in (self.model.path, self.retain_model)
        ok = tokenizer is None or (bool(tokenizer) and not prepared)
        check(ok, "model.tokenizer", tokenizer, "null, or a folder or hub id; null with prepared models")
        merged = self.output.merged
        check(not merged or self.model.lora is not None, "output.merged", merged, "false without model.lora")


__all__ = [
    "BenchmarkConfig", "BestConfig", "EvaluateConfig", "FamilyConfig", "LmEvalConfig", "LoraConfig", "ModelConfig",
    "OutputConfig", "PrepareConfig", "QuantiseConfig", "RectifyConfig", "RelearnConfig", "RequestsConfig",
    "RetainConfig", "RunConfig", "SearchConfig", "TrackConfig", "TrainConfig", "UnlearnConfig",
]  # fmt: skip
