"""Low-rank adapters: what they train, what they leave alone, how they are saved, merged and switched off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gru_core import adapters, models, saving
from gru_core.config import LoraConfig, ModelConfig, RetainConfig
from gru_core.errors import InputError
from gru_core.loop import Hooks, Run
from gru_core.losses import Rows
from gru_core.objectives import build_objective
from gru_core.parallel import Group
from gru_core.placing import frozen, place
from tests import small

LORA = LoraConfig(rank=2, alpha=4.0)
IDS = torch.arange(20).reshape(2, 10)


def adapted(config: LoraConfig = LORA) -> Any:
    net = small.model()
    adapters.add(net, config)
    adapters.initialise(net, 0)
    return net.eval()


def logits(net: Any) -> torch.Tensor:
    with torch.no_grad():
        return net(input_ids=IDS, use_cache=False).logits


def build(config: Any, folder: Path | None = None, hooks: Hooks | None = None) -> Run:
    model, train = config.model, config.train
    net = place(small.model, model, train, Group())
    rows = small.token_rows()
    return Run(
        net, config, build_objective(config.unlearn), Rows(rows[:12]), Rows(rows[12:]), Group(), hooks or Hooks(),
        folder, frozen(net, small.model, model, train, Group()),
    )  # fmt: skip


def lora_config(steps: int = 20, loss: str = "nll", **options: Any) -> Any:
    config = small.config(steps, **options)
    return replace(config, model=ModelConfig(lora=LORA), retain=RetainConfig(loss=loss))


def test_new_adapters_change_nothing_and_are_all_that_trains() -> None:
    net = adapted()
    assert torch.equal(logits(net), logits(small.model().eval()))
    trained = {n: p.numel() for n, p in net.named_parameters() if p.requires_grad}
    # hidden 16, intermediate 32: q, k, v, o are 16 x 16, gate and up 16 -> 32, down 32 -> 16; two layers, rank 2
    assert sum(trained.values()) == 2 * 2 * (4 * (16 + 16) + 3 * (16 + 32))
    assert all(adapters.is_adapter(name) for name in trained)
    assert adapters.has(net)
    assert not adapters.has(small.model())


def test_starting_values_depend_on_name_and_seed_alone() -> None:
    torch.manual_seed(1)
    first = adapted()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = adapted()
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    for (name, p), (_, q) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    shape = torch.Size([64, 16])
    a = adapters.initial("x.lora_A.default.weight", shape, 0)
    assert not torch.equal(a, adapters.initial("x.lora_A.default.weight", shape, 1))
    assert not torch.equal(a, adapters.initial("y.lora_A.default.weight", shape, 0))
    assert a.abs().max() <= 1 / 4  # 1 / sqrt(16), as nn.Linear
    assert a.var() == pytest.approx(1 / (3 * 16), rel=0.1)
    assert not adapters.initial("x.lora_B.default.weight", shape, 0).any()


def test_a_run_trains_adapters_alone_and_keeps_buffers_of_their_size() -> None:
    run = build(lora_config())
    net: Any = run.step.model
    before = {n: p.clone() for n, p in net.named_parameters()}
    run()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) is not adapters.is_adapter(name), name
    size = sum(p.numel() for n, p in net.named_parameters() if adapters.is_adapter(n))
    assert run.step.momentum is not None
    assert sum(m.numel() for m in run.step.momentum) == size
    moments = sum(s["exp_avg"].numel() for s in run.step.optimizer.state.values())
    assert moments == size
    with adapters.switched_off(net):
        assert torch.equal(logits(net.eval()), logits(small.model().eval()))
    assert not torch.equal(logits(net), logits(small.model().eval()))


def test_switching_off_leaves_no_trace() -> None:
    net = adapted()
    wanted = [p.requires_grad for p in net.parameters()]
    with pytest.raises(RuntimeError), adapters.switched_off(net):
        raise RuntimeError
    assert [p.requires_grad for p in net.parameters()] == wanted
    with torch.no_grad():
        for name, p in net.named_parameters():
            if ".lora_B." in name:
                p.fill_(0.1)
    on = logits(net)
    with adapters.switched_off(net):
        off = logits(net)
    assert not torch.equal(on, off)
    assert torch.equal(logits(net), on)


def test_the_switched_off_model_has_no_dropout() -> None:
    net = adapted(LoraConfig(rank=2, dropout=0.5))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if ".lora_B." in name:
                p.fill_(0.1)
    for layer in net.model.layers:
        layer.self_attn.attention_dropout = 0.5
    net.train()
    assert not torch.equal(logits(net), logits(net)), "there is no dropout to switch off"
    with adapters.switched_off(net):
        assert torch.equal(logits(net), logits(small.model().eval()))
    assert net.training
    assert all(m.training for m in net.modules())


def test_merging_under_bf16_keeps_a_small_adapter(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    models.save_model(small.model(), small.tokenizer(), base)
    config = ModelConfig(path=str(base), lora=LORA, dtype="bfloat16")
    net: Any = place(lambda: models.load_model(config.path, config), config, small.config().train, Group())
    with torch.no_grad():
        for name, p in net.named_parameters():
            if ".lora_B." in name:
                p.fill_(1e-5)
    saving.save(net, small.tokenizer(), str(base), tmp_path / "adapter", Group())
    saving.save_merged(tmp_path / "adapter", small.tokenizer(), config, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    name = "model.layers.0.self_attn.q_proj"
    a = net.state_dict()[f"{name}.lora_A.default.weight"]
    want = 1e-5 * a.sum(0).expand(16, -1) * (4.0 / 2)
    moved = merged[f"{name}.weight"] - small.model().state_dict()[f"{name}.weight"]
    assert merged[f"{name}.weight"].dtype == torch.float32
    assert torch.allclose(moved, want, atol=2e-8)


@pytest.mark.parametrize("objective", ["ga", "npo"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, objective: str) -> None:
    class Killed(Exception):
        pass

    def log(step: int, metrics: dict[str, float]) -> None:
        if step == 13:
            raise Killed

    config = lora_config(objective=objective)
    whole = build(config)
    whole()
    with pytest.raises(Killed):
        build(config, tmp_path, Hooks(log=log))()
    again = build(config, tmp_path)
    assert again.start == 10
    again()
    assert torch.equal(small.weights(whole.step.model), small.weights(again.step.model))
    names = {f.name for f in (tmp_path / "step-00000020").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names, "the frozen weights are in every checkpoint"


def test_peft_reads_the_folder_and_merging_changes_no_logit(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    models.save_model(small.model(), small.tokenizer(), base)
    run = build(lora_config())
    run()
    net: Any = run.step.model
    saving.save(net, small.tokenizer(), str(base), tmp_path / "adapter", Group())
    want = logits(net.eval())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded.eval()), want)
    config = ModelConfig(path=str(base), lora=LORA)
    saving.save_merged(tmp_path / "adapter", small.tokenizer(), config, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged.eval()), want, atol=1e-5)
    assert not (tmp_path / "merged" / "adapter_model.safetensors").exists()


def test_bf16_stores_frozen_weights_in_bf16_and_adapters_in_float32(tmp_path: Path) -> None:
    models.save_model(small.model(), small.tokenizer(), tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), lora=LORA, dtype="bfloat16")
    net = place(lambda: models.load_model(config.path, config), config, small.config().train, Group())
    for name, p in net.named_parameters():
        assert p.dtype == (torch.float32 if adapters.is_adapter(name) else torch.bfloat16), name


def test_targets_are_checked() -> None:
    net = small.model()
    with pytest.raises(InputError, match=r"model.lora.targets: got 'query', allowed: down_proj, gate_proj, k_proj"):
        adapters.add(net, LoraConfig(targets=("query",)))
    adapters.add(net, LoraConfig(targets=("q_proj",)))
    assert all(".q_proj." in n for n, p in net.named_parameters() if p.requires_grad)


def test_the_starting_model_is_the_same_from_adapters_and_from_a_copy() -> None:
    """Retain loss kl: 0 at the start, and the same run whether the frozen model is a copy or switched-off adapters."""
    config = lora_config(loss="kl", objective="ga", lr=1e-2)
    seen: dict[str, list[dict[str, float]]] = {"off": [], "copy": []}
    for name in seen:
        trace = seen[name]
        run = build(config, hooks=Hooks(log=lambda step, metrics, trace=trace: trace.append(metrics)))  # type: ignore[misc]
        if name == "copy":
            run.step.losses.frozen = frozen(run.step.model, small.model, ModelConfig(), config.train, Group())
        run()
    assert seen["off"][0]["retain_loss"] == pytest.approx(0.0, abs=1e-7)
    assert seen["off"][-1]["retain_loss"] > 1e-4
    assert seen["off"] == seen["copy"]


class TestActivationCheckpointing:
    def grads(self, active: bool, lora: bool) -> tuple[list[torch.Tensor], int]:
        """Gradients, and the elements that autograd kept for the backward pass."""
        config = ModelConfig(lora=LORA if lora else None)
        train = replace(small.config().train, activation_checkpointing=active)
        net = place(small.model, config, train, Group())
        models.set_dropout(net, False)
        kept: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = net(input_ids=IDS.repeat(8, 3), labels=IDS.repeat(8, 3), use_cache=False).loss
            size = sum(n for place_, n in kept.items() if place_ not in own)
            loss.backward()
        return [p.grad for p in net.parameters() if p.grad is not None], size

    @pytest.mark.parametrize("lora", [False, True])
    def test_same_gradients_from_less_memory(self, lora: bool) -> None:
        plain, kept = self.grads(False, lora)
        again, less = self.grads(True, lora)
        assert len(plain) == len(again) > 0
        for a, b in zip(plain, again, strict=True):
            assert torch.equal(a, b)
        assert less < 0.5 * kept
