"""What a run costs on each worker: peak memory by part, bytes on the wire, FLOPs. Pure: shapes in, numbers out.

docs/scaling.md has the formulas in words, and how well they meet what was measured.

Shape legend: B rows of a micro-batch, T tokens of its longest row, N answer tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gru_core.config import RunConfig
from gru_core.logprobs import ELEMENTS
from gru_core.rectify import build_rule
from gru_core.size import Saved, Shape

Strategy = Literal["ddp", "fsdp"]

SCALARS = 6 * 8
"""Bytes of the all-reduce that a step's losses, Gram matrix and stop flag take: six float64."""


@dataclass(frozen=True)
class Work:
    """One worker's part of a step.

    Attributes:
        workers: ranks of the run.
        rows: rows of each stream on the worker, ``micro_batch`` of them at a time.
        tokens: T, of the longest row.
        answer: answer tokens of the row with most of them.
        evaluated: rows of an evaluation batch; ``generated`` tokens at most are generated for each, 0: none.
        compared: an evaluation passes several answers to a prompt, which share its key-value cache.
    """

    workers: int
    rows: int
    micro_batch: int
    tokens: int
    answer: int
    evaluated: int
    generated: int
    slice: int = ELEMENTS
    """Logits that an evaluation holds in float32 at a time, as on a GPU."""
    compared: bool = False

    @property
    def passes(self) -> int:
        """Micro-batches of each stream."""
        return -(-self.rows // self.micro_batch)


@dataclass(frozen=True)
class Plan:
    """How the work is done: what a config says, or what it might say instead."""

    strategy: Strategy = "ddp"
    checkpointing: bool = False
    offload: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one worker at its peak.

    Attributes:
        activations: all that forward, loss and backward need beyond the other parts.
        evaluation: does not come on top: it takes the place of gradients and activations.
        host: bytes in host memory (``cpu_offload``).
    """

    weights: int
    gradients: int
    moving_average: int
    optimizer: int
    buckets: int
    reference: int
    activations: int
    evaluation: int
    host: int = 0

    @property
    def total(self) -> int:
        stays = self.weights + self.moving_average + self.optimizer + self.buckets + self.reference
        return stays + max(self.gradients + self.activations, self.evaluation)


@dataclass(frozen=True)
class Bytes:
    """Bytes of one element: of stored weights, of trained ones (and their gradients), in matrix products."""

    stored: int
    trained: int
    compute: int


def bytes_of(config: RunConfig) -> Bytes:
    """Element sizes under ``config.model``; adapters are float32 whatever the model is."""
    dtype, lora = config.model.dtype, config.model.lora is not None
    half = dtype == "pure_bfloat16" or (lora and dtype == "bfloat16")
    trained = 4 if lora or dtype != "pure_bfloat16" else 2
    return Bytes(2 if half else 4, trained, 4 if dtype == "float32" else 2)


def streams(config: RunConfig) -> int:
    """Streams with a gradient: forget, and retain where the rule reads it."""
    return 2 if "ema" in build_rule(config.rectify).uses else 1


def _compares(config: RunConfig) -> bool:
    """Whether the retain pass runs the starting model, too."""
    return config.retain.loss == "kl" and streams(config) == 2


def memory(shape: Shape, saved: Saved, config: RunConfig, work: Work, plan: Plan) -> Memory:
    """Peak memory of one worker.

    Args:
        saved: traced for ``work.tokens``, with ``cast`` where ``plan`` shards.
    """
    size = bytes_of(config)
    frozen = shape.parameters - shape.trained
    weights = frozen * size.stored + shape.trained * size.trained
    gradient = shape.trained * size.trained
    copies = _compares(config) and config.model.lora is None
    parts = {
        "weights": weights,
        "gradients": gradient,
        "moving_average": gradient if streams(config) == 2 else 0,
        "optimizer": 2 * gradient,
        "reference": weights if copies else 0,
    }
    spread = work.workers if plan.strategy == "fsdp" else 1
    local = {name: -(-value // spread) for name, value in parts.items()}
    buckets = gradient if plan.strategy == "ddp" and work.workers > 1 else 0
    whole = _unsharded(shape, size, copies) if plan.strategy == "fsdp" else 0
    active = whole + _activations(shape, saved, config, work, plan)
    evaluation = whole + _evaluation(shape, saved, size, work, plan)
    if plan.offload:
        return Memory(0, 0, 0, 0, 0, 0, active, evaluation, host=sum(local.values()))
    # gradients grow while activations shrink: both are whole at once only where earlier passes left gradients
    return Memory(**local, buckets=buckets, activations=active, evaluation=evaluation)


def _logits(shape: Shape, size: Bytes, rows: int, tokens: int, answers: int) -> tuple[int, int]:
    """Most bytes of logits and loss in the forward pass, and what their backward needs besides the head's gradient.

    Forward: all logits, those of answer tokens, their float32 copy where they are bf16, and their log-softmax.
    """
    whole, part = rows * tokens * shape.vocabulary, rows * answers * shape.vocabulary
    cast = 4 * part if size.compute < 4 else 0
    return size.compute * (whole + part) + cast + 4 * part, size.compute * (whole + rows * tokens * shape.hidden)


def _divergence(shape: Shape, size: Bytes, rows: int, tokens: int, answers: int) -> int:
    """Most bytes of the logits of model and starting model and of their divergence: six float32 values an answer
    token and word (both log-softmaxes, three factors of the divergence, and the negative log-likelihood's)."""
    whole, part = rows * tokens * shape.vocabulary, rows * answers * shape.vocabulary
    return 2 * size.compute * (whole + part) + 24 * part


def _activations(shape: Shape, saved: Saved, config: RunConfig, work: Work, plan: Plan) -> int:
    """Bytes beyond gradients at the worst moment: loss, head's backward, a block's backward, end of the backward pass.

    With one micro-batch the gradients fill the room that activations leave; with more they are there all the time.
    """
    size, B, T = bytes_of(config), work.micro_batch, work.tokens
    sharded = plan.strategy == "fsdp"
    rest = saved.rest_fixed + B * saved.rest_row
    block = saved.block_fixed + B * saved.block_row
    residual = 2 if size.compute == 2 and (sharded or config.model.dtype == "pure_bfloat16") else 4
    kept = rest + shape.layers * (B * T * shape.hidden * residual if plan.checkpointing else block)
    inside = shape.layers * saved.block_fixed if plan.checkpointing else 0  # autocast's cache, until the loss
    loss, logits_back = _logits(shape, size, B, T, work.answer)
    head = shape.vocabulary * shape.hidden if shape.head_trained else 0
    head_gradient = head * (size.compute if size.compute == size.trained or sharded else size.compute + size.trained)
    spread = work.workers if sharded else 1
    gradient = shape.trained * size.trained // spread
    before = gradient if work.passes > 1 else 0
    inner = B * T * (3 * shape.intermediate + 2 * shape.hidden) * size.compute  # gradients within a block
    backward = kept + (block if plan.checkpointing else 0) + inner + (0 if before else head * size.trained // spread)
    moments = {
        "loss": before + kept + max(loss, inside + size.compute * B * T * shape.vocabulary),
        "head": before + kept + logits_back + head_gradient,
        "last block": before + backward,
        "first block": gradient - (0 if before else gradient // shape.layers) + block + inner,
        "end": gradient + _last(shape, size, sharded),
    }
    if _compares(config):  # in the retain pass, whose gradient is the moving average
        moments["divergence"] = kept + _divergence(shape, size, B, T, work.answer)
    return max(moments.values()) - gradient


def _last(shape: Shape, size: Bytes, sharded: bool) -> int:
    """Bytes of gradients that exist twice when the backward pass ends: the embeddings', whole where sharded."""
    if not sharded:
        return shape.largest * size.trained
    late = shape.root + shape.block if shape.head_trained else -(-shape.trained // shape.layers)
    return late * (size.compute + 4)  # as computed, and in float32 to be reduced


def _unsharded(shape: Shape, size: Bytes, copies: bool) -> int:
    """Bytes of weights that FSDP2 holds together: the root, the block at work and the one fetched ahead."""
    return (shape.root + 2 * shape.block) * size.compute * (2 if copies else 1)


def _evaluation(shape: Shape, saved: Saved, size: Bytes, work: Work, plan: Plan) -> int:
    """Most bytes of an evaluation batch, its rows as long as the rows that train: the logits of answer tokens, a slice
    of them in float32, and a key-value cache where answers share one; or the cache of generation."""
    B, T = work.evaluated, work.tokens
    copies = shape.layers * saved.block_fixed + saved.rest_fixed  # autocast's cache
    inner = B * T * (3 * shape.intermediate + 2 * shape.hidden) * size.compute
    answers = B * work.answer * shape.vocabulary
    at_once = min(answers, max(work.slice, shape.vocabulary))
    # of a slice its float32 copy where it is bf16; all logits a second time where the output layer makes them whole
    forced = size.compute * (answers if shape.trims else B * T * shape.vocabulary + answers)
    forced += 4 * at_once if size.compute < 4 else 0
    forced += (2 * B * T + B * work.answer) * shape.hidden * size.compute  # the last block's, normed, and picked of it
    cache = B * (T + work.generated) * shape.cache * size.compute if work.generated else 0
    shared = B * T * shape.cache * size.compute if work.compared else 0
    return copies + max(forced + shared, cache + inner)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one worker sends in a step.

    Attributes:
        all_reduce: gradients under DDP, both streams (a ring sends each byte twice).
        all_gather: weights under FSDP2, forward and backward of each micro-batch; the root's once.
        reduce_scatter: gradients under FSDP2, each micro-batch.
        scalars: losses and Gram matrix.
    """

    all_reduce: int
    all_gather: int
    reduce_scatter: int
    scalars: int

    @property
    def total(self) -> int:
        return self.all_reduce + self.all_gather + self.reduce_scatter + self.scalars


def traffic(shape: Shape, config: RunConfig, work: Work, plan: Plan) -> Traffic:
    """Bytes that one worker sends in a step; nothing where it is alone."""
    if work.workers == 1:
        return Traffic(0, 0, 0, 0)
    size, share = bytes_of(config), (work.workers - 1) / work.workers
    if plan.strategy == "ddp":
        gradient = shape.trained * size.trained
        return Traffic(round(2 * share * streams(config) * gradient), 0, 0, SCALARS)
    passes = streams(config) * work.passes
    gathers = 2.0 * (shape.parameters - shape.root) + shape.root
    if _compares(config):
        gathers += shape.parameters / 2  # the starting model's forward, in one of two streams
    return Traffic(
        0,
        round(share * passes * gathers * size.compute),
        round(share * passes * shape.trained * 4),  # in float32
        SCALARS,
    )


def flops(shape: Shape, config: RunConfig, tokens: float, rows: int, plan: Plan) -> float:
    """Floating-point operations of one step on all workers together.

    A forward pass takes 2 a weight and token and, for attention over T tokens, 4 T x width x layers a token. The
    backward pass takes twice that, or once where the weights are frozen (LoRA). Checkpointing computes the blocks
    again, ``kl`` runs the reference forward.

    Args:
        tokens: computed tokens of a row, padding included.
        rows: rows of each stream, over all workers.
    """
    blocks = 2 * (shape.products - shape.vocabulary * shape.hidden) + 4 * tokens * shape.width * shape.layers
    forward = blocks + 2 * shape.vocabulary * shape.hidden
    each = (2 if config.model.lora is not None else 3) * forward + (blocks if plan.checkpointing else 0)
    count = streams(config)
    reference = forward if _compares(config) else 0
    return rows * tokens * (count * each + reference)
