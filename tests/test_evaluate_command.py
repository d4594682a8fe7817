"""``gru evaluate``: models and published logs, files, refusals, a tracked run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from gru_core.metrics import METRICS, measure
from gru_core.metrics.rouge import rouge_l_recall
from pipelines import cli
from tests.study import Study

Gru = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gru(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gru:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["evaluate", *arguments])
        return (int(ended.value.code or 0), *capfd.readouterr())

    monkeypatch.chdir(tmp_path)
    return call


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_model_on_own_data(study: Study, gru: Gru, tmp_path: Path) -> None:
    code, out, err = gru("-c", str(study.config), "--json", "--output", "one", "--set", "evaluate.max_new_tokens=12")
    assert code == 0, err
    document = json.loads(out)
    assert document == json.loads((tmp_path / "one" / "summary.json").read_text()) | {
        "folder": str(tmp_path / "one"), "run_id": None,
    }  # fmt: skip
    scores, retain = document["scores"], document["retain_scores"]
    assert scores["extraction_strength"] > 0.5 > 0.3 > retain["extraction_strength"]
    assert document["rows"] == {"forget": 8, "retain": 6}
    # what the data cannot tell is left out and said, never zero
    missing = set(METRICS) - set(scores)
    assert {"forget_truth_ratio", "forget_quality", "privleak", "mia_loss", "authors_rouge"} <= missing
    for name in missing:
        assert any(
            note.startswith(f"left out: {name} cannot be computed on jsonl/forget") for note in document["notes"]
        )
    rows = lines(tmp_path / "one" / "rows.jsonl")
    assert [(row["set"], row["id"]) for row in rows][:2] == [("forget", "forget:1"), ("forget", "forget:2")]
    assert len(rows) == len(lines(tmp_path / "one" / "retain_rows.jsonl")) == 14
    strengths = [1 - row["hits"][1] / row["hits"][2] for row in rows if row["set"] == "forget"]
    assert scores["extraction_strength"] == pytest.approx(sum(strengths) / 8)
    forget = [json.loads(line) for line in (study.folder / "forget.jsonl").read_text().splitlines()]
    for file in (tmp_path / "one").iterdir():
        assert forget[0]["question"] not in file.read_text(), file
        assert forget[0]["answer"] not in file.read_text(), file
    assert forget[0]["answer"] not in out + err


def test_texts_and_chosen_metrics_on_request(study: Study, gru: Gru, tmp_path: Path) -> None:
    asked = ["--metrics", "forget_rouge,extraction_strength", "--with-text", "--set", "evaluate.max_new_tokens=12"]
    code, out, err = gru("-c", str(study.config), "--output", "two", *asked)
    assert code == 0, err
    assert "retain model" in out
    assert set(json.loads((tmp_path / "two" / "summary.json").read_text())["scores"]) == {
        "forget_rouge", "extraction_strength",
    }  # fmt: skip
    known = {row["question"]: row["answer"] for row in lines(study.folder / "forget.jsonl")}
    rows = [row for row in lines(tmp_path / "two" / "rows.jsonl") if row["set"] == "forget"]
    assert {row["text"]["prompt"]: row["text"]["answer"] for row in rows} == known
    assert len({row["rouge"] for row in rows}) > 2
    for row in rows:
        assert row["rouge"] == rouge_l_recall(row["text"]["answer"], row["text"]["generation"])


def test_an_interrupted_one_goes_on_by_row(
    study: Study, gru: Gru, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["-c", str(study.config), "--metrics", "forget_rouge,retain_probability", "--set", "evaluate.batch_rows=2"]
    asked += ["--set", "evaluate.max_new_tokens=6"]
    assert gru(*asked, "--output", "whole")[0] == 0
    parts: list[int] = []
    work = measure._measure_part

    def part(scorer: Any, tokenizer: Any, tasks: Any, *rest: Any) -> Any:
        if len(parts) == 9:  # the retain model has 14 rows, and so has the model
            raise KeyboardInterrupt
        parts.append(len(tasks))
        return work(scorer, tokenizer, tasks, *rest)

    monkeypatch.setattr(measure, "PARTS", 1)
    monkeypatch.setattr(measure, "_measure_part", part)
    code, _, err = gru(*asked, "--output", "cut")
    assert code == 130, err
    assert not (tmp_path / "cut" / "summary.json").exists()
    code, _, err = gru(*asked, "--output", "cut")
    assert (code, "--resume continues it" in err) == (2, True)
    done, parts = sum(parts), [0] * 10
    assert gru(*asked, "--output", "cut", "--resume")[0] == 0
    assert done + sum(parts) == 2 * 14
    assert done > 14, "it was the second model"
    whole, cut = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut"))
    assert cut["scores"] == pytest.approx(whole["scores"], rel=1e-6)
    assert cut["retain_scores"] == pytest.approx(whole["retain_scores"], rel=1e-6)
    assert not (tmp_path / "cut" / ".evaluating").exists()


def test_it_is_a_point_beside_the_runs_of_an_experiment(study: Study, gru: Gru, shared_data: Path) -> None:
    logs = shared_data / "tofu_eval_logs"
    full, retain = (logs / f"llama-3.2-1b_{n}" / "TOFU_EVAL.json" for n in ("full_forget10", "retain90"))
    store = f"sqlite:///{study.folder}/logs.db"
    common = ["--retain-log", str(retain), "--start-log", str(full), "--experiment", "logs", "--tracking-uri", store]
    points = {}
    for name, log in (("start", full), ("end", retain)):
        code, out, err = gru("--from-log", str(log), *common, "--output", name, "--json")
        assert code == 0, err
        run = MlflowClient(store).get_run(json.loads(out)["run_id"])
        assert run.data.tags["gru.kind"] == "evaluation"
        points[name] = [run.data.metrics[f"eval/{axis}"] for axis in ("unlearning", "retention")]
        assert run.data.metrics["eval/model_utility"] == json.loads(out)["scores"]["model_utility"]
    assert points == {"start": [0, 1], "end": [1, pytest.approx(0.5911246639353407 / 0.5991534707368931)]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "got neither MODEL nor --from-log"),
        (["model", "--from-log", "x"], "MODEL: not with --from-log"),
        (["model", "--retain-log", "x"], "--retain-log: only with --from-log"),
        (["--from-log", "x", "--resume"], "--resume: not with --from-log"),
        (["--from-log", "x", "--with-text"], "--with-text: not with --from-log"),
        (["--from-log", "nowhere.json"], "nowhere.json: cannot be read"),
        (["nowhere", "--benchmark", "authors"], "MODEL"),
        (["nowhere", "--benchmark", "tofoo"], "unknown benchmark 'tofoo'"),
        (["nowhere", "--tracking-uri", "sqlite:///x.db"], "--tracking-uri: only with --experiment"),
        (["-c", "demo", "--metrics", "privleek"], "unknown metric 'privleek'; did you mean 'privleak'"),
        (["-c", "demo", "--metrics", "privleak"], "privleak cannot be computed on authors"),
        (["-c", "demo", "--metrics", ","], "evaluate.metrics: got ()"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(gru: Gru, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, out, err = gru(*arguments)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_result_is_replaced_only_when_asked(shared_data: Path, gru: Gru) -> None:
    log = ["--from-log", str(shared_data / "tofu_eval_logs" / "phi-1_5_full" / "eval_log_aggregated.json")]
    assert gru(*log)[0] == 0
    code, _, err = gru(*log)
    assert (code, "evaluation is not empty" in err) == (2, True)
    assert gru(*log, "--overwrite")[0] == 0
