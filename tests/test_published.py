"""Published logs give their published aggregates, to 1e-9."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gru_core.errors import InputError
from gru_core.metrics import published
from gru_core.metrics.membership import auc, privleak

PARTS = ("probability", "rouge", "truth_ratio")
NAMES = (
    "forget_quality", "model_utility",
    *(f"{name}_{part}" for name in ("retain", "authors", "facts", "forget") for part in PARTS),
)  # fmt: skip
LEADERBOARD = {
    "full": (
        2.1942743021891237e-16, 0.5220737132035153, 0.9260884160508502, 0.9292525097192792, 0.48268300832084604,
        0.3773603259680649, 0.41566666666666663, 0.45600902133986254, 0.40899845221380016, 0.7773504273504274,
        0.49233691387660944, 0.9282394842423192, 0.9248612622630048, 0.4833555856680227,
    ),
    "retain90": (
        1, 0.5319909117798324, 0.9231140312552547, 0.9200431185901895, 0.4847391599677, 0.3841872783056456,
        0.47533333333333333, 0.4638361087966355, 0.40808843618921553, 0.7556980056980056, 0.48826346879862315,
        0.13490696158672863, 0.42786742821792745, 0.6288417132144549,
    ),
}  # fmt: skip
"""The fourteen aggregates of the TOFU leaderboard (forget10, Phi-1.5, weight decay 0.01)."""
SUMMARY = {"forget_Q_A_Prob": "forget_probability", "forget_Q_A_ROUGE": "forget_rouge"} | {
    f"{short}_{theirs}": f"{name}_{ours}"
    for short, name, probability in (
        ("retain", "retain", "Prob"), ("ra", "authors", "Prob_normalised"), ("wf", "facts", "Prob_normalised")
    )
    for theirs, ours in (
        (f"Q_A_{probability}", "probability"), ("Q_A_ROUGE", "rouge"), ("Truth_Ratio", "truth_ratio")
    )
}  # fmt: skip
"""Names of OpenUnlearning that are not ours."""


def phi(shared_data: Path, name: str) -> Path:
    return shared_data / "tofu_eval_logs" / f"phi-1_5_{name}" / "eval_log_aggregated.json"


def llama(shared_data: Path, name: str) -> Path:
    return shared_data / "tofu_eval_logs" / f"llama-3.2-1b_{name}" / "TOFU_EVAL.json"


@pytest.mark.parametrize("name", list(LEADERBOARD))
def test_all_fourteen_of_the_leaderboard(shared_data: Path, name: str) -> None:
    log, retain = published.read(phi(shared_data, name)), published.read(phi(shared_data, "retain90"))
    scores, notes = published.aggregates(log, retain)
    assert [scores[each] for each in NAMES] == pytest.approx(LEADERBOARD[name], rel=1e-9, abs=0)
    assert notes == []


@pytest.mark.parametrize(("name", "with_retain"), [("full_forget10", True), ("retain90", False)])
def test_every_entry_of_the_summaries(shared_data: Path, name: str, with_retain: bool) -> None:
    path = llama(shared_data, name)
    retain = published.read(llama(shared_data, "retain90")) if with_retain else None
    scores, _ = published.aggregates(published.read(path), retain)
    summary = json.loads(path.with_name("TOFU_SUMMARY.json").read_text())
    assert {SUMMARY.get(k, k): scores[SUMMARY.get(k, k)] for k in summary} == {
        SUMMARY.get(key, key): pytest.approx(value, rel=1e-9, abs=0) for key, value in summary.items()
    }
    whole = json.loads(path.read_text())
    for key in {*SUMMARY, "forget_truth_ratio"}:
        assert scores[SUMMARY.get(key, key)] == pytest.approx(whole[key]["agg_value"], rel=1e-9, abs=0), key


def test_what_cannot_be_computed_is_left_out_and_said(shared_data: Path, tmp_path: Path) -> None:
    document = json.loads(phi(shared_data, "full").read_text())
    del document["eval_real_author_wo_options.json"]
    (tmp_path / "log.json").write_text(json.dumps(document))
    scores, notes = published.aggregates(published.read(tmp_path / "log.json"))
    assert not {"model_utility", "forget_quality", "authors_rouge", "privleak"} & scores.keys()
    assert [note.split(":")[0] for note in notes] == ["model_utility", "forget_quality"]
    assert "authors_rouge" in notes[0]
    scores, notes = published.aggregates(published.read(llama(shared_data, "full_forget10")))
    assert scores["privleak"] == pytest.approx(100 * (1 - scores["mia_min_k"] - 0.5) / 0.5)
    assert any("privleak: against AUC 0.5" in note for note in notes)


def broken(document: Any) -> None:
    document["eval_log_forget.json"]["average_perturb_loss"]["0"] = "secret text"


def test_bad_logs_are_one_line_without_their_texts(shared_data: Path, tmp_path: Path) -> None:
    document = json.loads(phi(shared_data, "full").read_text())
    broken(document)
    texts = {
        "broken": json.dumps(document),
        "other": '{"a": 1}',
        "list": "[1]",
        "cut": '{"eval_log_forget.json": {"secret',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError) as refused:
            published.read(tmp_path / name)
        assert str(refused.value).startswith(str(tmp_path / name))
        assert "secret" not in str(refused.value)
    with pytest.raises(InputError, match="cannot be read"):
        published.read(tmp_path / "none")


def test_logs_that_do_not_belong_together_are_refused(shared_data: Path) -> None:
    tofu, other = published.read(phi(shared_data, "full")), published.read(llama(shared_data, "full_forget10"))
    with pytest.raises(InputError, match="the same source"):
        published.aggregates(tofu, other)
    forget = dict(list(tofu.sets["forget"].items())[1:])
    with pytest.raises(InputError, match="299 forget rows, the other 300"):
        published.aggregates(tofu, published.Log("TOFU", {**tofu.sets, "forget": forget}))


def test_auc_is_the_share_of_pairs_in_order() -> None:
    assert auc([0.0, 1.0], [2.0, 3.0]) == 1
    assert auc([2.0, 3.0], [0.0, 1.0]) == 0
    assert auc([1.0], [1.0]) == 0.5
    random = np.random.default_rng(0)
    forget, holdout = random.integers(0, 9, 37).tolist(), random.integers(2, 11, 23).tolist()
    pairs = [(f < h) + 0.5 * (f == h) for f in forget for h in holdout]
    assert auc(forget, holdout) == pytest.approx(sum(pairs) / len(pairs), abs=1e-15)
    with pytest.raises(InputError, match="given: 0 and 1"):
        auc([], [1.0])


def test_privleak_by_hand() -> None:
    assert privleak(0.5) == 0  # nothing told apart
    assert privleak(1.0, 0.4) == -100  # every forget row recognised
    assert privleak(0.25, 0.5) == 50
    with pytest.raises(InputError, match="recognises every forget row"):
        privleak(0.5, 1.0)


def test_truth_ratio_with_and_without_the_added_number() -> None:
    row = published.LogRow(0.5, (0.1, 0.4), -math.log(0.5), (-math.log(0.1), -math.log(0.4)), 1.0)
    assert row.truth_ratio(0.0) == pytest.approx(0.4)
    assert row.truth_ratio(0.5) == pytest.approx(0.2)
    assert row.choice(0.0) == pytest.approx(0.5)
