"""``gru plan``: numbers of a tiny shape by hand, published parameter counts, invariants, the command line."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gru_core import cost, size
from gru_core.config import (
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    RectifyConfig,
    RetainConfig,
    RunConfig,
    TrainConfig,
    UnlearnConfig,
)
from gru_core.errors import InputError
from gru_core.logprobs import ELEMENTS
from pipelines import cli, plan, plan_inputs
from pipelines.plan_inputs import Lengths

SHAPES = Path(__file__).parent / "data" / "shapes"
V, D, L, H, KV, I = 50, 16, 3, 4, 2, 24  # noqa: E741 (the width of the feed-forward part)
HEAD = D // H
ATTENTION = 2 * D * D + 2 * D * KV * HEAD
BLOCK = ATTENTION + 3 * D * I + 2 * D  # two norms
ROOT = V * D + D  # tied embeddings, last norm


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    shape = {
        "vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H,
        "num_key_value_heads": KV, "intermediate_size": I, "tie_word_embeddings": True, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaConfig(**(shape | changes))


def config(
    rule: str = "gru", retain: str = "nll", dtype: str = "float32", lora: bool = False, batch: int = 8, path: str = "x"
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=path, dtype=dtype, lora=LoraConfig(rank=2) if lora else None),  # type: ignore[arg-type]
        unlearn=UnlearnConfig(batch_size=batch),
        rectify=RectifyConfig(rule=rule),
        retain=RetainConfig(loss=retain),
    )


def work(workers: int = 1, rows: int = 8, micro: int = 8, tokens: int = 10, answer: int = 7) -> cost.Work:
    return cost.Work(workers, rows, micro, tokens, answer, evaluated=4, generated=0)


def memory(cfg: RunConfig, job: cost.Work, how: cost.Plan | None = None) -> cost.Memory:
    how = how or cost.Plan()
    cast = how.strategy == "fsdp" and cfg.model.dtype != "float32"
    kept = size.saved(llama(), cfg.model, job.tokens, cast)
    return cost.memory(size.shape(llama(), cfg.model), kept, cfg, job, how)


# ----------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "published"),
    [("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496)],
)
def test_parameters_are_those_that_were_published(name: str, published: int) -> None:
    settings, _ = plan.plan_inputs.settings(config(path=str(SHAPES / f"{name}.json")))
    assert size.shape(settings, ModelConfig()).parameters == published


def test_counts_of_a_tiny_shape() -> None:
    found = size.shape(llama(), ModelConfig())
    assert (found.parameters, found.trained) == (L * BLOCK + ROOT,) * 2
    assert (found.block, found.root, found.layers) == (BLOCK, ROOT, L)
    assert found.products == L * (ATTENTION + 3 * D * I) + V * D
    assert found.cache == 2 * L * KV * HEAD
    untied = size.shape(llama(tie_word_embeddings=False), ModelConfig())
    assert untied.parameters == found.parameters + V * D
    assert untied.products == found.products


def test_adapters_are_what_is_trained() -> None:
    rank, sides = 2, [D + D, D + KV * HEAD, D + KV * HEAD, D + D, D + I, D + I, I + D]  # q k v o gate up down
    found = size.shape(llama(), config(lora=True).model)
    assert found.trained == L * rank * sum(sides)
    assert found.parameters == L * BLOCK + ROOT + found.trained
    assert not found.head_trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "pure_bfloat16"])
@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_those_that_a_real_forward_pass_keeps(dtype: str, lora: bool) -> None:
    """The same count on real memory and the whole model, against fake memory and one or two blocks."""
    from transformers import AutoModelForCausalLM

    from gru_core import adapters, models

    settings, rows, tokens = config(dtype=dtype, lora=lora).model, 3, 12
    model = AutoModelForCausalLM.from_config(llama(), dtype=models.weight_dtype(settings))
    if settings.lora:
        adapters.add(model, settings.lora)
    own, kept, alive = {p.data_ptr() for p in model.parameters()}, {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = torch.ones((rows, tokens), dtype=torch.int64)
    mask[0, -1] = 0
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        model(input_ids=torch.ones((rows, tokens), dtype=torch.int64), attention_mask=mask, use_cache=False)
    real = sum(n for place, n in kept.items() if place not in own)
    traced = size.saved(llama(), settings, tokens, cast=False)
    fixed, row = traced.rest_fixed + L * traced.block_fixed, traced.rest_row + L * traced.block_row
    assert fixed + rows * row == pytest.approx(real, rel=0.01)


# ----------------------------------------------------------------------------------------------- memory


def test_parts_of_one_worker_by_hand() -> None:
    p = L * BLOCK + ROOT
    full = memory(config(), work())
    assert (full.weights, full.gradients, full.moving_average, full.optimizer) == (4 * p, 4 * p, 4 * p, 8 * p)
    assert (full.buckets, full.reference, full.host) == (0, 0, 0)
    plain = memory(config("none"), work())
    assert plain.moving_average == 0
    assert full.total - plain.total == 4 * p
    assert memory(config(dtype="pure_bfloat16"), work()).optimizer == 4 * p
    assert memory(config(), work(workers=2)).buckets == 4 * p
    assert memory(config(retain="kl"), work()).reference == 4 * p
    assert memory(config("none", retain="kl"), work()).reference == 0  # the retain loss is not computed
    lora = memory(config(retain="kl", lora=True, dtype="bfloat16"), work())
    trained = size.shape(llama(), config(lora=True).model).trained
    assert lora.reference == 0  # the base with the adapter switched off
    assert (lora.weights, lora.gradients, lora.optimizer) == (2 * p + 4 * trained, 4 * trained, 8 * trained)


def test_activations_of_float32_by_hand() -> None:
    """Accumulating: gradients are there all the time, so what is on top is what forward and loss keep."""
    B, T, N = 4, 10, 7
    norms, attention = 3 * D, 3 * H * HEAD + H * HEAD + H  # input, normalised, output; q k v out, log-sum-exp
    mask = 4 * T * T  # a float mask for each row and block
    block = 4 * B * T * (2 * norms + 2 + attention + 4 * I) + B * mask
    traced = size.saved(llama(), ModelConfig(), T, cast=False)
    assert traced.block_fixed == 0
    assert B * traced.block_row == block
    logits = 4 * B * T * V + 2 * 4 * B * N * V  # all, those of answers, their log-softmax
    rest = 4 * B * T * (norms + 1) + 8 * B * T + 2 * 4 * T * HEAD  # last norm, token ids, rotary tables
    found = memory(config(), work(rows=8, micro=B, tokens=T, answer=N))
    assert found.activations == pytest.approx(L * block + rest + logits, rel=0.005)


def test_an_evaluation_by_hand() -> None:
    """Logits of answer tokens; of models that make all of them those, too; a slice in float32 where they are not; or
    the cache; a large vocabulary has slices of a fixed size."""
    B, T, N, G = 4, 10, 7, 30
    shape, kept = size.shape(llama(), ModelConfig()), size.saved(llama(), ModelConfig(), T, cast=False)
    assert shape.trims
    job = cost.Work(1, 8, 8, T, N, evaluated=B, generated=0)

    def evaluation(of: size.Shape, job: cost.Work = job, dtype: str = "float32") -> int:
        return cost.memory(of, kept, config(dtype=dtype), job, cost.Plan()).evaluation - kept.rest_fixed

    words = 1000  # logits outweigh a block at work
    large, logits = replace(shape, vocabulary=words), B * N * words
    hidden = (2 * B * T + B * N) * D  # what the last block says of all tokens, normed, and of answer tokens
    assert evaluation(large) == 4 * (logits + hidden)
    cache = 4 * B * T * 2 * L * KV * HEAD  # behind answers that share it
    assert evaluation(large, replace(job, compared=True)) == 4 * (logits + hidden) + cache
    assert evaluation(large, dtype="pure_bfloat16") == 2 * (logits + hidden) + 4 * logits
    assert evaluation(replace(large, trims=False)) == 4 * (B * T * words + logits + hidden)
    inner = 4 * B * T * (3 * I + 2 * D)
    assert evaluation(shape, replace(job, generated=G)) == 4 * B * (T + G) * 2 * L * KV * HEAD + inner
    words = 10_000_000
    wide = replace(shape, vocabulary=words)
    assert evaluation(wide) == 4 * (B * N * words + hidden)
    assert evaluation(wide, dtype="pure_bfloat16") == 2 * (B * N * words + hidden) + 4 * ELEMENTS


def test_shards_are_a_share_of_the_whole() -> None:
    p = L * BLOCK + ROOT
    one, four = (memory(config(), work(n), cost.Plan("fsdp")) for n in (1, 4))
    assert one.weights == 4 * p
    assert four.weights == p
    assert four.optimizer == 2 * p
    host = memory(config(), work(4), cost.Plan("fsdp", offload=True))
    assert (host.weights, host.optimizer) == (0, 0)
    assert host.host == four.weights + four.gradients + four.moving_average + four.optimizer


@pytest.mark.parametrize(
    "how", [cost.Plan(), cost.Plan(checkpointing=True), cost.Plan("fsdp"), cost.Plan("fsdp", True)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_work_never_takes_less(how: cost.Plan, dtype: str) -> None:
    cfg, job = config(dtype=dtype), work(4, rows=8, micro=4)
    base = memory(cfg, job, how).total
    assert memory(cfg, replace(job, tokens=20, answer=14), how).total >= base
    assert memory(cfg, replace(job, answer=10), how).total >= base
    assert memory(cfg, replace(job, micro_batch=2), how).total <= base
    assert memory(config("none", dtype=dtype), job, how).total < base
    assert memory(cfg, job, replace(how, checkpointing=True)).total <= base
    if how.strategy == "fsdp":
        assert memory(cfg, replace(job, workers=8), how).total < base


# --------------------------------------------------------------------------------- communication and time


def test_bytes_sent_by_hand() -> None:
    shape, job = size.shape(llama(), ModelConfig()), work(4, rows=4, micro=2)
    p, share, streams, passes = L * BLOCK + ROOT, 3 / 4, 2, 2
    ddp = cost.traffic(shape, config(), job, cost.Plan())
    assert (ddp.all_reduce, ddp.all_gather, ddp.scalars) == (round(2 * share * streams * 4 * p), 0, 48)
    fsdp = cost.traffic(shape, config(dtype="bfloat16"), job, cost.Plan("fsdp"))
    assert fsdp.all_gather == round(share * streams * passes * 2 * (2 * L * BLOCK + ROOT))
    assert fsdp.reduce_scatter == round(share * streams * passes * 4 * p)
    assert cost.traffic(shape, config("none"), job, cost.Plan()).all_reduce == ddp.all_reduce // 2
    assert cost.traffic(shape, config(), work(), cost.Plan()).total == 0


def test_flops_are_those_that_torch_counts() -> None:
    """Forward and backward of a real model under torch's own counter, twice: both streams."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    rows, tokens = 2, 12
    model = AutoModelForCausalLM.from_config(llama(attn_implementation="eager"))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones((rows, tokens), dtype=torch.int64)).logits.sum().backward()
    shape = size.shape(llama(), ModelConfig())
    one = cost.flops(shape, config("none"), tokens, rows, cost.Plan())
    assert one == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert cost.flops(shape, config(), tokens, rows, cost.Plan()) == 2 * one
    head = 2 * rows * tokens * V * D
    again = cost.flops(shape, config("none"), tokens, rows, cost.Plan(checkpointing=True))
    assert again - one == pytest.approx((one / 3) - head)


def test_padding_is_that_of_random_batches() -> None:
    lengths = Lengths((2, 4, 4, 10), 3, "")
    assert lengths.padded(1) == lengths.mean == 5
    draws = [max(a, b) for a in lengths.rows for b in lengths.rows]
    assert lengths.padded(2) == pytest.approx(sum(draws) / len(draws))
    assert lengths.padded(500) == pytest.approx(10)


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture
def gru(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", *arguments])
        return (int(ended.value.code or 0), *capfd.readouterr())

    return call


def study(tmp_path: Path, shape: str, **values: str) -> Sequence[str]:
    file = tmp_path / "study.yaml"
    file.write_text(f"model: {{path: {SHAPES / shape}, dtype: bfloat16}}\nunlearn: {{batch_size: 64}}\n")
    return ["-c", str(file), *(f"--set={key}={value}" for key, value in values.items())]


def test_70b_is_planned_in_seconds_without_weights(tmp_path: Path, gru: Callable[..., tuple[int, str, str]]) -> None:
    from resource import RUSAGE_SELF, getrusage

    before, start = getrusage(RUSAGE_SELF).ru_maxrss, time.process_time()
    code, out, _ = gru(*study(tmp_path, "llama-3.1-70b.json"), "--gpus", "64", "--json")
    assert code == 0
    assert time.process_time() - start < 10
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 2 * 2**20  # KiB: far from 140 GB
    document = json.loads(out)
    assert document["parameters"] == document["trained"] == 70_553_706_496
    assert not document["as_configured"]["fits"]
    chosen = document["advice"]
    assert chosen["strategy"] == "fsdp"
    assert chosen["fits"]
    assert chosen["memory"]["total"] <= 80 * 2**30
    assert document["with_lora"]["fits"]
    # 6 N D for both streams, N without the embeddings, at 40 % of 64 x 989 TFLOP/s; attention adds a little
    rough = 6 * 69.5e9 * 2 * 64 * 256 / (64 * 989e12 * 0.4)
    assert rough < chosen["seconds"]["compute"] < 1.1 * rough


def test_it_advises_the_simplest_that_fits(tmp_path: Path, gru: Callable[..., tuple[int, str, str]]) -> None:
    small = study(tmp_path, "llama-3.2-1b.json")
    code, out, _ = gru(*small, "--gpus", "8")
    assert code == 0
    assert "1.24B parameters, all trained" in out
    assert "take: --set train.workers=8 --set train.strategy=ddp --set train.micro_batch=8" in out
    assert "other memory is assumed" in out
    assert re.search(r"^\d+ steps of \S+ s: \S+ (s|min|h) without evaluation and checkpoints$", out, re.MULTILINE)
    code, out, _ = gru(*small, "--gpus", "1", "--gpu-memory", "6.5")
    assert code == 0
    assert "nothing fits" in out


def test_amounts_and_times_are_readable() -> None:
    sizes = (0, 2**20, 10 * 2**20, 2**34)
    assert [plan.amount(size).split() for size in sizes] == [
        ["0.00", "MiB"], ["1.00", "MiB"], ["10.00", "MiB"], ["16.00", "GiB"]
    ]  # fmt: skip
    times = [plan.duration(seconds) for seconds in (0.25, 45, 90, 3000, 4320, 360000)]
    assert times == ["0.25 s", "45 s", "1.5 min", "50 min", "1.2 h", "100 h"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "--gpus: got 0, allowed: 1 to unlearn.batch_size (64)"),
        (["--gpus", "65"], "--gpus: got 65"),
        (["--gpu-memory", "-1"], "--gpu-memory: got -1.0, allowed: a number above 0"),
        (["--utilisation", "40"], "--utilisation: got 40.0, allowed: above 0, at most 1"),
        (["--tokens", "4096"], "--tokens: got 4096, allowed: 2 to 2048"),
        (["--bandwidth", "0"], "--bandwidth: got 0.0"),
        (["--set", "model.path=/nowhere/model"], "model.path: "),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, gru: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = gru(*study(tmp_path, "llama-3.2-1b.json"), *arguments)
    assert code == 2
    assert said in out + err
    assert len(err.strip().splitlines()) == 1


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    for text in ("{}", "[1]", "not json", '{"model_type": "nothing"}'):
        file = tmp_path / "config.json"
        file.write_text(text)
        with pytest.raises(InputError, match=r"model\.path: .*config\.json"):
            plan.run(config(path=str(file)))


def test_rows_are_tokenised_where_a_tokenizer_is(tmp_path: Path) -> None:
    from tests import small

    folder = tmp_path / "model"
    small.model().config.save_pretrained(folder)  # settings and tokenizer, no weights
    small.tokenizer().save_pretrained(folder)
    document = plan.run(config(path=str(folder)))
    assert document["tokens"]["longest"] > document["tokens"]["mean"] > document["tokens"]["answer"] / 2
    assert any("authors/forget10" in note for note in document["notes"])
    assert plan.run(config(path=str(folder)), tokens=20)["tokens"] == {"mean": 20, "longest": 20, "answer": 20}


def test_a_config_with_workers_is_planned_for_them() -> None:
    cfg = replace(config(path=str(SHAPES / "llama-3.2-1b.json")), train=TrainConfig(workers=2, micro_batch=3))
    given = plan.run(cfg)["as_configured"]
    assert (given["micro_batch"], given["passes"]) == (3, 2)
    assert given["memory"]["buckets"] == 4 * 1_235_814_400


@pytest.mark.parametrize(
    ("metrics", "compares"),
    [(("extraction_strength",), False), (("forget_truth_ratio",), True), (("lm_eval:wmdp_bio",), True)],
)
def test_what_makes_answers_share_a_cache(metrics: tuple[str, ...], compares: bool) -> None:
    asked = EvaluateConfig(metrics, unlearning="extraction_strength", retention="retain_extraction_strength")
    assert plan_inputs.compares(RunConfig(evaluate=asked)) is compares
