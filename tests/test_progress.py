"""An interrupted evaluation goes on with the rows that are left, to the same last bit."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from gru_core.config import EvaluateConfig, ModelConfig
from gru_core.metrics import MODEL_METRICS, Evaluation, ModelMetric, Progress, evaluate, measure
from gru_core.parallel import Group
from tests import small
from tests.test_evaluate import OURS, Threads, qa_benchmark

EVERYTHING = EvaluateConfig(metrics=OURS, max_new_tokens=6, batch_rows=2)
ROWS = 35
"""Of all five sets together."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PARTS", 2)  # of 4 rows


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small.model().eval()


def run(model: nn.Module, progress: Progress | None, config: EvaluateConfig = EVERYTHING, **more: Any) -> Evaluation:
    return evaluate(model, small.tokenizer(), qa_benchmark(), config, ModelConfig(), progress=progress, **more)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Rows of each part that is measured from now on; after so many parts comes Ctrl-C."""
    whole = measure._measure_part

    def watch(parts: int | None) -> list[int]:
        seen: list[int] = []

        def part(scorer: Any, tokenizer: Any, tasks: Any, *rest: Any) -> Any:
            if parts is not None and len(seen) == parts:
                raise KeyboardInterrupt
            seen.append(len(tasks))
            return whole(scorer, tokenizer, tasks, *rest)

        monkeypatch.setattr(measure, "_measure_part", part)
        return seen

    return watch


def test_it_goes_on_behind_the_last_part(model, measured, tmp_path: Path) -> None:
    expected = run(model, None)
    measured(3)
    with pytest.raises(KeyboardInterrupt):
        run(model, Progress(tmp_path / "kept", "step 5", Group()))
    seen = measured(None)
    progress = Progress(tmp_path / "kept", "step 5", Group())
    assert run(model, progress) == expected  # to the last bit
    assert sum(seen) == ROWS - 3 * 4
    seen.clear()
    assert run(model, progress) == expected
    assert sum(seen) == 0, "complete, and nothing was dropped yet"
    progress.drop()
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("other", ["key", "settings", "rows", "text"])
def test_what_is_of_another_evaluation_does_not_count(model, measured, tmp_path: Path, other: str) -> None:
    measured(3)
    with pytest.raises(KeyboardInterrupt):
        run(model, Progress(tmp_path, "step 5", Group()))
    seen = measured(None)
    key, config, more = "step 5", EVERYTHING, {}
    if other == "key":
        key = "step 6"
    elif other == "settings":
        config = replace(EVERYTHING, max_new_tokens=7)
    elif other == "rows":
        config = replace(EVERYTHING, rows=6)
    else:
        more = {"texts": True}
    assert run(model, Progress(tmp_path, key, Group()), config, **more) == run(model, None, config, **more)
    assert sum(seen) == 2 * (30 if other == "rows" else ROWS)


def test_a_line_that_was_cut_off_is_measured_again(model, measured, tmp_path: Path) -> None:
    measured(3)
    with pytest.raises(KeyboardInterrupt):
        run(model, Progress(tmp_path, "step 5", Group()))
    file = tmp_path / "rows" / "rank-0.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    seen = measured(None)
    found = run(model, Progress(tmp_path, "step 5", Group()))
    assert sum(seen) == ROWS - 2 * 4
    assert found == run(model, None)
    last = file.read_text().splitlines()[-1]
    assert json.loads(last)["key"].startswith("step 5 "), "behind the broken line, not in it"


def test_texts_stay_out_of_it_unless_they_are_asked_for(model, tmp_path: Path) -> None:
    words = {w for rows in qa_benchmark().scored.values() for r in rows for w in (r.prompt + " " + r.answer).split()}
    for texts in (False, True):
        run(model, Progress(tmp_path / str(texts), "step 5", Group()), texts=texts)
        kept = (tmp_path / str(texts) / "rows" / "rank-0.jsonl").read_text()
        assert ("generation" in kept) is texts
        assert texts or not [word for word in words if len(word) > 4 and word in kept]


def test_two_ranks_go_on_where_three_stopped(model, measured, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Threads, "barrier", lambda self: self.meet.wait() if self.size > 1 else None)
    expected = run(model, None)

    def ranks(size: int) -> list[Any]:
        board: list[Any] = [None] * size
        barrier, results = threading.Barrier(size, timeout=60), [None] * size

        def work(rank: int) -> None:
            progress = Progress(tmp_path, "step 5", Threads(rank, size, board, barrier))
            results[rank] = run(copy.deepcopy(model), progress, group=progress.group)  # as processes have their own

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    ranks(3)
    (tmp_path / "rows" / "rank-1.jsonl").unlink()  # a machine that is gone
    seen = measured(None)
    for result in ranks(2):
        # not the attacks: rounding may change the order of two rows
        scores = {name: score for name, score in expected.scores.items() if not name.startswith(("mia_", "privleak"))}
        assert {name: result.scores[name] for name in scores} == pytest.approx(scores, rel=1e-5, abs=1e-6)
        assert result.measurements.rows("forget")[3].hits == expected.measurements.rows("forget")[3].hits
    assert sum(seen) == 12  # rank 1 had every third of 35 rows


def test_a_metric_on_the_model_is_run_once(model, monkeypatch, tmp_path: Path) -> None:
    calls: list[str] = []

    def metric(name: str, fails: bool = False) -> ModelMetric:
        def work(subject: Any) -> dict[str, float]:
            calls.append(name)
            if fails and calls.count(name) == 1:
                raise KeyboardInterrupt
            return {name: 0.25, f"{name}/part": subject.score(["forget_probability"])["forget_probability"]}

        return ModelMetric("report", work, lambda config, benchmark: None)

    monkeypatch.setitem(MODEL_METRICS, "first", metric("first"))
    monkeypatch.setitem(MODEL_METRICS, "second", metric("second", fails=True))
    config = replace(EVERYTHING, metrics=("first", "forget_probability"), final=("second",))
    with pytest.raises(KeyboardInterrupt):
        run(model, Progress(tmp_path, "step 5", Group()), config)
    found = run(model, Progress(tmp_path, "step 5", Group()), config)
    assert calls == ["first", "second", "second"]
    assert found.scores["second/part"] == found.scores["first/part"]
    # there the answers pass alone, here together with the wrong ones
    assert found.scores["first/part"] == pytest.approx(found.scores["forget_probability"], rel=1e-6)
    assert "second" not in run(model, None, config, final=False).scores
    other = replace(qa_benchmark(), forget=qa_benchmark().forget[1:])
    progress = Progress(tmp_path, "step 5", Group())
    evaluate(model, small.tokenizer(), other, config, ModelConfig(), progress=progress)
    assert calls[4:] == ["first", "second"], "other rows are another evaluation"
