"""Checkpoints: a resumed run is the uninterrupted one, bit for bit; a damaged one is passed over."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gru_core import checkpoint, checkpoint_tensors
from gru_core.errors import StorageError
from gru_core.loop import Hooks
from tests import small


class Killed(Exception):
    pass


def run_until(step: int, cfg: Any, folder: Path) -> None:
    """A run that dies after ``step`` steps."""

    def log(done: int, metrics: dict[str, float]) -> None:
        if done == step:
            raise Killed

    with pytest.raises(Killed):
        small.build(cfg, small.model(), hooks=Hooks(log=log), folder=folder)()


@pytest.mark.parametrize(
    ("objective", "rectify"),
    [
        ("npo", {}),
        ("ga", {"rule": "none"}),
        ("wga", {"repair": 10.0}),
        ("simnpo", {"rule": "sum", "retain_weight": 1.0}),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, objective: str, rectify: dict[str, Any]) -> None:
    cfg = small.config(20, objective=objective, rectify=rectify, schedule="cosine", warmup=3)
    whole, resumed = small.model(), small.model()
    metrics: dict[str, list[Any]] = {"whole": [], "resumed": []}
    small.build(cfg, whole, hooks=Hooks(log=lambda s, m: metrics["whole"].append((s, m))))()
    run_until(13, cfg, tmp_path)
    assert checkpoint.latest(tmp_path).step == 10  # type: ignore[union-attr]
    torch.manual_seed(99)  # a new process has other generator states
    with torch.no_grad():
        for p in resumed.parameters():
            p.add_(1.0)  # and weights that do not matter
    run = small.build(cfg, resumed, hooks=Hooks(log=lambda s, m: metrics["resumed"].append((s, m))), folder=tmp_path)
    assert run.start == 10
    run()
    assert torch.equal(small.weights(whole), small.weights(resumed))
    assert metrics["whole"][10:] == metrics["resumed"]


def test_generators_are_restored(tmp_path: Path) -> None:
    net = small.model()
    run = small.build(small.config(1), net)
    run()
    checkpoint.save(tmp_path, 1, net, run.step.optimizer, None, run.step.state())
    want = (torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)])
    found = checkpoint.latest(tmp_path)
    assert found is not None
    checkpoint.load(found, net, run.step.optimizer)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]) == want


def test_is_a_model_folder_and_two_are_kept(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    net = small.model()
    small.build(small.config(20), net, folder=tmp_path)()
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["step-00000015", "step-00000020"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step-00000020")
    assert torch.equal(small.weights(loaded), small.weights(net))


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "missing",
        "unreadable",
        "half written",
        "a flipped bit",
        "a flipped bit in its state",
        "a strange file",
        "a link",
        "a path",
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    small.build(small.config(10), small.model(), folder=tmp_path)()
    newest = tmp_path / "step-00000010"
    if damage == "truncated":
        data = (newest / "optimizer.safetensors").read_bytes()
        (newest / "optimizer.safetensors").write_bytes(data[:-7])
    elif damage == "missing":
        (newest / "ema.safetensors").unlink()
    elif damage == "unreadable":
        (newest / "state.json").write_text("{")
    elif damage == "a flipped bit":
        data = bytearray((newest / "ema.safetensors").read_bytes())
        data[-40] ^= 1
        (newest / "ema.safetensors").write_bytes(data)
    elif damage == "a flipped bit in its state":
        text = (newest / "state.json").read_text()
        (newest / "state.json").write_text(text.replace('"step": 10', '"step": 11'))
    elif damage == "a strange file":
        (newest / "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"x")
    elif damage in ("a link", "a path"):
        state = json.loads((newest / "state.json").read_text())
        outside = tmp_path / "outside.safetensors"
        (newest / "ema.safetensors").rename(outside)
        if damage == "a link":
            (newest / "ema.safetensors").symlink_to(outside)
        else:
            state["files"]["../outside.safetensors"] = state["files"].pop("ema.safetensors")
        state["checksum"] = checkpoint._state_checksum({k: v for k, v in state.items() if k != "checksum"})
        (newest / "state.json").write_text(json.dumps(state))
    else:
        newest.rename(tmp_path / ".part-00000010")
    said: list[str] = []
    found = checkpoint.latest(tmp_path, said)
    assert found is not None
    assert found.step == 5
    assert len(said) == (damage != "half written")
    assert all("step-00000010 is damaged (" in line for line in said)


def test_a_full_disk_names_the_last_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = checkpoint_tensors.save_file, []

    def full(*args: Any, **kw: Any) -> None:
        calls.append(1)
        if len(calls) > 6:  # within the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kw)

    monkeypatch.setattr(checkpoint_tensors, "save_file", full)
    with pytest.raises(StorageError, match=r"No space left.*last whole checkpoint is .*step-00000005"):
        small.build(small.config(20), small.model(), folder=tmp_path)()
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000005"]
    assert checkpoint.latest(tmp_path) is not None


def test_a_collapse_is_remembered(tmp_path: Path) -> None:
    """A run that died between its collapse and its result is still collapsed, and takes no further step."""
    cfg = small.config(200, objective="ga", lr=0.3, collapse=1.5, clip=None, rectify={"rule": "none"})
    outcome = small.build(cfg, small.model(), folder=tmp_path)()
    assert outcome.status == "collapsed"
    steps: list[int] = []
    again = small.build(cfg, small.model(), hooks=Hooks(log=lambda s, m: steps.append(s)), folder=tmp_path)()
    assert again == outcome
    assert not steps


def test_resume_with_dropout_draws_the_same_masks(tmp_path: Path) -> None:
    def net() -> Any:
        model = small.model()
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.attention_dropout = 0.3
        return model

    cfg = small.config(20, dropout=True)
    whole, resumed, without = net(), net(), net()
    small.build(cfg, whole)()
    small.build(small.config(20), without)()
    assert not torch.equal(small.weights(whole), small.weights(without)), "dropout did nothing"

    def log(done: int, metrics: dict[str, float]) -> None:
        if done == 13:
            raise Killed

    with pytest.raises(Killed):
        small.build(cfg, net(), hooks=Hooks(log=log), folder=tmp_path)()
    torch.manual_seed(4)
    small.build(cfg, resumed, folder=tmp_path)()
    assert torch.equal(small.weights(whole), small.weights(resumed))


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    from gru_core.models import build_small

    small.build(small.config(5), small.model(), folder=tmp_path)()
    other = build_small(small.tokenizer(), replace(small.SHAPE, hidden=32), 0)
    with pytest.raises(StorageError, match="belongs to another model"):
        small.build(small.config(5), other, folder=tmp_path)


def test_state_is_plain_json(tmp_path: Path) -> None:
    small.build(small.config(5), small.model(), folder=tmp_path)()
    folder = tmp_path / "step-00000005"
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 5
    names = {f.name for f in folder.iterdir()}
    assert names == {*state["files"], "state.json"}
    assert all(name.endswith((".safetensors", ".json")) for name in names), "nothing that could be a pickle"


def test_files_are_readable_as_other_new_files_are(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    small.build(small.config(5), small.model(), folder=tmp_path / "run")()
    modes = {f.name: f.stat().st_mode for f in (tmp_path / "run" / "step-00000005").iterdir()}
    assert set(modes.values()) == {(tmp_path / "other").stat().st_mode}
