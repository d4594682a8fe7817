"""Several forget sets: each from the same start, or one after the other; on MUSE's layout with tiny models."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gru_core.benchmarks import load_benchmark
from gru_core.config import BenchmarkConfig, RunConfig
from gru_core.errors import InputError
from pipelines import prepare, requests, requests_files, settings, unlearn, worker
from pipelines import request as submitted
from tests.muse_files import write_muse
from tests.study import final_weights, gru

SPLITS = ["news/scal_1", "news/scal_2"]

CONFIG = """
benchmark: {name: muse, data_dir: FOLDER/data, split: news}
requests: {splits: [news/scal_1, news/scal_2], sequential: true}
model: {path: prepared}
retain_model: prepared
prepare: {hidden: 48, heads: 2, intermediate: 96, steps: 240, batch_size: 16, lr: 1.0e-2}
unlearn: {objective: npo, steps: 4, batch_size: 4, lr: 1.0e-3, evaluate_every: 2}
train: {checkpoint_every: 2}
evaluate:
  metrics: [extraction_strength, retain_extraction_strength, privleak]
  unlearning: extraction_strength
  retention: retain_extraction_strength
track: {experiment: requests, uri: "sqlite:///FOLDER/mlflow.db"}
output: {dir: FOLDER/out}
"""


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of data, ``study.yaml`` and prepared models."""
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("requests")
    write_muse(folder / "data")
    (folder / "study.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    os.environ["GRU_CACHE"] = str(folder / "cache")
    yield folder
    os.environ.clear()
    os.environ.update(before)


def load(study: Path, output: Path, *overrides: str) -> RunConfig:
    return settings.load(str(study / "study.yaml"), [f"output.dir={output}", *overrides])


def evaluation(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "evaluations" / f"step-{step:08d}.json").read_text())


# ---- what is refused, before anything is written


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["requests.splits=[]"], "requests.splits: got [], allowed: at least one value of benchmark.split"),
        (["requests.splits=[news/scal_1, news/scal_9]"], "requests.splits: news/scal_9: unknown split of"),
        (["requests.splits=[news, news]"], "requests.splits: got ['news', 'news'], allowed: values of benchmark.split"),
        (["model.lora={rank: 2}"], "output.merged: got False, allowed: true with model.lora and requests.sequential"),
        (["output.storage=s3://bucket/here"], "output.storage: got 's3://bucket/here', allowed: null"),
        (["requests.splits=[news/sust_1, news/sust_2]"], "model.path, retain_model: prepared models fit one split"),
        (["benchmark.name=jsonl"], "requests.splits: news/scal_1: benchmark.split: got 'news/scal_1'"),
        (["evaluate.unlearning=forget_rouges"], "forget_rouges"),
        (["requests.passes=0"], "requests.passes: got 0.0, allowed: null or a number above 0"),
        (["requests.passes=1", "unlearn.warmup=3"], "news/scal_1: unlearn.warmup: got 3, allowed: 0 to"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(study: Path, tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        requests.run(load(study, tmp_path / "out", *overrides), say=quiet)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_widest_split_contains_the_others() -> None:
    found = {split: load_benchmark(BenchmarkConfig(split=split)) for split in ("forget05", "forget10", "forget01")}
    assert requests.widest(found) == "forget10"
    assert requests.widest({"forget01": found["forget01"]}) == "forget01"


def test_each_request_is_the_config_of_a_single_run(study: Path, tmp_path: Path) -> None:
    """In a sequence a later request starts from what the one before left, and counts from the first one's start."""
    config = load(study, tmp_path, "model.path=/models/target", "retain_model=null")
    one, two = (requests.Request(n, f"0{n}", split, 5) for n, split in enumerate(SPLITS, start=1))
    first = requests._config(config, one, tmp_path / "one", "/models/target")
    later = requests._config(config, two, tmp_path / "two", "/left")
    assert (first.model.path, first.evaluate.start, first.benchmark.split) == ("/models/target", None, "news/scal_1")
    assert (later.model.path, later.evaluate.start, later.benchmark.split) == ("/left", "/models/target", "news/scal_2")
    assert later.requests.splits == ()
    assert later.unlearn.steps == 4
    passes = settings.with_values(config, {"requests.passes": 2.5})
    assert requests._config(passes, two, tmp_path / "two", "/left").unlearn.steps == 4  # 5 rows x 2.5 / 4, rounded up
    twice = requests.Request(3, "03", "news/scal_3", 10)
    assert requests._config(passes, twice, tmp_path / "three", "/left").unlearn.steps == 7
    apart = settings.with_values(config, {"requests.sequential": False})
    assert requests._config(apart, two, tmp_path / "two", "/models/target").evaluate.start is None


# ---- table and picture


DOCUMENT = {
    "requests": "runs/r", "sequential": False, "axes": {"unlearning": "forget_verbmem", "retention": "retain_knowmem"},
    "tracking_uri": "sqlite:///mlflow.db", "artifacts": {},
    "points": [
        {"request": n, "split": f"news/scal_{n}", "forget_rows": 889 * n, "status": "finished", "steps": 28,
         "unlearning": 0.5, "retention": 1 / n, "privleak": -3.0 * n}
        for n in (1, 2)
    ],
}  # fmt: skip


def test_files_of_a_study(tmp_path: Path) -> None:
    files = requests_files.write(DOCUMENT, tmp_path)
    with Path(files["csv"]).open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == [*requests_files.GIVEN, "unlearning", "retention", "privleak"]
    assert [float(row["retention"]) for row in table] == [1.0, 0.5]
    assert json.loads(Path(files["json"]).read_text())["points"] == DOCUMENT["points"]
    assert Path(files["png"]).read_bytes()[:4] == b"\x89PNG"
    assert requests_files.axis(DOCUMENT)[0] == "forget_rows"
    assert requests_files.axis({**DOCUMENT, "sequential": True})[0] == "request"


def test_a_wide_table_says_what_it_leaves_out() -> None:
    points = [{**point, **{f"a_metric_with_a_name_{i}": 0.5 for i in range(9)}} for point in DOCUMENT["points"]]
    lines = requests_files.lines({**DOCUMENT, "points": points})
    assert max(map(len, lines)) <= 140
    assert any("more scores: see the csv" in line for line in lines)
    assert "each from the same start" in lines[0]


# ---- as a job


def test_a_job_takes_the_files_of_all_its_requests(study: Path, tmp_path: Path) -> None:
    from pipelines import package

    words = ["-c", str(study / "study.yaml"), "--output", str(tmp_path / "out"), "--json"]
    asked = submitted.parse(["requests", *words])
    submitted.check_data(asked)
    assert (asked.command, asked.config.requests.splits, asked.flags) == ("requests", tuple(SPLITS), ("--json",))
    sent = {name for item in package.find_inputs(asked.config) for name in item.files}
    assert {"scal/forget_1.jsonl", "scal/forget_2.jsonl", "raw/retain1.jsonl", "knowmem/forget_qa_icl.jsonl"} <= sent
    assert not any(name.startswith(("sust/", "scal/forget_3", "raw/forget")) for name in sent)
    single = submitted.parse(["unlearn", *words])
    assert single.config.requests.splits == ()
    package.build(asked.config, tmp_path)
    assert (tmp_path / "inputs" / "benchmark.data_dir" / "scal" / "forget_2.jsonl").is_file()
    with pytest.raises(InputError, match=r"requests\.splits: got"):
        submitted.parse(["requests", *words, "--set", "requests.splits=[]"])


# ---- whole studies


@pytest.fixture(scope="module")
def calm(study: Path) -> Path:
    """A finished sequence of two requests, from the command line."""
    folder = study / "calm"
    done = gru(["requests", "-c", str(study / "study.yaml"), "--output", str(folder), "--json"])
    assert done.returncode == 0, done.stderr
    (study / "document.json").write_text(done.stdout)
    return folder


@pytest.mark.slow
def test_a_sequence_goes_on_from_what_was_left(study: Path, calm: Path) -> None:
    one, two = (calm / "requests" / name for name in ("01-news-scal_1", "02-news-scal_2"))
    document = json.loads((study / "document.json").read_text())
    assert [point["forget_rows"] for point in document["points"]] == [5, 10]
    assert [point["status"] for point in document["points"]] == ["finished", "finished"]
    config = settings.load(str(two / "config.yaml"))
    assert (config.model.path, config.requests.splits) == (str(one / "model"), ())
    assert config.evaluate.start == settings.load(str(one / "config.yaml")).model.path
    # MUSE scores every forget set with the same rows: the second request begins where the first one ended
    assert evaluation(two, 0)["trade_off"] == pytest.approx(evaluation(one, 4)["trade_off"], abs=1e-6)
    assert evaluation(one, 0)["trade_off"]["unlearning"] == 0 < evaluation(two, 0)["trade_off"]["unlearning"]
    starts = [json.loads((folder / "baseline.json").read_text())["start"]["scores"] for folder in (one, two)]
    assert starts[0] == pytest.approx(starts[1])
    last = evaluation(two, 4)
    assert document["points"][1]["privleak"] == last["scores"]["privleak"]
    for kind in ("csv", "json", "png"):
        assert Path(document["artifacts"][kind]).is_file()
    told = [f for f in calm.rglob("*") if f.suffix in (".json", ".jsonl", ".yaml", ".csv") and f.parent.name != "model"]
    assert len(told) > 10
    assert not any("forget part 1 0 says" in file.read_text() for file in told), "ids and numbers, no texts"


@pytest.mark.slow
def test_one_parent_run_with_a_child_for_each_request(study: Path, calm: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{study}/mlflow.db")
    document = json.loads((study / "document.json").read_text())
    parent = client.get_run(document["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["gru.kind"] == "requests"
    curve = client.get_metric_history(parent.info.run_id, "eval/unlearning")
    assert [(point.step, point.value) for point in curve] == [
        (n, pytest.approx(point["unlearning"])) for n, point in enumerate(document["points"], start=1)
    ]
    assert {"requests.csv", "requests.json", "requests.png"} <= {
        a.path for a in client.list_artifacts(parent.info.run_id)
    }
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=10
    )
    assert {run.data.tags["gru.split"] for run in found} == set(SPLITS)
    assert {run.info.status for run in found} == {"FINISHED"}
    everything = client.search_runs([parent.info.experiment_id], max_results=50)
    assert len(everything) == 3, "no request is recorded a second time, on its own"


@pytest.mark.slow
def test_a_stopped_study_goes_on(study: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at the second request: --resume keeps the first as it is, and ends where a calm study does."""
    given = unlearn.run
    started = []

    def interrupted(config: RunConfig, **options: Any) -> dict[str, Any]:
        started.append(config.benchmark.split)
        if len(started) == 2:
            raise KeyboardInterrupt
        return given(config, **options)

    monkeypatch.setattr(unlearn, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        requests.run(load(study, tmp_path / "out"), say=quiet)
    weights = tmp_path / "out" / "requests" / "01-news-scal_1" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    with pytest.raises(InputError, match=r"started with other settings: requests.splits"):
        requests.run(load(study, tmp_path / "out", "requests.splits=[news/scal_2]"), resume=True, say=quiet)
    document = requests.run(load(study, tmp_path / "out"), resume=True, say=quiet)
    assert started == ["news/scal_1", "news/scal_2", "news/scal_2"]
    assert weights.stat().st_mtime_ns == written
    mine, theirs = (final_weights(f / "requests" / "02-news-scal_2") for f in (tmp_path / "out", calm))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [p["unlearning"] for p in document["points"]] == [
        p["unlearning"] for p in json.loads((calm / "requests.json").read_text())["points"]
    ]


@pytest.mark.slow
def test_requests_from_the_same_start_are_runs_of_their_own(study: Path, calm: Path, tmp_path: Path) -> None:
    """Scalability: the second request is the run that gru unlearn makes of its split, from the same target."""
    apart = load(study, tmp_path / "out", "requests.sequential=false")
    document = requests.run(apart, say=quiet)
    mine = tmp_path / "out" / "requests" / "02-news-scal_2"
    target = prepare.folders(requests.with_split(apart, "news/scal_2"))
    alone = load(study, tmp_path / "alone", "benchmark.split=news/scal_2", "requests.splits=[]")
    result = unlearn.run(
        settings.with_values(alone, {"model.path": str(target.target), "retain_model": str(target.retain)}), say=quiet
    )
    ours, theirs = final_weights(mine), final_weights(tmp_path / "alone")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert document["points"][1]["unlearning"] == result["scores"]["unlearning"]
    assert evaluation(mine, 0)["trade_off"]["unlearning"] == 0
    assert (mine.parent / "01-news-scal_1" / "scores.json").read_text() == (
        calm / "requests" / "01-news-scal_1" / "scores.json"
    ).read_text(), "the first request does not depend on how the others start"


@pytest.mark.slow
def test_adapters_go_on_from_what_they_were_merged_into(study: Path, calm: Path, tmp_path: Path) -> None:
    lora = ["model.lora={rank: 2}", "output.merged=true", "unlearn.steps=2"]
    requests.run(load(study, tmp_path / "out", *lora), say=quiet)
    one, two = (tmp_path / "out" / "requests" / name for name in ("01-news-scal_1", "02-news-scal_2"))
    assert settings.load(str(two / "config.yaml")).model.path == str(one / "merged")
    assert evaluation(two, 0)["trade_off"] == pytest.approx(evaluation(one, 2)["trade_off"], abs=1e-4)


@pytest.mark.slow
def test_a_sequence_ends_where_no_model_is_left(
    study: Path, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is not finite: a sequence stops there and says where; from the same start the rest goes on."""
    given = worker.work

    def broken(config: RunConfig, folder: Path, **options: Any) -> Any:
        if folder.name.startswith("01"):
            folder.mkdir(parents=True, exist_ok=True)
            lost = {"status": "non_finite", "steps": 1, "scores": {"unlearning": 0.0, "retention": 1.0}, "points": []}
            (folder / "scores.json").write_text(json.dumps({**lost, "error": "step 2: the forget loss is nan"}))
        return given(config, folder, **options)

    monkeypatch.setattr(worker, "work", broken)
    with pytest.raises(RuntimeError, match=r"request 1 \(news/scal_1\) left no model: step 2: the forget loss is nan"):
        requests.run(load(study, tmp_path / "sequence"), say=quiet)
    document = requests.run(load(study, tmp_path / "apart", "requests.sequential=false"), say=quiet)
    assert [point["status"] for point in document["points"]] == ["non_finite", "finished"]
