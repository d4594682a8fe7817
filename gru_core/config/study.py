"""What surrounds a run: evaluation, preparation, search, tracking, output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

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
class EvaluateConfig:
    """What is measured at every evaluation, and the two numbers that span the trade-off."""

    __pydantic_config__ = STRICT
    metrics: tuple[str, ...] = ("extraction_strength", "model_utility")
    """Names from ``gru_core.metrics.METRICS`` or ``MODEL_METRICS``."""
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

    def __post_init__(self) -> None:
        check(len(self.metrics) > 0, "evaluate.metrics", self.metrics, "at least one metric")
        for name in ("batch_rows", "max_new_tokens"):
            value = getattr(self, name)
            check(value >= 1, f"evaluate.{name}", value, "a whole number from 1")
        conventions = ("original", "openunlearning")
        check(self.convention in conventions, "evaluate.convention", self.convention, ", ".join(conventions))
        check(self.start not in ("", "prepared"), "evaluate.start", self.start, "null, a folder or a hub id")
        check(self.rows is None or self.rows >= 1, "evaluate.rows", self.rows, "null or a whole number from 1")


@dataclass(frozen=True)
class PrepareConfig:
    """How ``gru prepare`` makes the target model and the retain model."""

    __pydantic_config__ = STRICT
    base: str | None = None
    """Folder or hub id of the model to fine-tune; null: a small Llama from scratch with its own tokenizer."""
    tokenizer: Literal["word", "bpe"] = "word"
    """Tokenizer of the small Llama, trained on the benchmark's texts."""
    vocab_size: int = 4096
    hidden: int = 96
    layers: int = 2
    heads: int = 4
    intermediate: int = 256
    steps: int = 900
    batch_size: int = 32
    lr: float = 1e-2
    warmup: int = 20
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden", "layers", "heads", "intermediate", "steps", "batch_size"):
            value = getattr(self, name)
            check(value >= 1, f"prepare.{name}", value, "a whole number from 1")
        check(self.tokenizer in ("word", "bpe"), "prepare.tokenizer", self.tokenizer, "word, bpe")
        check(finite(self.lr) and self.lr > 0, "prepare.lr", self.lr, "a number above 0")
        check(0 <= self.warmup <= self.steps, "prepare.warmup", self.warmup, f"0 to steps ({self.steps})")
        decay = self.weight_decay
        check(finite(decay) and decay >= 0, "prepare.weight_decay", decay, "a number from 0")
        check(self.hidden % self.heads == 0, "prepare.heads", self.heads, f"a divisor of hidden ({self.hidden})")


@dataclass(frozen=True)
class FamilyConfig:
    """One family of a search: fixed settings over the base config, and what it searches."""

    __pydantic_config__ = STRICT
    fixed: dict[str, Any] = field(default_factory=dict)
    """Dotted config keys that this family sets."""
    space: dict[str, Any] = field(default_factory=dict)
    """Dotted config keys that this family searches, besides the shared ``search.space``."""


@dataclass(frozen=True)
class SearchConfig:
    """What ``gru search`` varies. A dimension is ``{low, high, log?, step?}`` or a list of choices."""

    __pydantic_config__ = STRICT
    trials: int = 24
    """Trials over all families, the same number for each."""
    sampler: Literal["optuna", "random", "grid"] = "optuna"
    metrics: tuple[str, ...] = ("unlearning", "retention")
    """Scores that are maximised together."""
    space: dict[str, Any] = field(default_factory=dict)
    """Dotted config keys that every family searches."""
    families: dict[str, FamilyConfig] = field(default_factory=dict)
    """Families with a sampler of their own each; empty: plain, sum and rectified as DESIGN describes."""
    concurrent: int | None = None
    """Trials at a time; null: as many as the resources hold."""

    def __post_init__(self) -> None:
        check(self.trials >= 1, "search.trials", self.trials, "a whole number from 1")
        samplers = ("optuna", "random", "grid")
        check(self.sampler in samplers, "search.sampler", self.sampler, ", ".join(samplers))
        check(
            self.concurrent is None or self.concurrent >= 1,
            "search.concurrent",
            self.concurrent,
            "null or from 1",
        )
        known = {"unlearning", "retention"}
        ok = 0 < len(set(self.metrics)) == len(self.metrics) and set(self.metrics) <= known
        check(ok, "search.metrics", list(self.metrics), "unlearning, retention, or both")


@dataclass(frozen=True)
class RequestsConfig:
    """What ``gru requests`` runs: one unlearning run for each of several forget sets."""

    __pydantic_config__ = STRICT
    splits: tuple[str, ...] = ()
    """Values of ``benchmark.split``, each once, in the order of the requests."""
    sequential: bool = False
    """True: each request starts from the model that the one before left (sustainability), and is scored against the
    first one's start. False: each starts from ``model.path`` (scalability)."""
    passes: float | None = None
    """Passes over each forget set, so that a larger one gets more steps: rows x passes / ``unlearn.batch_size``,
    rounded up. Null: ``unlearn.steps`` for each."""

    def __post_init__(self) -> None:
        splits, passes = list(self.splits), self.passes
        check(passes is None or (finite(passes) and passes > 0), "requests.passes", passes, "null or a number above 0")
        check(len(set(splits)) == len(splits), "requests.splits", splits, "values of benchmark.split, each once")


@dataclass(frozen=True)
class TrackConfig:
    """Where MLflow records."""

    __pydantic_config__ = STRICT
    uri: str | None = None
    """Tracking URI; null: ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` in the working folder."""
    experiment: str = "gru"


@dataclass(frozen=True)
class OutputConfig:
    """Where files go."""

    __pydantic_config__ = STRICT
    dir: str = "runs/gru"
    storage: str | None = None
    """Storage that all machines reach, such as ``s3://bucket/folder``, where they share no file system: the
    output folder is then kept there, and ``dir`` is each machine's own copy."""
    merged: bool = False
    """With ``model.lora``: also write the model with its adapter merged in."""
