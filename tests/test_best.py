"""The best model of a run, and evaluation that leaves training alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gru_core.config import BestConfig, RunConfig
from gru_core.errors import ConfigError
from gru_core.metrics import METRICS, Progress, measure
from gru_core.parallel import Group
from pipelines import inputs, journal, prepare, settings, worker
from pipelines.best import Best, better
from tests.study import Study


def point(step: int, unlearning: float, retention: float) -> dict[str, float]:
    return {"step": step, "unlearning": unlearning, "retention": retention}


def test_the_rule_by_hand() -> None:
    rule = BestConfig()
    assert rule.said == "highest unlearning with retention at least 0.95"
    old = point(10, 0.5, 0.97)
    assert not better(point(0, 0.0, 1.0), None, rule), "the model as it was is no candidate"
    assert not better(point(10, 1.0, 0.949), None, rule)
    assert better(old, None, rule)
    assert better(point(20, 0.6, 0.95), old, rule)
    assert not better(point(20, 0.5, 0.97), old, rule), "the earlier one stays"
    assert better(point(20, 0.5, 0.98), old, rule)
    assert not better(point(20, 0.4, 1.0), old, rule)
    other = BestConfig(maximise="retention", at_least=0.9)
    assert better(point(20, 0.9, 0.6), point(10, 0.95, 0.5), other)
    assert not better(point(20, 0.89, 0.9), None, other)


@pytest.mark.parametrize(("given", "said"), [({"at_least": 1.5}, "at_least"), ({"maximise": "both"}, "maximise")])
def test_a_rule_that_is_none_is_refused(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=f"evaluate.best.{said}"):
        BestConfig(**given)


def config_of(study: Study, tmp_path: Path, *more: str) -> RunConfig:
    config = settings.load(str(study.config), [*more, "evaluate.max_new_tokens=6"])
    config = prepare.resolve(config, say=lambda line: None)
    return replace(config, output=replace(config.output, dir=str(tmp_path)))


def test_it_is_kept_beside_the_last_one(study: Study, tmp_path: Path) -> None:
    config = config_of(
        study, tmp_path, "unlearn.steps=6", "unlearn.evaluate_every=1", "unlearn.lr=3.0e-3",
        "evaluate.best={maximise: unlearning, at_least: 0.6}", "evaluate.retention=retain_extraction_strength",
    )  # fmt: skip
    result = worker.work(config, tmp_path / "one", keep_model=True, group=Group())
    points = [p for p in result["points"] if p["step"] > 0 and p["retention"] >= 0.6]
    best = max(points, key=lambda p: (p["unlearning"], p["retention"], -p["step"]))
    assert 0 < best["step"] < 6, "else this shows little"
    assert result["best"] == {
        "rule": "highest unlearning with retention at least 0.6",
        **{name: best[name] for name in ("step", "unlearning", "retention")},
    }
    assert json.loads((tmp_path / "one" / "best.json").read_text()) == result["best"]
    kept = load_file(tmp_path / "one" / "best" / "model.safetensors")
    short = replace(config, unlearn=replace(config.unlearn, steps=best["step"]))
    worker.work(short, tmp_path / "two", keep_model=True, group=Group())
    ended_there = load_file(tmp_path / "two" / "model" / "model.safetensors")
    last = load_file(tmp_path / "one" / "model" / "model.safetensors")
    assert all(torch.equal(kept[name], ended_there[name]) for name in kept)
    assert not all(torch.equal(kept[name], last[name]) for name in kept)
    again = Best(config.evaluate.best, tmp_path / "one", Group())  # after a restart
    assert again.found == result["best"]
    assert not again.takes(best["step"], best), "evaluated again, it is the same"


def test_of_adapters_the_best_adapter_is_kept(study: Study, tmp_path: Path) -> None:
    config = config_of(
        study, tmp_path, "unlearn.steps=2", "unlearn.evaluate_every=1", "unlearn.lr=5.0e-3", "model.lora.rank=2",
        "evaluate.best={maximise: unlearning, at_least: 0.0}", "rectify.rule=none",
    )  # fmt: skip
    result = worker.work(config, tmp_path / "one", keep_model=True, group=Group())
    kept, last = (load_file(tmp_path / "one" / name / "adapter_model.safetensors") for name in ("best", "model"))
    assert result["best"]["step"] in (1, 2)
    assert all(torch.equal(kept[n], last[n]) for n in kept) is (result["best"]["step"] == 2)
    head = journal.load(tmp_path / "one")
    assert head.tags["gru.best"] == f"step {result['best']['step']}"


def test_what_another_run_left_here_is_not_its_own(study: Study, tmp_path: Path, monkeypatch: Any) -> None:
    """As on a machine whose copy of an earlier run in shared storage nobody cleaned."""
    work = measure._measure_part
    calls: list[int] = []

    def part(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return work(*given)

    monkeypatch.setattr(measure, "PARTS", 1)
    first = config_of(study, tmp_path, "unlearn.steps=1", "evaluate.batch_rows=2")
    folder = tmp_path / "one"
    shared = inputs.load(first)
    shared = shared.with_baseline(
        inputs.measure_baseline(first, shared, Group(), Progress(tmp_path / "b", "b", Group()))
    )
    monkeypatch.setattr(measure, "_measure_part", part)
    with pytest.raises(KeyboardInterrupt):
        worker.work(first, folder, shared=shared, group=Group())
    left = folder / ".evaluating"
    assert list(left.rglob("rank-0.jsonl"))
    for entry in folder.iterdir():
        if entry != left:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    monkeypatch.setattr(measure, "_measure_part", work)
    other = replace(first, unlearn=replace(first.unlearn, lr=5e-3))
    found = worker.work(other, folder, shared=shared, group=Group())["scores"]
    assert found == worker.work(other, tmp_path / "two", shared=shared, group=Group())["scores"]


def test_where_nothing_is_good_enough_there_is_none(study: Study, tmp_path: Path) -> None:
    config = config_of(
        study, tmp_path, "unlearn.steps=2", "unlearn.lr=1.0", "unlearn.collapse=1.0e9",
        "evaluate.best={maximise: unlearning, at_least: 1.0}",
    )  # fmt: skip
    result = worker.work(config, tmp_path / "one", keep_model=True, group=Group())
    assert result["best"] is None
    assert not (tmp_path / "one" / "best").exists()


def test_weights_with_every_metric_are_those_without(study: Study, tmp_path: Path) -> None:
    """Random state, data order, train mode, gradients, moving average and optimizer: all as if nobody had looked."""
    common = ("unlearn.steps=5", "unlearn.dropout=true", "rectify.rule=gru", "rectify.strength=2.0")
    able = [name for name, metric in METRICS.items() if not any(n.kind == "truth" for n in metric.needs)]
    able = [name for name in able if all(n.set in ("forget", "retain") for n in METRICS[name].needs)]
    models = []
    for name, more in (
        ("often", ("unlearn.evaluate_every=1", f"evaluate.metrics=[{', '.join(able)}]")),
        ("seldom", ("unlearn.evaluate_every=5", "evaluate.metrics=[extraction_strength]")),
    ):
        config = config_of(study, tmp_path, *common, *more)
        worker.work(config, tmp_path / name, keep_model=True, group=Group())
        models.append(load_file(tmp_path / name / "model" / "model.safetensors"))
    evaluated = list((tmp_path / "often" / "evaluations").iterdir())
    assert len(evaluated) == 6
    assert not (tmp_path / "often" / ".evaluating").exists()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
