"""The report of a run: its numbers are the recorded ones, nothing is unescaped, nothing is loaded, nothing is lost."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from gru_core.benchmarks import load_benchmark
from gru_core.config import BenchmarkConfig, RetainConfig, RunConfig
from gru_core.errors import InputError, StorageError
from gru_core.metrics import METRICS
from pipelines import cli, provenance, report_models, report_page, report_words
from pipelines.courier import deliver_all
from pipelines.delivery import Delivery, remembered
from pipelines.journal import Journal
from pipelines.tracking import Mlflow
from tests.mlflow_server import empty_store, free_port
from tests.report_page import END, ENDS, RETAIN, ROBUST, ROWS, START, Page, write_run


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder of its own, without a store."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def made(folder: Path, *, drawn: bool = False, **options: Any) -> tuple[dict[str, Any], Page]:
    """The document and the page of a folder; without its pictures, which take most of the time, unless they matter."""
    given = {"say": lambda line: None} | options
    with contextlib.nullcontext() if drawn else mock.patch.object(report_page, "_pictures", return_value={}):
        document = report_page.run(str(folder), **given)
    return document, Page(Path(document["report"]).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ numbers


def test_every_score_stands_in_the_page_before_after_and_of_the_retain_model(tmp_path: Path) -> None:
    document, page = made(write_run(tmp_path / "run"))
    assert document["report"] == str(tmp_path / "run" / "report.html")
    found = page.numbers("The starting model")
    start = START | {"unlearning": 0.0, "retention": 1.0}
    stored = json.loads((tmp_path / "run" / "scores.json").read_text())["scores"]
    assert found == {
        name.replace("_", " "): [start.get(name), value, RETAIN.get(name)] for name, value in stored.items()
    }
    assert stored == END | ENDS
    assert list(found)[:2] == ["unlearning", "retention"]
    for shown in ("0.2857", "1.50e-17", "-61.2500", "73% is gone", "96% of the starting model"):
        assert shown in page.text
    assert {tuple(row[-1] for row in page.table("The starting model")[1:])} == {
        ("higher is better",) * 2
        + ("lower is better",)
        + ("higher is better",)
        + ("nearest 0",)
        + ("higher is better",)
    }


def test_rows_settings_and_conflicts_are_those_of_the_record(tmp_path: Path) -> None:
    document, page = made(write_run(tmp_path / "run"), drawn=True)
    rows = page.table("Rows of data")[1:]
    assert [row[1] for row in rows] == ["40", "3,600", "400", "40", "41"]
    assert [row[2] for row in rows] == [
        f"{0:064x}", f"{1:064x}", "a part of the above, drawn by the seed", f"{3:064x}", f"{4:064x}",
    ]  # fmt: skip
    assert len(rows) == len(ROWS)
    settings = {row[0]: row[1:] for row in page.table("The settings that matter")[1:]}
    assert settings["unlearn.lr"] == ["0.0003", "1e-05"]
    assert settings["retain.size"] == ["400", "1.0"]  # a share of 1.0 is not one row
    assert settings["unlearn.objective"] == ["npo", "npo"]
    assert "unlearn.clip" not in settings
    assert (document["course"]["conflicts"], document["course"]["measured"]) == (5, 20)
    assert "5 of 20 steps (25%)" in page.text
    assert "1,234,567 parameters, of which all were trained" in page.text


def test_a_part_that_is_almost_nothing_or_almost_all_does_not_read_as_such() -> None:
    from pipelines.report_text import percent

    assert [percent(x) for x in (0.0, 0.004, 0.5, 0.996, 1.0)] == ["0%", "less than 1%", "50%", "more than 99%", "100%"]


def test_every_metric_has_words_of_its_own() -> None:
    names = [*METRICS, *(extra for metric in METRICS.values() for extra in metric.derived)]
    assert set(names) <= set(report_words.SCORES)
    for name, metric in METRICS.items():
        good = {"forget": report_words.LOWER, "utility": report_words.HIGHER}.get(metric.role)
        assert good in (None, report_words.score(name).good), name
    assert report_words.score("relearn/step_3") == report_words.SCORES["relearn"]
    assert report_words.score("quantise/4_bit") == report_words.SCORES["quantise"]
    for name in ("relearn/retention", "quantise/4_bit_retention"):
        assert report_words.score(name).good == report_words.HIGHER
    assert report_words.score("relearn/loss").good == ""
    assert "mmlu" in report_words.score("lm_eval:mmlu/stderr").meaning
    assert report_words.score("something new").good == ""


# ------------------------------------------------------------------------------------------------ robustness


def test_robustness_is_drawn_from_what_was_measured(tmp_path: Path) -> None:
    document, page = made(write_run(tmp_path / "run", robust=True), drawn=True)
    found = document["robustness"]
    end = END["extraction_strength"]
    assert found["curves"] == {
        "relearn": {"model": [(0, end), (5, 0.45), (20, 0.8)], "retain_model": []},
        "relearn_retain": {"model": [(0, end), (10, 0.3125)], "retain_model": []},
    }
    assert found["bits"] == [(8, 0.29), (4, 0.55)]
    assert (found["start"], found["end"], found["retain"]) == (0.9, end, 0.0625)
    assert page.numbers("Scores of these trials") == {
        name.replace("_", " "): [None, value] for name, value in ROBUST.items()
    }
    assert not set(ROBUST) & {row["name"] for row in document["scores"]}
    labels = [attrs.get("aria-label") or "" for tag, attrs in page.tags if tag == "svg"]
    assert any("trained again: 0.286 after 0, 0.450 after 5, 0.800 after 20 steps" in label for label in labels)
    assert any("as trained 0.286, 8 bit 0.290, 4 bit 0.550" in label for label in labels)
    assert "evaluate.final" not in page.text.split("Settings")[0]


def test_robustness_that_was_not_measured_is_said_and_how_to_have_it(tmp_path: Path) -> None:
    _, page = made(write_run(tmp_path / "run"))
    assert "This was not evaluated" in page.text
    assert "--set evaluate.final=[relearn,relearn_retain,quantise]" in page.text
    assert "Nothing of the kind was tried here" in page.text


# ------------------------------------------------------------------------------------------------ how it ended


@pytest.mark.parametrize(
    ("status", "word", "text"),
    [
        ("stopped", "stopped", "can go on (--resume)"),
        ("collapsed", "collapsed", "Its model is not one to use."),
        ("failed", "failed", "It failed before its end"),
        ("non_finite", "failed: not a number", "no finite number"),
        (None, "not ended", "had not ended when this report was made"),
    ],
)
def test_how_a_run_ended_is_said(tmp_path: Path, status: str | None, word: str, text: str) -> None:
    document, page = made(write_run(tmp_path / "run", status=status, steps=8))
    assert document["outcome"]["word"] == word
    assert text in page.text
    assert "of 20 planned" in page.text
    assert ("span", {"class": "status bad"}) in page.tags
    assert ("side effect of that, and not forgetting" in page.text) == (status == "collapsed")


def test_a_run_without_an_evaluation_says_so(tmp_path: Path) -> None:
    document, page = made(write_run(tmp_path / "run", evaluated=False, status="failed"))
    assert document["step"] is None
    assert "was not evaluated yet" in page.text
    assert "Nothing was evaluated." in page.text


def test_notes_and_what_weakens_the_numbers_are_said(tmp_path: Path) -> None:
    note = "started again with 2 workers, from step 10 on"
    tags = {"gru.include_scored": "true"}
    _, page = made(write_run(tmp_path / "run", notes=(note, "checkpoint x is damaged"), tags=tags, retain=False))
    for said in (
        note,
        "checkpoint x is damaged",
        "(retain.include_scored",
        "no model that never saw the rows to forget",
    ):
        assert said in page.text
    assert "Nothing out of the ordinary" not in page.text
    _, page = made(write_run(tmp_path / "other"))
    for unsaid in ("retain.include_scored", "no model that never saw the rows to forget"):
        assert unsaid not in page.text
    assert "Nothing out of the ordinary" in page.text


# ------------------------------------------------------------------------------------------------ a safe page


def test_the_page_needs_nothing_and_runs_nothing(tmp_path: Path) -> None:
    _, page = made(write_run(tmp_path / "run", robust=True), drawn=True)
    assert "http" not in re.sub(r"https?</", "", page.source)
    assert not {"script", "link", "iframe", "img", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert not any(name.startswith("on") or name == "src" for name in attrs)
        assert all((attrs.get(name) or "#").startswith("#") for name in ("href", "xlink:href"))
    assert not re.search(r"url\((?!#)|@import", page.source)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page.source))
    assert named <= set(ids)


def test_the_page_can_be_read_aloud(tmp_path: Path) -> None:
    _, page = made(write_run(tmp_path / "run", robust=True), drawn=True)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    pictures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(pictures) == 6
    assert all(attrs["role"] == "img" and len(attrs["aria-label"] or "") > 30 for attrs in pictures)
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags


HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)> {{ 7*7 }} $\\frac$ \ud800 ' + "long" * 200


def test_hostile_names_are_text(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", name=HOSTILE, notes=(HOSTILE,), tags={"gru.benchmark": HOSTILE, "gru.versions.x": HOSTILE},
        values={"model.path": HOSTILE[:-801].replace("\ud800", ""), "model.chat_date": "</pre><script>x</script>"},
        robust=True,
    )  # fmt: skip
    _, page = made(folder, drawn=True)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script>") >= 4
    assert "{{ 7*7 }}" in page.text
    assert "</pre><script>x</script>" in page.text


def test_secrets_of_a_config_are_not_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    config = folder / "config.yaml"
    config.write_text(config.read_text() + "# http://me:planted-secret@host/x?token=planted-token\n")
    document, page = made(folder)
    assert "http://host/x" in page.text
    assert "planted" not in page.source + json.dumps(document)


# ------------------------------------------------------------------------------------------------ files


def test_the_same_records_give_the_same_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", robust=True)
    _, first = made(folder, output=str(tmp_path / "a.html"), drawn=True)
    monkeypatch.setattr("time.time", lambda: 4e9)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    _, second = made(folder, output=str(tmp_path / "b.html"), drawn=True)
    assert first.source == second.source


def test_a_page_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run")
    made(folder)
    before = (folder / "report.html").read_bytes()
    names = {path.name for path in folder.iterdir()}

    def full(self: Path, *_: Any, **__: Any) -> None:
        self.write_bytes(b"<!doctype")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match=r"report cannot be written to .*report.html: No space left"):
        made(folder)
    assert (folder / "report.html").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == names


def test_what_is_no_page_of_ours_is_not_replaced(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (tmp_path / "thesis.html").write_text("<!doctype html><p>years")
    with pytest.raises(InputError, match=r"thesis.html exists and is no page of gru"):
        made(folder, output=str(tmp_path / "thesis.html"))
    with pytest.raises(InputError, match="a folder, allowed: a file"):
        made(folder, output=str(tmp_path))
    assert not (folder / "report.html").exists()
    made(folder, output=str(tmp_path / "new" / "page.html"))
    made(folder, output=str(tmp_path / "new" / "page.html"))


def test_one_of_several_requests_is_a_run(tmp_path: Path) -> None:
    made(write_run(tmp_path / "01-forget01", tags={"gru.kind": "request"}))
    assert (tmp_path / "01-forget01" / "report.html").exists()


def test_without_a_retain_model_forgetting_ends_at_what_guessing_scores(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", retain=False, values={"evaluate.unlearning": "lm_eval:wmdp_cyber"})
    with Journal(folder) as journal:
        journal.metrics(0, {"eval/lm_eval:wmdp_cyber/chance": 0.25})
    made(folder)
    text = (folder / "report.html").read_text()
    assert "above guessing (0.25)" in text
    assert "the forget metric is what guessing scores (0.25)" in text


@pytest.mark.parametrize("kind", ["evaluation", None])
def test_what_is_no_run_is_refused_in_one_line(
    tmp_path: Path, kind: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "x", tags={"gru.kind": kind or ""})
    for source in (folder, tmp_path / "nothing", tmp_path):
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", str(source)])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.rglob("report*.html"))


def test_the_command_prints_one_document(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    before = dict(os.environ)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", str(folder), "--json"])
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert not ended.value.code
    document = json.loads(capfd.readouterr().out)
    assert {row["name"]: row["after"] for row in document["scores"]} == END | ENDS
    assert document["make"]["commands"][0].startswith(f"gru unlearn -c {folder}/config.yaml --output runs/a-run-again")
    assert not document["in_mlflow"]


# ------------------------------------------------------------------------------------------------ models and rows


def test_models_are_told_by_shape_size_and_hash(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    parts = [{"a": torch.zeros(3, 5), "b": torch.zeros(())}, {"c": torch.zeros(7, dtype=torch.bfloat16)}]
    for place, tensors in enumerate(parts):
        save_file(tensors, folder / f"model-{place}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 96, "vocab_size": 10}))
    found = report_models.describe(str(folder), lambda line: None)
    assert found is not None
    assert found["parameters"] == 15 + 1 + 7
    assert found["shape"] == {"kind": "llama", "width": 96, "vocabulary": 10}
    assert [file["sha256"] for file in found["files"]] == [
        hashlib.sha256((folder / f"model-{place}.safetensors").read_bytes()).hexdigest() for place in range(2)
    ]
    gone = report_models.describe("owner/hub-id", lambda line: None)
    assert gone is not None
    assert not gone["here"]
    assert report_models.describe(None, lambda line: None) is None


def test_rows_are_named_by_hashes_that_others_can_compute(tmp_path: Path) -> None:
    forget = [{"question": "who?", "answer": "Zoë"}, {"question": "where?", "answer": "here"}]
    retain = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]
    for name, rows in (("forget", forget), ("retain", retain)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = BenchmarkConfig("jsonl", forget=str(tmp_path / "forget.jsonl"), retain=str(tmp_path / "retain.jsonl"))
    model = torch.nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    config = RunConfig(benchmark=data, retain=RetainConfig(size=2, include_scored=True))
    found = provenance.inputs(model, load_benchmark(data), config)
    by_hand = hashlib.sha256('["who?", "Zoë"]\n["where?", "here"]\n'.encode()).hexdigest()
    assert found["gru.sha256.forget"] == by_hand
    assert {key: found[f"gru.rows.{key}"] for key in ("forget", "retain", "retain.trained")} == {
        "forget": "2", "retain": "5", "retain.trained": "2",
    }  # fmt: skip
    assert (found["gru.parameters"], found["gru.parameters.trained"]) == ("15", "12")
    forget[1]["answer"] = "there"
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in forget))
    other = provenance.inputs(model, load_benchmark(data), config)
    changed = {key for key in found if found[key] != other[key]}
    assert changed == {"gru.sha256.forget", "gru.sha256.scored.forget"}


# ------------------------------------------------------------------------------------------------ MLflow


@pytest.mark.slow
def test_a_run_from_mlflow_alone_reads_as_from_its_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", robust=True, notes=("started again, from step 4 on", "and once more"))
    delivery = Delivery(Mlflow(empty_store(tmp_path / "mlflow.db")), "study")
    deliver_all(delivery, folder)
    run_id = remembered(folder)["run_id"]
    local, _ = made(folder, tracking_uri=delivery.store.uri, drawn=True)
    assert local["in_mlflow"]
    assert "report.html" in [each.path for each in delivery.store.client.list_artifacts(run_id)]
    remote, page = made(Path(run_id), tracking_uri=delivery.store.uri, drawn=True)
    assert remote["report"] == "report-a-run.html"
    assert remote["in_mlflow"]
    same = ("lead", "data", "settings", "scores", "robustness", "course", "limits", "parameters", "point", "step")
    assert {key: remote[key] for key in same} == {key: local[key] for key in same}
    assert remote["outcome"]["notes"] == local["outcome"]["notes"]
    assert remote["outcome"]["status"] == "finished"
    assert "mlflow artifacts download" in page.text
    assert "unlearn.steps: 20" in page.text


def test_without_mlflow_the_page_is_written_and_it_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    address = f"http://127.0.0.1:{free_port()}"
    stored = {"uri": address, "experiment": "x", "run_id": "0" * 32}
    (folder / "mlflow.json").write_text(json.dumps(stored))
    said: list[str] = []
    document, _ = made(folder, say=said.append)
    assert not document["in_mlflow"]
    assert [line for line in said if "cannot be reached" in line]
    with pytest.raises(InputError, match="cannot be reached"):
        made(folder, tracking_uri=address)
