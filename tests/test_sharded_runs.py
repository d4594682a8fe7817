"""`gru unlearn` with sharded workers and with adapters, and `gru export`, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gru_core.errors import InputError
from pipelines import unlearn
from tests.study import Study, final_weights, gru

SETTINGS = ["unlearn.steps=8", "unlearn.evaluate_every=4", "train.checkpoint_every=4"]


def arguments(study: Study, folder: Path, *more: str) -> list[str]:
    sets = [word for item in (*SETTINGS, *more) for word in ("--set", item)]
    return ["unlearn", "-c", str(study.config), *sets, "--output", str(folder), "--json"]


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two models over the norm of the update."""
    assert a.keys() == b.keys() == start.keys()
    difference = sum(float((a[k] - b[k]).double().square().sum()) for k in a)
    update = sum(float((a[k] - start[k]).double().square().sum()) for k in a)
    return (difference / update) ** 0.5


@pytest.fixture(scope="module")
def plain(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process that the others must agree with."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    done = gru(arguments(study, folder, "retain.loss=kl"), study.environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_two_sharded_workers_are_one_process(study: Study, plain: Path, tmp_path: Path) -> None:
    """Weights, scores and step metrics; then the sharded checkpoint as a folder of its own."""
    folder = tmp_path / "run"
    more = ["train.workers=2", "train.strategy=fsdp", "train.micro_batch=2", "retain.loss=kl"]
    more += ["train.activation_checkpointing=true"]
    done = gru(arguments(study, folder, *more), study.environment)
    assert done.returncode == 0, done.stderr
    found, want = json.loads(done.stdout), json.loads((plain / "scores.json").read_text())
    assert found["scores"] == pytest.approx(want["scores"], abs=1e-3)
    start = load_file(next((study.folder / "cache" / "models").glob("*/target/model.safetensors")))
    assert apart(final_weights(plain), final_weights(folder), start) < 1e-2
    assert len(list((folder / "checkpoints" / "step-00000008").glob("shard-*"))) == 2
    out = gru(["export", str(folder), "--step", "8", "--output", str(tmp_path / "out"), "--json"], study.environment)
    assert out.returncode == 0, out.stderr
    exported = load_file(tmp_path / "out" / "model.safetensors")
    last = final_weights(folder)
    assert all(torch.equal(exported[key], last[key]) for key in last)


@pytest.mark.slow
def test_sharded_adapters_are_those_of_one_process(study: Study, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    one, two = tmp_path / "one", tmp_path / "two"
    more = ["model.lora.rank=4", "output.merged=true", "unlearn.lr=2e-3"]
    done = gru(arguments(study, one, *more), study.environment)
    assert done.returncode == 0, done.stderr
    spread = [*more, "train.workers=2", "train.strategy=fsdp"]
    done = gru(arguments(study, two, *spread), study.environment)
    assert done.returncode == 0, done.stderr
    a, b = (load_file(f / "model" / "adapter_model.safetensors") for f in (one, two))
    assert a.keys() == b.keys()
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-4
    assert max(float(t.abs().max()) for k, t in a.items() if "lora_B" in k) > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(two / "merged")
    start = load_file(next((study.folder / "cache" / "models").glob("*/target/model.safetensors")))
    name = "model.layers.0.mlp.down_proj"
    scale = 32.0 / 4
    moved = b[f"base_model.model.{name}.lora_B.weight"] @ b[f"base_model.model.{name}.lora_A.weight"] * scale
    assert torch.allclose(merged.state_dict()[f"{name}.weight"], start[f"{name}.weight"] + moved, atol=1e-6)
    out = gru(["export", str(two), "--merged", "--output", str(tmp_path / "out"), "--json"], study.environment)
    assert json.loads(out.stdout)["kind"] == "merged model"
    assert json.loads(out.stdout)["base"] is None
    out = gru(["export", str(two)], study.environment)
    assert f"it needs its starting model, {study.folder}" in out.stdout
    assert "--merged" in out.stdout
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[k], v) for k, v in merged.state_dict().items())


@pytest.mark.slow
def test_export_refuses_what_it_cannot_do(study: Study, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for words, line in (
        ([str(tmp_path / "nothing")], "no run there"),
        ([str(plain), "--merged"], "trained no adapter"),
        ([str(plain), "--step", "5"], "--step: got 5, checkpoints there: 4, 8"),
        ([str(plain), "--output", str(tmp_path / "full")], "exists and is not empty"),
    ):
        done = gru(["export", *words], study.environment)
        assert done.returncode == 2
        assert line in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_adapters_that_fit_no_layer_are_refused_before_anything_is_written(study: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^model.lora.targets: got 'query', allowed: down_proj, .*v_proj$"):
        unlearn.run(study.load(tmp_path / "run", "model.lora.targets=[query]"), say=lambda line: None)
    assert not (tmp_path / "run").exists()
