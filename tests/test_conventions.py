"""``evaluate.convention``: the numbers that OpenUnlearning's code makes differently, by hand and from its own logs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gru_core.config import EvaluateConfig
from gru_core.errors import ConfigError
from gru_core.metrics import METRICS, AnswerScores, Evaluation, Hits, Measurements, RowScores
from gru_core.metrics.base import Convention, Tail

LIKELY, UNLIKELY = -math.log(0.5), -math.log(1e-10)
"""NLL of a token of probability 1/2, and of one that weighs as much as the 1e-10 that is added."""


def one_token(nll: float) -> AnswerScores:
    return AnswerScores(nll, 1)


def row(right: float, *wrong: float, paraphrase: float | None = None, tail: float | None = None) -> RowScores:
    return RowScores(
        "r", one_token(right), Hits(0, 4, 4), one_token(paraphrase) if paraphrase is not None else None,
        tuple(map(one_token, wrong)), tail=Tail(tail, 0.0, 1) if tail is not None else None,
    )  # fmt: skip


def both(name: str, sets: dict[str, tuple[RowScores, ...]], reference: Any = None) -> tuple[float, float]:
    """The metric as its paper has it, and as OpenUnlearning has it."""
    conventions: tuple[Convention, ...] = ("original", "openunlearning")
    found = [Measurements(sets, c) for c in conventions]
    others = [Measurements(reference, c) if reference else None for c in conventions]
    values = [METRICS[name].compute(m, r) for m, r in zip(found, others, strict=True)]
    return values[0], values[1]


def test_extraction_strength_of_a_row_whose_last_token_is_missed() -> None:
    """Of 4 tokens: none after the prefix of 4: 0, or 1/4. With the last one right (k = 3) both say 1/4."""
    missed, last, whole = Hits(2, 4, 4), Hits(1, 3, 4), Hits(4, 0, 4)
    rows = tuple(RowScores(str(i), hits=h) for i, h in enumerate((missed, last, whole, Hits(0, 0, 0))))
    assert both("extraction_strength", {"forget": rows}) == ((0 + 1 / 4 + 1) / 4, (1 / 4 + 1 / 4 + 1) / 4)
    assert both("extraction_strength", {"forget": (RowScores("a", hits=Hits(0, 1, 1)),)}) == (0, 1)


def test_truth_ratio_of_an_unlikely_answer() -> None:
    """Right answer at 1e-10, wrong ones at 1/2: 0.5 / 1e-10, or 0.5 / 2e-10. Either way the inverse is reported."""
    sets = {"forget": (row(LIKELY, LIKELY, paraphrase=UNLIKELY),)}
    assert both("forget_truth_ratio", sets) == pytest.approx((2e-10, 1 / (0.5 / 2e-10 + 1e-10)), rel=1e-9)
    unlikely = {"retain": (row(UNLIKELY, -math.log(5e-11)),)}  # wrong 0.5e-10: ratio 0.5, or 0.5e-10 / 2e-10 = 0.25
    assert both("retain_truth_ratio", unlikely) == pytest.approx((0.5, 0.75), rel=1e-9)
    tiny = {"forget": (row(LIKELY, UNLIKELY),)}  # ratio 2e-10: the smaller of it and its inverse, in both
    assert both("forget_truth_ratio", tiny) == pytest.approx((2e-10, 1e-10 / (0.5 + 1e-10)), rel=1e-9)


def test_truth_ratio_far_past_the_range_of_exp() -> None:
    found = both("forget_truth_ratio", {"forget": (row(1.0, 5000.0), row(5000.0, 1.0))})
    assert all(map(math.isfinite, found))
    assert found[1] == pytest.approx((0 + 1 / (math.exp(-1) / 1e-10)) / 2, rel=1e-9)


def test_forget_quality_ranks_the_ratios_with_the_addition() -> None:
    """Ratios that saturate at the addition tie: models that differ only there are told apart by the paper alone."""
    mine = tuple(replace(row(2000.0, 1.0), id=str(i)) for i in range(6))
    theirs = tuple(replace(row(1000.0, 1.0), id=str(i)) for i in range(6))
    original, added = both("forget_quality", {"forget": mine}, {"forget": theirs})
    assert original == pytest.approx(2 / math.comb(12, 6))
    assert added == 1


def test_choice_probability_of_unlikely_answers() -> None:
    """All four at 1e-10: a quarter, or a fifth with one 1e-10 more below."""
    sets = {"facts": (row(UNLIKELY, UNLIKELY, UNLIKELY, UNLIKELY),)}
    assert both("facts_probability", sets) == pytest.approx((1 / 4, 1 / 5), rel=1e-9)
    assert both("facts_probability", {"facts": (row(5000, 5000, 5000, 5000),)})[1] < 1e-290


def test_privleak_against_a_retain_model_that_knows_every_row() -> None:
    """AUC 1 of the retain model, 1/2 of the model: the paper's would divide by 0 (half a pair stands in), the other
    divides by 1e-10."""
    knows = {"forget": (row(1, tail=0.0),), "holdout": (row(1, tail=1.0),)}
    equal = {"forget": (row(1, tail=1.0),), "holdout": (row(1, tail=1.0),)}
    original, added = both("privleak", equal, knows)
    assert original == pytest.approx(100 * (0.5 - 0.5) / 0.5)
    assert added == pytest.approx(100 * 0.5 / 1e-10)
    assert both("privleak", knows, equal) == pytest.approx((-100, -100 * 0.5 / (0.5 + 1e-10)), rel=1e-12)


def test_openunlearnings_own_log(shared_data: Path) -> None:
    """Its truth ratios, from the means that it logs beside them: the addition alone is what 1e-9 tells apart."""
    log = json.loads((shared_data / "tofu_eval_logs" / "llama-3.2-1b_full_forget10" / "TOFU_EVAL.json").read_text())
    read = {k: log[f"forget_Q_A_{k}"]["value_by_index"] for k in ("PARA_Prob", "PERT_Prob")}
    rows = tuple(
        row(1.0, *read["PERT_Prob"][i]["avg_loss"], paraphrase=read["PARA_Prob"][i]["avg_loss"])
        for i in read["PARA_Prob"]
    )
    published = log["forget_truth_ratio"]["agg_value"]
    original, added = both("forget_truth_ratio", {"forget": rows})
    assert added == pytest.approx(published, rel=1e-7)
    assert abs(added - published) <= abs(original - published)
    strengths = [v["score"] for v in log["extraction_strength"]["value_by_index"].values()]
    assert min(strengths) > 0, "none of its rows scores 0: 1/n stands there"


def test_the_convention_travels_with_the_measurements() -> None:
    found = Evaluation({"a": 1.0}, Measurements({"forget": (row(1.0),)}, "openunlearning"))
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found
    old = {k: v for k, v in found.to_json().items() if k != "convention"}
    assert Evaluation.from_json(old).measurements.convention == "original"


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluate.convention: got 'tofu', allowed: original, openunlearning"):
        EvaluateConfig(convention="tofu")  # type: ignore[arg-type]
