"""FSDP2: a sharded model loads shard by shard, evaluates, checkpoints and exports as the whole one does."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gru_core import adapters, checkpoint, models, saving, sharding
from gru_core.benchmarks import load_benchmark
from gru_core.config import BenchmarkConfig, EvaluateConfig, LoraConfig, ModelConfig, TrainConfig
from gru_core.errors import InputError, StorageError
from gru_core.loop import Hooks, Run
from gru_core.losses import Rows
from gru_core.metrics import evaluate
from gru_core.objectives import build_objective
from gru_core.parallel import Group, lockstep
from gru_core.placing import place
from gru_core.weight_files import WeightFiles
from tests import small

EVALUATE = EvaluateConfig(
    metrics=("extraction_strength", "model_utility", "forget_rouge"), rows=5, batch_rows=2, max_new_tokens=8
)


def settings(folder: Path, workers: int, strategy: str, steps: int = 20, lora: bool = False) -> Any:
    train = {"workers": workers, "strategy": strategy, "checkpoint_every": 5}
    config = small.config(steps, train=train)
    return replace(config, model=ModelConfig(path=str(folder), lora=LoraConfig(rank=2) if lora else None))


def run_of(config: Any, group: Group, folder: Path | None, hooks: Hooks | None = None) -> Run:
    path = config.model.path
    start = path if config.train.strategy == "fsdp" else lambda: models.load_model(path, config.model)
    net = place(start, config.model, config.train, group)
    rows = small.token_rows()
    objective = build_objective(config.unlearn)
    return Run(net, config, objective, Rows(rows[:12]), Rows(rows[12:]), group, hooks or Hooks(), folder)


class Killed(Exception):
    pass


def dies_after(step: int) -> Hooks:
    def log(done: int, metrics: dict[str, float]) -> None:
        if done == step:
            raise Killed

    return Hooks(log=log)


def whole(net: Any) -> torch.Tensor:
    net = net.module if hasattr(net, "module") else net
    return torch.cat([t.reshape(-1) for _, t in sharding.whole(net)])


def _loads_its_rows_alone(folder: Path, group: Group) -> None:
    for lora in (None, LoraConfig(rank=2)):
        for offload in (False, True):
            config = ModelConfig(path=str(folder), lora=lora)
            train = TrainConfig(workers=2, strategy="fsdp", cpu_offload=offload, activation_checkpointing=True)
            net = sharding.load(str(folder), config, train, group, seed=3)
            plain = models.load_model(str(folder), config)
            if lora:
                adapters.add(plain, lora)
                adapters.initialise(plain, 3)
            for (name, p), (other, q) in zip(net.named_parameters(), plain.named_parameters(), strict=True):
                assert (name, p.requires_grad) == (other, q.requires_grad)
                assert torch.equal(p.full_tensor(), q), name  # type: ignore[attr-defined]
                assert p.to_local().numel() <= -(-q.shape[0] // 2) * (q.numel() // q.shape[0])  # type: ignore[attr-defined]
            for (name, b), (_, c) in zip(net.named_buffers(), plain.named_buffers(), strict=True):
                assert torch.equal(b, c), name
            assert net.lm_head.weight is net.model.embed_tokens.weight, "the tie is lost"  # type: ignore[union-attr]
            ids = torch.arange(24).reshape(2, 12)
            for model in (net, plain):
                model.eval()
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for p, q in zip(net.parameters(), plain.parameters(), strict=True):
                if q.grad is not None:
                    assert torch.allclose(p.grad.full_tensor(), q.grad, atol=1e-7)  # type: ignore[union-attr]


def _reads_no_more(folder: Path, group: Group) -> None:
    """No parameter has memory before it is sharded, and what a rank reads of a tensor is its rows."""
    shard, piece = sharding.shard, WeightFiles.piece
    read: list[int] = []

    class Slices:
        def __init__(self, real: Any, shape: list[int]) -> None:
            self.real, self.most = real, -(-shape[0] // group.size) * math.prod(shape[1:])

        def __getitem__(self, rows: Any) -> torch.Tensor:
            out: torch.Tensor = self.real[rows]
            assert out.numel() <= self.most
            read.append(out.numel())
            return out

    def watched(model: torch.nn.Module, *given: Any) -> None:
        assert all(p.is_meta for p in model.parameters())
        shard(model, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "shard", watched)
        patch.setattr(WeightFiles, "piece", lambda files, name, shape: Slices(piece(files, name, shape), shape))
        net = sharding.load(str(folder), ModelConfig(), TrainConfig(workers=2, strategy="fsdp"), group)
    assert sum(read) == sum(p.to_local().numel() for p in net.parameters())  # type: ignore[attr-defined]


def _evaluates_like_the_whole_model(folder: Path, group: Group) -> None:
    """Ranks with other numbers of batches, and with generations of other lengths, keep in step."""
    benchmark = load_benchmark(BenchmarkConfig(name="authors"))
    tokenizer = models.load_tokenizer(str(folder))
    config = settings(folder, 2, "fsdp")
    net = place(str(folder), config.model, config.train, group)
    plain = models.load_model(str(folder), config.model)
    before = whole(net).clone()
    spread = evaluate(net, tokenizer, benchmark, EVALUATE, config.model, group=group)
    alone = evaluate(plain, tokenizer, benchmark, EVALUATE, config.model)
    assert spread.scores.keys() == alone.scores.keys()
    for name, value in alone.scores.items():
        assert spread.scores[name] == pytest.approx(value, abs=1e-6), name
    assert torch.equal(whole(net), before)
    with lockstep(net, group) as forward:  # one rank never calls it
        if group.rank == 0:
            assert torch.isfinite(forward(input_ids=torch.tensor([[1, 2]]), use_cache=False).logits).all()


def _resumes(folder: Path, out: Path, group: Group) -> None:
    """Killed at 13 and resumed: bit for bit with the same workers; with others, to rounding."""
    for lora in (False, True):
        config = settings(folder, 2, "fsdp", lora=lora)
        calm = run_of(config, group, None)
        calm()
        want = whole(calm.step.model)
        work = out / f"checkpoints-{lora}"
        with pytest.raises(Killed):
            run_of(config, group, work, dies_after(13))()
        again = run_of(config, group, work)
        assert again.start == 10
        again()
        assert torch.equal(whole(again.step.model), want)
        group.barrier()
        if group.rank == 0:
            torch.save(want, out / f"want-{lora}")
            shutil.copytree(work, out / f"kept-{lora}")
            shutil.rmtree(out / f"kept-{lora}" / "step-00000020")
        group.barrier()
        ddp = run_of(settings(folder, 2, "ddp", lora=lora), group, out / f"ddp-{lora}")
        ddp()
        group.barrier()


def _bf16_is_near(folder: Path, group: Group) -> None:
    """bf16 over float32 shards: the update is that of float32 to a few percent, and the shards stay float32."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = settings(folder, 2, "fsdp", steps=1)
        config = replace(config, model=replace(config.model, dtype=dtype))
        run = run_of(config, group, None)
        run.step.optimizer = torch.optim.SGD(run.step.parameters, lr=1.0)  # type: ignore[assignment]
        before = whole(run.step.model).clone()
        run()
        assert all(p.dtype == torch.float32 for p in run.step.parameters)
        found[dtype] = whole(run.step.model) - before
    apart = float((found["bfloat16"] - found["float32"]).norm() / found["float32"].norm())
    assert 1e-4 < apart < 0.1, apart


def _all_must_see_the_checkpoint(folder: Path, out: Path, group: Group) -> None:
    """A rank that does not see it would begin at 0 while the others go on."""
    config = settings(folder, 2, "ddp")
    own = out / f"seen-{group.rank}"
    if group.rank == 0:
        shutil.copytree(out / "ddp-False", own)
    group.barrier()
    with pytest.raises(StorageError, match="is not seen whole by every worker"):
        run_of(config, group, own)


def _other_names(out: Path, group: Group) -> None:
    """Files with other names than the model's: of older versions, and of the hub's GPT-2, without its head."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

    torch.manual_seed(0)
    neox = GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=60
    )
    for name, config in (("neox", neox), ("gpt2", GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60))):
        folder = out / name
        if group.rank == 0:
            model = AutoModelForCausalLM.from_config(config)
            model.save_pretrained(folder)
            small.tokenizer().save_pretrained(folder)
            if name == "gpt2":
                tensors = load_file(folder / "model.safetensors")
                renamed = {k.removeprefix("transformer."): v for k, v in tensors.items()}
                assert renamed.keys() != tensors.keys()
                save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
        group.barrier()
        train = TrainConfig(workers=2, strategy="fsdp")
        net = sharding.load(str(folder), ModelConfig(path=str(folder)), train, group)
        plain = dict(models.load_model(str(folder), ModelConfig()).named_parameters())
        for key, p in net.named_parameters():
            assert torch.equal(p.full_tensor(), plain[key]), key  # type: ignore[attr-defined]


def _rank(rank: int, store: str, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = Group(rank, 2, torch.device("cpu"))
    _loads_its_rows_alone(Path(folder), group)
    _reads_no_more(Path(folder), group)
    _evaluates_like_the_whole_model(Path(folder), group)
    _resumes(Path(folder), Path(out), group)
    _all_must_see_the_checkpoint(Path(folder), Path(out), group)
    _bf16_is_near(Path(folder), group)
    _other_names(Path(out), group)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two processes check, and the checkpoints that they leave."""
    place_ = tmp_path_factory.mktemp("sharded")
    model, tokenizer = small.model(), small.tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # type: ignore[union-attr]
    models.save_model(model, tokenizer, place_ / "model")
    mp.spawn(_rank, args=(str(place_ / "store"), str(place_ / "model"), str(place_)), nprocs=2)
    return place_


@pytest.mark.slow
def test_two_ranks(made: Path) -> None:
    """The assertions are in the ranks; here: each wrote its own part, as safetensors and JSON alone."""
    newest = made / "checkpoints-False" / "step-00000020"
    names = {f.name for f in newest.iterdir()}
    assert {n for n in names if n.startswith("shard-0000")} == {
        f"shard-0000{r}-model-00001-of-00001.safetensors" for r in (1, 2)
    }
    assert names == {*json.loads((newest / "state.json").read_text())["files"], "state.json"}
    assert all(name.endswith((".safetensors", ".json")) for name in names), "nothing that could be a pickle"


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_sharded_run_goes_on_in_one_process(made: Path, tmp_path: Path, lora: bool) -> None:
    """Two sharded workers, then one plain process: the same weights to rounding, not to luck: moments and average
    came along (a start from weights alone is far off)."""
    work = tmp_path / "checkpoints"
    shutil.copytree(made / f"kept-{lora}", work)
    run = run_of(settings(made / "model", 0, "ddp", lora=lora), Group(), work)
    assert run.start == 15
    run()
    mine, want = whole(run.step.model), torch.load(made / f"want-{lora}", weights_only=True)
    start = whole(run_of(settings(made / "model", 0, "ddp", lora=lora), Group(), None).step.model)
    assert (mine - want).norm() / (want - start).norm() < 2e-3
    forgetful = run_of(settings(made / "model", 0, "ddp", lora=lora), Group(), made / f"kept-{lora}")
    forgetful.step.optimizer.state.clear()
    forgetful.folder = None
    forgetful()
    assert (whole(forgetful.step.model) - want).norm() / (want - start).norm() > 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_replicated_run_goes_on_sharded(made: Path, tmp_path: Path, lora: bool) -> None:
    work = tmp_path / "checkpoints"
    shutil.copytree(made / f"ddp-{lora}", work)
    shutil.rmtree(work / "step-00000020")
    out = tmp_path / "weights"
    mp.spawn(_go_on, args=(str(tmp_path / "store"), str(made / "model"), str(work), str(out), lora), nprocs=2)
    mine, want = torch.load(out, weights_only=True), torch.load(made / f"want-{lora}", weights_only=True)
    start = whole(run_of(settings(made / "model", 0, "ddp", lora=lora), Group(), None).step.model)
    assert (mine - want).norm() / (want - start).norm() < 2e-3


def _go_on(rank: int, store: str, folder: str, work: str, out: str, lora: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    run = run_of(settings(Path(folder), 2, "fsdp", lora=lora), Group(rank, 2), Path(work))
    assert run.start == 15
    run()
    weights = whole(run.step.model)
    if rank == 0:
        torch.save(weights, out)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_checkpoint_becomes_one_folder(made: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = settings(made / "model", 2, "fsdp")
    found = checkpoint.latest(made / "checkpoints-False")
    assert found is not None
    model = saving.restore(found, config.model)
    saving.save(model, models.load_tokenizer(str(made / "model")), "", tmp_path / "out", Group())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(small.weights(loaded), torch.load(made / "want-False", weights_only=True))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_shard_is_noticed(made: Path, tmp_path: Path, damage: str) -> None:
    work = tmp_path / "checkpoints"
    shutil.copytree(made / "checkpoints-False", work)
    shard = work / "step-00000020" / "shard-00002-model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(data[:-5])
    else:
        data[-100] ^= 4
        shard.write_bytes(data)
    said: list[str] = []
    found = checkpoint.latest(work, said)
    assert found is not None
    assert found.step == 15
    assert len(said) == 1
    assert "step-00000020 is damaged (shard-00002" in said[0]


def test_a_file_without_the_models_tensors_is_refused(tmp_path: Path) -> None:
    """The message names the tensor; one rank is enough to see it."""
    from safetensors.torch import load_file, save_file

    models.save_model(small.model(), small.tokenizer(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["other"] = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        train = TrainConfig(workers=1, strategy="fsdp")
        with pytest.raises(InputError, match=r"has no tensor 'model.norm.weight'"):
            sharding.load(str(tmp_path / "model"), ModelConfig(), train, Group())
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(InputError, match=r"its weights cannot be read"):
            sharding.load(str(tmp_path / "model"), ModelConfig(), train, Group())
    finally:
        dist.destroy_process_group()
