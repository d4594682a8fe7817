"""Metrics that are measured only where a run ends, relearning and quantisation among them, in real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from gru_core.errors import ConfigError, InputError
from pipelines import evaluate, journal, unlearn
from tests.study import Study, final_weights, gru

FINAL = [
    "evaluate.final=[relearn, relearn_retain, quantise, forget_probability]",
    "evaluate.relearn={share: 0.25, steps: 4, every: 2, lr: 1.0e-2, batch_size: 2}",
    "unlearn.lr=5.0e-4",
]
CURVE = {0, 2, 4}


def say(line: str) -> None:
    del line


@pytest.fixture(scope="module")
def run(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("final") / "run"
    return folder, unlearn.run(study.load(folder, *FINAL), say=say)


def evaluation(folder: Path, step: int) -> dict[str, float]:
    return json.loads((folder / "evaluations" / f"step-{step:08d}.json").read_text())["scores"]


@pytest.mark.slow
def test_final_metrics_are_measured_at_the_end_alone(run: tuple[Path, dict[str, Any]]) -> None:
    """And of the two models that the run is compared with."""
    folder, result = run
    added = {"forget_probability", "relearn", "relearn_retain", "quantise", "quantise/4_bit", "relearn/step_2"}
    assert added <= evaluation(folder, 12).keys()
    assert added <= result["scores"].keys()
    for step in (4, 8):
        assert evaluation(folder, step).keys() == {"extraction_strength", "retain_extraction_strength"}
    baseline = json.loads((folder / "baseline.json").read_text())
    start, retain = (baseline[name]["scores"] for name in ("start", "retain"))
    assert added <= start.keys()
    assert start.keys() == retain.keys() == evaluation(folder, 12).keys()
    assert evaluation(folder, 0).keys() == start.keys()
    assert start["relearn/step_0"] == start["extraction_strength"] > 0.5 > retain["relearn"]
    assert result["scores"]["relearn/step_0"] == result["scores"]["extraction_strength"] < 0.5


@pytest.mark.slow
def test_they_change_nothing_in_the_run(run: tuple[Path, dict[str, Any]], study: Study, tmp_path: Path) -> None:
    """Measured at every evaluation, at the end, or never: the same model bit for bit."""
    want = final_weights(run[0])
    always = ["evaluate.metrics=[relearn, quantise, extraction_strength]", *FINAL[1:], "unlearn.evaluate_every=3"]
    for name, settings in {"never": [FINAL[2]], "always": always}.items():
        unlearn.run(study.load(tmp_path / name, *settings), say=say)
        found = final_weights(tmp_path / name)
        assert all(torch.equal(found[key], want[key]) for key in want), name
    record = journal.load(tmp_path / "always")  # measured five times, and one curve: that of the end
    scores = json.loads((tmp_path / "always" / "scores.json").read_text())["scores"]
    for step in CURVE:
        assert record.metrics[step]["relearn/forgetting"] == scores[f"relearn/step_{step}"]


@pytest.mark.slow
def test_mlflow_holds_the_curve_over_steps_of_relearning(run: tuple[Path, dict[str, Any]], study: Study) -> None:
    """Each of its steps once; the run's own steps are not counted among them."""
    folder, result = run
    known = json.loads((folder / "mlflow.json").read_text())
    client = MlflowClient(f"sqlite:///{study.folder}/mlflow.db")
    for name in ("relearn", "relearn_retain"):
        history = client.get_metric_history(known["run_id"], f"{name}/forgetting")
        assert [m.step for m in history] == sorted(CURVE)
        assert {m.step: m.value for m in history} == {s: result["scores"][f"{name}/step_{s}"] for s in CURVE}
    assert [p["step"] for p in journal.points(folder)] == [0, 4, 8, 12]


@pytest.mark.slow
def test_gru_evaluate_takes_them_by_name(run: tuple[Path, dict[str, Any]], study: Study, tmp_path: Path) -> None:
    """With the study's forget metric; the numbers are those of the run's end."""
    sets = [word for item in FINAL[1:] for word in ("--set", item)]
    model, out = str(run[0] / "model"), str(tmp_path / "out")
    names = "relearn,relearn_retain,quantise"
    done = gru(["evaluate", model, "-c", str(study.config), *sets, "--metrics", names, "--output", out, "--json"])
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)["scores"]
    assert {name.split("/")[0] for name in scores} == set(names.split(","))
    assert scores == pytest.approx({k: run[1]["scores"][k] for k in scores}, abs=1e-6)


def test_a_share_without_a_row_is_told_before_anything_is_written(study: Study, tmp_path: Path) -> None:
    settings = ["evaluate.final=[relearn]", "evaluate.relearn.share=0.01"]
    wanted = r"evaluate.relearn.share: got 0.01, allowed: enough for one of 8 forget rows"
    with pytest.raises(ConfigError, match=wanted):
        unlearn.run(study.load(tmp_path / "run", *settings), say=say)
    with pytest.raises(ConfigError, match=wanted):
        evaluate.run(
            study.load(tmp_path / "run", *settings), ["relearn"], with_text=False, track=False, overwrite=False, say=say
        )
    with pytest.raises(InputError, match="unknown metric 'relern'; did you mean 'relearn'"):
        unlearn.run(study.load(tmp_path / "run", "evaluate.final=[relern]"), say=say)
    assert not (tmp_path / "run").exists()
