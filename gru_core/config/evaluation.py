"""What is measured of a model, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gru_core.config.checks import STRICT, check, finite


@dataclass(frozen=True)
class BestConfig:
    """Which evaluated model of a run is its best: the most of one score with enough of the other."""

    __pydantic_config__ = STRICT
    maximise: Literal["unlearning", "retention"] = "unlearning"
    at_least: float = 0.95
    """Floor of the other score, in [0, 1]."""

    def __post_init__(self) -> None:
        names = ("unlearning", "retention")
        check(self.maximise in names, "evaluate.best.maximise", self.maximise, ", ".join(names))
        ok = finite(self.at_least) and 0 <= self.at_least <= 1
        check(ok, "evaluate.best.at_least", self.at_least, "a number from 0 to 1")

    @property
    def other(self) -> str:
        """The score with the floor."""
        return "retention" if self.maximise == "unlearning" else "unlearning"

    @property
    def said(self) -> str:
        """The rule in words."""
        return f"highest {self.maximise} with {self.other} at least {self.at_least:g}"


@dataclass(frozen=True)
class RelearnConfig:
    """How metrics ``relearn`` and ``relearn_retain`` fine-tune the model before they look again
    (``gru_core/metrics/relearn.py``; protocol: arXiv 2406.13356, 2402.16835)."""

    __pydantic_config__ = STRICT
    share: float = 0.1
    """relearn: share of the forget set that is learned again, in (0, 1]; subsets are nested by ``seed``."""
    steps: int = 20
    every: int = 5
    """Steps between measurements (step 0 and the last step are always measured)."""
    lr: float = 1e-5
    """Constant rate of AdamW; 1e-5 is what TOFU's 7B models learned their facts with (arXiv 2401.06121), so that
    forgetting is tried by what made the memory. Small models need more, as they do for unlearning."""
    batch_size: int = 8
    """Rows per step, over all workers."""
    micro_batch: int | None = None
    """Rows per forward pass on each worker; null: all of the worker's rows at once."""
    seed: int = 0
    """Chooses and orders the rows."""

    def __post_init__(self) -> None:
        share, micro = self.share, self.micro_batch
        check(finite(share) and 0 < share <= 1, "evaluate.relearn.share", share, "above 0, at most 1")
        for name in ("steps", "every", "batch_size"):
            value = getattr(self, name)
            check(value >= 1, f"evaluate.relearn.{name}", value, "a whole number from 1")
        check(finite(self.lr) and self.lr > 0, "evaluate.relearn.lr", self.lr, "a number above 0")
        check(micro is None or micro >= 1, "evaluate.relearn.micro_batch", micro, "null or a whole number from 1")
        check(self.seed >= 0, "evaluate.relearn.seed", self.seed, "a whole number from 0")


@dataclass(frozen=True)
class QuantiseConfig:
    """How metric ``quantise`` rounds the weights (``gru_core/metrics/quantise.py``; arXiv 2410.16454)."""

    __pydantic_config__ = STRICT
    bits: tuple[int, ...] = (8, 4)
    """Bit widths to look at, each 2 to 8; bitsandbytes and torchao: 8 and 4."""
    method: Literal["round_trip", "bitsandbytes", "torchao"] = "round_trip"
    """``round_trip``: nearest of the evenly spaced values up to the largest weight; ``bitsandbytes``: its blockwise
    8-bit and NF4 types; ``torchao``: its weight-only integers. The latter two where that package is installed."""
    group_size: int | None = 128
    """Weights of an output channel that share a scale; null: all of them (bitsandbytes: its own block size)."""

    def __post_init__(self) -> None:
        bits, method, group = self.bits, self.method, self.group_size
        methods = ("round_trip", "bitsandbytes", "torchao")
        check(method in methods, "evaluate.quantise.method", method, ", ".join(methods))
        widths = range(2, 9) if method == "round_trip" else (4, 8)
        ok = 0 < len(set(bits)) == len(bits) and set(bits) <= set(widths)
        allowed = "each at most once of " + ", ".join(map(str, widths)) + f" with method {method}"
        check(ok, "evaluate.quantise.bits", list(bits), allowed)
        check(group is None or group >= 1, "evaluate.quantise.group_size", group, "null or a whole number from 1")
        if method == "bitsandbytes":
            blocks = [2**n for n in range(6, 13)]
            allowed = "null, " + ", ".join(map(str, blocks)) + " with method bitsandbytes"
            check(group is None or group in blocks, "evaluate.quantise.group_size", group, allowed)


@dataclass(frozen=True)
class LmEvalConfig:
    """How the metrics ``lm_eval:TASK`` are measured: tasks of EleutherAI's lm-eval (the extra ``eval``)."""

    __pydantic_config__ = STRICT
    limit: int | None = None
    """Only the first n documents of each task; null: all."""
    num_fewshot: int | None = None
    """Answered examples before each question; null: as the task defines it (0 where it does not). A task that is
    defined with 0, such as WMDP's, keeps 0."""
    include_path: str | None = None
    """Folder of further task files (``*.yaml``), which win over lm-eval's; without Python code (``!function``)."""
    data: dict[str, str] = field(default_factory=dict)
    """Task to a local file in place of its data set from the hub: JSON rows ``{question, choices, answer}``, the
    answer a position in choices from 0, as WMDP and MMLU have them."""

    def __post_init__(self) -> None:
        check(self.limit is None or self.limit >= 1, "evaluate.lm_eval.limit", self.limit, "null or from 1")
        shots = self.num_fewshot
        check(shots is None or shots >= 0, "evaluate.lm_eval.num_fewshot", shots, "null or a whole number from 0")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured at every evaluation, and the two numbers that span the trade-off."""

    __pydantic_config__ = STRICT
    metrics: tuple[str, ...] = ("extraction_strength", "model_utility")
    """Names from ``gru_core.metrics.METRICS`` or ``MODEL_METRICS``, or ``lm_eval:TASK``."""
    final: tuple[str, ...] = ()
    """Further metrics, measured only where a run ends (and of the models before it): for what takes long."""
    unlearning: str = "extraction_strength"
    """Forget-set metric, lower when forgotten, behind the unlearning score."""
    retention: str = "model_utility"
    """Utility metric, higher is better, behind the retention score."""
    rows: int | None = None
    """Score only the first n rows of each set; null: all."""
    batch_rows: int = 64
    """Sequences per forward pass where all are as long as the longest; of shorter ones there are more."""
    max_new_tokens: int = 200
    """Longest greedy generation (ROUGE). MUSE's metrics have lengths of their own: 128 (verbmem) and 32 (knowmem)."""
    convention: Literal["original", "openunlearning"] = "original"
    """Whose conventions the metrics follow where published code differs. ``original``: the code of the paper that
    introduced the metric. ``openunlearning``: extraction strength is 1/n, not 0, where not even the last of n tokens is
    the arg-max; 1e-10 is added to the denominators of truth ratio, its inverse, choice probability and privleak;
    verbmem and knowmem compare stemmed words, verbmem with the whole continuation instead of its first 128 tokens."""
    start: str | None = None
    """Folder or hub id of the model that unlearning and retention are counted from; null: ``model.path``. The requests
    of a sequence are all counted from the first one's."""
    best: BestConfig | None = None
    """Keep the best evaluated model too, in ``best`` beside ``model`` (a search: of each trial), such as
    ``{maximise: unlearning, at_least: 0.95}``; null: the last one only."""
    relearn: RelearnConfig = field(default_factory=RelearnConfig)
    quantise: QuantiseConfig = field(default_factory=QuantiseConfig)
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)

    def __post_init__(self) -> None:
        check(len(self.metrics) > 0, "evaluate.metrics", self.metrics, "at least one metric")
        for name in ("batch_rows", "max_new_tokens"):
            value = getattr(self, name)
            check(value >= 1, f"evaluate.{name}", value, "a whole number from 1")
        conventions = ("original", "openunlearning")
        check(self.convention in conventions, "evaluate.convention", self.convention, ", ".join(conventions))
        check(self.start not in ("", "prepared"), "evaluate.start", self.start, "null, a folder or a hub id")
        check(self.rows is None or self.rows >= 1, "evaluate.rows", self.rows, "null or a whole number from 1")
