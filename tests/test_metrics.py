"""Pure metric functions: published per-sample logs, hand-derived values, errors. No model runs here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp

from gru_core.benchmarks.base import Benchmark, EvalRow
from gru_core.config import EvaluateConfig
from gru_core.errors import InputError
from gru_core.metrics import (
    METRICS,
    AnswerScores,
    Baseline,
    Evaluation,
    Hits,
    Measurements,
    RowScores,
    check_metrics,
    requested,
    trade_off,
)
from gru_core.metrics.base import LOST_NLL
from gru_core.metrics.extraction_strength import strength
from gru_core.metrics.forget_quality import ks_pvalue, log10_pvalue
from gru_core.metrics.probability import choice_probability
from gru_core.metrics.rouge import rouge_l_f1, rouge_l_recall
from gru_core.metrics.truth_ratio import forget_aggregate, log_truth_ratio, utility_aggregate
from gru_core.metrics.utility import PARTS, harmonic_mean, notes, utility_parts

# --- published numbers -----------------------------------------------------------------------------------

PHI_SECTIONS = {
    "retain": "eval_log.json",
    "authors": "eval_real_author_wo_options.json",
    "facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
# TOFU leaderboard, forget10, Phi-1.5, weight decay 0.01
LEADERBOARD = {
    "full": [
        0.9260884160508502, 0.9292525097192792, 0.48268300832084604,
        0.3773603259680649, 0.41566666666666663, 0.45600902133986254,
        0.40899845221380016, 0.7773504273504274, 0.49233691387660944,
    ],
    "retain90": [
        0.9231140312552547, 0.9200431185901895, 0.4847391599677,
        0.3841872783056456, 0.47533333333333333, 0.4638361087966355,
        0.40808843618921553, 0.7556980056980056, 0.48826346879862315,
    ],
}  # fmt: skip
UTILITY = {"full": 0.5220737132035153, "retain90": 0.5319909117798324}
FORGET_SET = {
    "full": (0.9282394842423192, 0.9248612622630048, 0.4833555856680227),
    "retain90": (0.13490696158672863, 0.42786742821792745, 0.6288417132144549),
}


def phi_log(shared_data: Path, name: str) -> dict[str, Any]:
    path = shared_data / "tofu_eval_logs" / f"phi-1_5_{name}" / "eval_log_aggregated.json"
    return json.loads(path.read_text())


def one_token(mean_nll: float) -> AnswerScores:
    """Logs hold means of NLL: as if the answer were one token."""
    return AnswerScores(mean_nll, 1)


def phi(shared_data: Path, name: str) -> Measurements:
    log, sets = phi_log(shared_data, name), {}
    for set_name, section in PHI_SECTIONS.items():
        s = log[section]
        sets[set_name] = tuple(
            RowScores(
                id=f"{set_name}:{i}",
                answer=one_token(s["avg_gt_loss"][i]),
                hits=Hits(0, 1, 1),  # not in the log, and in no number compared here
                paraphrase=one_token(s["avg_paraphrased_loss"][i]),
                perturbed=tuple(map(one_token, s["average_perturb_loss"][i])),
                rouge=s["rougeL_recall"][i],
            )
            for i in s["avg_gt_loss"]
        )
    return Measurements(sets)


@pytest.mark.parametrize("name", ["full", "retain90"])
def test_phi_leaderboard_row_comes_out_of_its_log(shared_data, name):
    found = phi(shared_data, name)
    parts = utility_parts(found)
    assert list(parts) == list(PARTS)
    assert list(parts.values()) == pytest.approx(LEADERBOARD[name], rel=1e-9)
    assert METRICS["model_utility"].compute(found, None) == pytest.approx(UTILITY[name], rel=1e-9)
    forget = ("forget_probability", "forget_rouge", "forget_truth_ratio")
    values = [METRICS[metric].compute(found, None) for metric in forget]
    assert values == pytest.approx(FORGET_SET[name], rel=1e-9)
    assert METRICS["retain_truth_ratio"].compute(found, None) == pytest.approx(LEADERBOARD[name][2], rel=1e-9)


def test_phi_forget_quality_is_the_published_p_value(shared_data):
    full, retain = phi(shared_data, "full"), phi(shared_data, "retain90")
    metric = METRICS["forget_quality"]
    value = metric.compute(full, retain)
    assert value == pytest.approx(2.1942743021891237e-16, rel=1e-9)
    derived = metric.derived["forget_quality_log10"](value)
    assert derived == pytest.approx(math.log10(2.1942743021891237e-16))
    assert metric.compute(retain, retain) == 1


def test_phi_rouge_is_recomputed_from_the_logged_texts(shared_data):
    section = phi_log(shared_data, "retain90")[PHI_SECTIONS["forget"]]
    for i, (_, made, answer) in section["generated_text"].items():
        assert rouge_l_recall(answer, made) == pytest.approx(section["rougeL_recall"][i], abs=1e-12)


def llama_log(shared_data: Path, name: str) -> dict[str, Any]:
    return json.loads((shared_data / "tofu_eval_logs" / f"llama-3.2-1b_{name}" / "TOFU_EVAL.json").read_text())


def llama(log: dict[str, Any]) -> Measurements:
    """Every log of OpenUnlearning: paraphrases on retain and forget, none on authors and facts."""
    sets = {}
    for set_name, short in {"retain": "retain", "authors": "ra", "facts": "wf", "forget": "forget"}.items():
        read = {k: log[f"{short}_Q_A_{k}"]["value_by_index"] for k in ("Prob", "PERT_Prob", "ROUGE")}
        right = log[f"{short}_Q_A_PARA_Prob"]["value_by_index"] if f"{short}_Q_A_PARA_Prob" in log else {}
        sets[set_name] = tuple(
            RowScores(
                id=f"{set_name}:{i}",
                answer=one_token(read["Prob"][i]["avg_loss"]),
                hits=Hits(0, 1, 1),
                paraphrase=one_token(right[i]["avg_loss"]) if right else None,
                perturbed=tuple(map(one_token, read["PERT_Prob"][i]["avg_loss"])),
                rouge=read["ROUGE"][i]["rougeL_recall"],
            )
            for i in read["Prob"]
        )
    return Measurements(sets)


def test_llama_log_of_another_code_base_agrees(shared_data):
    """OpenUnlearning adds 1e-10 to denominators, and keeps probabilities in float32: hence 1e-4."""
    log = llama_log(shared_data, "full_forget10")
    found, retain = llama(log), llama(llama_log(shared_data, "retain90"))
    assert METRICS["model_utility"].compute(found, None) == pytest.approx(0.5991534707368931, rel=1e-4)
    truth = METRICS["forget_truth_ratio"].compute(found, None)
    assert truth == pytest.approx(log["forget_truth_ratio"]["agg_value"], rel=1e-6)
    assert METRICS["forget_quality"].compute(found, retain) == pytest.approx(3.9054713571083378e-22, rel=1e-9)


# --- by hand ---------------------------------------------------------------------------------------------


def row(answer: float, *wrong: float, paraphrase: float | None = None) -> RowScores:
    """A row from means of NLL."""
    right = one_token(paraphrase) if paraphrase is not None else None
    return RowScores("r", one_token(answer), Hits(1, 0, 1), right, tuple(map(one_token, wrong)))


def test_probability_is_length_normalised():
    assert AnswerScores(6.0, 3).probability == pytest.approx(math.exp(-2))
    assert AnswerScores(0.0, 5).probability == 1


def test_truth_ratio_is_wrong_over_right_and_geometric():
    p = math.log
    # wrong answers at 0.1 and 0.4 per token: geometric mean 0.2 (the arithmetic one is 0.25); paraphrase at 0.5
    one = row(-p(0.8), -p(0.1), -p(0.4), paraphrase=-p(0.5))
    assert math.exp(log_truth_ratio(one)) == pytest.approx(0.2 / 0.5)
    # no paraphrase: the answer stands in its place
    assert math.exp(log_truth_ratio(row(-p(0.8), -p(0.1), -p(0.4)))) == pytest.approx(0.2 / 0.8)


def test_truth_ratio_aggregates():
    ratios = [0.5, 2.0, 1.0, 0.25]
    logs = [math.log(r) for r in ratios]
    assert forget_aggregate(logs) == pytest.approx((0.5 + 0.5 + 1 + 0.25) / 4)
    assert utility_aggregate(logs) == pytest.approx((0.5 + 0 + 0 + 0.75) / 4)
    # far past the range of exp
    assert forget_aggregate([1e9, -1e9]) == 0
    assert utility_aggregate([1e9, -1e9]) == 0.5


def test_choice_probability():
    p = math.log
    assert choice_probability(row(-p(0.3), -p(0.1), -p(0.2), -p(0.4))) == pytest.approx(0.3)
    # all underflow as probabilities: 0/0 there, a fair quarter here
    assert choice_probability(row(5000, 5000, 5000, 5000)) == pytest.approx(0.25)
    assert choice_probability(row(5000, 1, 1, 1)) == pytest.approx(0, abs=1e-300)
    assert choice_probability(row(1, 5000)) == 1


def test_a_lost_answer_has_probability_zero_whatever_it_stands_beside():
    lost = AnswerScores(LOST_NLL + 3.0, 2000)
    assert lost.probability == 0
    assert choice_probability(RowScores("r", lost, perturbed=(lost, lost, lost))) == 0
    assert math.isfinite(log_truth_ratio(RowScores("r", lost, perturbed=(lost,))))


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=9))
def test_harmonic_mean_equals_scipy(values):
    assert harmonic_mean(values) == pytest.approx(float(hmean(values)), rel=1e-12)


def test_harmonic_mean_with_a_zero_is_zero():
    assert harmonic_mean([0.5, 0.0, 1.0]) == 0


def test_model_utility_leaves_out_what_the_benchmark_lacks_and_says_so():
    rows = (RowScores("a", AnswerScores(1.0, 2), Hits(1, 1, 1), rouge=0.5),)
    found = Measurements({"retain": rows})
    expected = 2 / (1 / math.exp(-0.5) + 1 / 0.5)
    assert METRICS["model_utility"].compute(found, None) == pytest.approx(expected)
    (note,) = notes(found)
    assert "2 of 9" in note
    assert "retain truth ratio" in note
    assert "facts ROUGE" in note


def test_extraction_strength_by_hand():
    assert strength(Hits(matched=4, prefix=0, tokens=4)) == 1
    assert strength(Hits(matched=3, prefix=1, tokens=4)) == 0.75
    assert strength(Hits(matched=3, prefix=4, tokens=4)) == 0  # only the last token is missed: k = n
    assert strength(Hits(0, 0, 0)) == 0


def test_exact_memorization_by_hand():
    rows = tuple(RowScores(str(i), hits=h) for i, h in enumerate([Hits(2, 4, 4), Hits(3, 0, 3), Hits(0, 0, 0)]))
    found = Measurements({"forget": rows, "retain": rows[:2]})
    assert METRICS["exact_memorization"].compute(found, None) == pytest.approx((0.5 + 1 + 0) / 3)
    assert METRICS["retain_exact_memorization"].compute(found, None) == pytest.approx(0.75)


def test_rouge_by_hand():
    # stems run and jump match; "the cat ... sat" is the longest common subsequence: 3 of 4 answer words
    assert rouge_l_recall("the cat quietly sat", "the big cat sat down quietly") == pytest.approx(3 / 4)
    assert rouge_l_recall("running jumps", "runs jumping") == 1
    assert rouge_l_recall("a word", "") == 0


@pytest.mark.parametrize(
    ("answer", "generation"),
    [
        ("The cat sat.", "the CAT; sat"),  # the same words
        ("running", "runs"),
        ("a cat sat", "a cat"),
        ("...", "!"),  # no word on either side
        ("", ""),
        ("", "a"),
        ("猫", "猫"),
        ("the cat sat", "the the cat"),
    ],
)
def test_rouge_is_that_of_the_library(answer: str, generation: str) -> None:
    for stem in (True, False):
        library = RougeScorer(["rougeL"], use_stemmer=stem).score(answer, generation)["rougeL"]
        assert rouge_l_f1(answer, generation, stem) == library.fmeasure
        if stem:
            assert rouge_l_recall(answer, generation) == library.recall


# --- forget quality --------------------------------------------------------------------------------------


def test_forget_quality_of_disjoint_samples_by_counting():
    """All of one below all of the other: 2 of the C(2n, n) orders are as extreme, the exact p-value."""
    n = 6
    assert ks_pvalue(range(n), range(n, 2 * n)) == pytest.approx(2 / math.comb(2 * n, n), rel=1e-12)


def test_forget_quality_near_one_is_exact_and_silent(recwarn):
    """Of samples that differ least (D = 1/n) no pair differs less: p is 1; scipy alone warns at n = 7."""
    assert ks_pvalue([0.1, 0.2, 0.2], [0.2, 0.1, 0.2]) == 1
    assert ks_pvalue([0.5, 0.1] * 3, [0.1, 0.5]) == 1
    for n in (5, 7, 300):
        assert ks_pvalue(range(n), [x + 0.5 for x in range(n)]) == pytest.approx(1, abs=1e-12)
    assert not recwarn.list


def test_forget_quality_ranks_do_not_see_the_logarithm():
    draw = np.random.default_rng(0)
    a, b = draw.normal(0, 1, 40).tolist(), draw.normal(0.5, 1, 50).tolist()
    raw = ks_2samp(np.exp(a), np.exp(b), method="exact").pvalue
    assert ks_pvalue(a, b) == pytest.approx(raw, rel=1e-12)


def test_forget_quality_log10_stays_finite():
    assert log10_pvalue(0.0) == pytest.approx(math.log10(sys.float_info.min))
    assert log10_pvalue(1e-5) == pytest.approx(-5)


def test_forget_quality_needs_the_same_rows():
    here = Measurements({"forget": (row(1, 2),)})
    other = Measurements({"forget": (RowScores("q", one_token(1), perturbed=(one_token(2),)),)})
    with pytest.raises(InputError, match="other forget rows"):
        METRICS["forget_quality"].compute(here, other)
    with pytest.raises(InputError, match="retain_model"):
        METRICS["forget_quality"].compute(here, None)


def test_what_was_not_measured_is_an_error_and_not_a_zero():
    found = Measurements({"forget": (RowScores("a"),)})
    for name in ("forget_probability", "forget_rouge", "extraction_strength", "forget_truth_ratio"):
        with pytest.raises(InputError):
            METRICS[name].compute(found, None)
    with pytest.raises(InputError, match="retain set was not measured"):
        METRICS["retain_probability"].compute(found, None)


# --- documents -------------------------------------------------------------------------------------------

number = st.floats(0, 1e12, allow_nan=False)
answers = st.builds(AnswerScores, number, st.integers(1, 2000))
rows_strategy = st.builds(
    RowScores,
    st.text(min_size=1, max_size=8),
    st.none() | answers,
    st.none() | st.builds(Hits, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    st.none() | answers,
    st.lists(answers, max_size=3).map(tuple),
    st.none() | st.floats(0, 1),
)


@given(
    st.dictionaries(st.sampled_from(sorted(METRICS)), number),
    st.dictionaries(st.sampled_from(["forget", "retain"]), st.lists(rows_strategy, max_size=3).map(tuple)),
    st.lists(st.text(max_size=9)).map(tuple),
)
@settings(max_examples=100, deadline=None)
def test_json_round_trip_is_exact(scores, sets, said):
    evaluation = Evaluation(scores, Measurements(sets), said)
    text = json.dumps(evaluation.to_json(), allow_nan=False)
    assert Evaluation.from_json(json.loads(text)) == evaluation


@pytest.mark.parametrize("document", [{}, {"scores": {}, "sets": {"forget": [{}]}, "notes": []}, {"sets": []}, []])
def test_a_wrong_document_is_refused(document):
    with pytest.raises(InputError, match="not an evaluation document"):
        Evaluation.from_json(document)


# --- trade-off -------------------------------------------------------------------------------------------

CONFIG = EvaluateConfig(metrics=("extraction_strength",), retention="retain_extraction_strength")


def scored(m: float, n: float) -> Evaluation:
    return Evaluation({"extraction_strength": m, "retain_extraction_strength": n}, Measurements({}))


@pytest.mark.parametrize(
    ("m", "n", "unlearning", "retention"),
    [
        (0.9, 0.8, 0.0, 1.0),  # the start
        (0.1, 0.4, 1.0, 0.5),  # as if never seen
        (0.5, 0.6, 0.5, 0.75),
        (0.0, 0.0, 1.0, 0.0),  # past the retain model
        (1.0, 0.9, 0.0, 1.0),  # worse than the start, better than the start
    ],
)
def test_trade_off_by_hand(m, n, unlearning, retention):
    base = Baseline(scored(0.9, 0.8), scored(0.1, 0.8))
    point = trade_off(scored(m, n).scores, base, CONFIG)
    assert point == {"unlearning": pytest.approx(unlearning), "retention": pytest.approx(retention)}


def test_trade_off_without_a_retain_model_takes_zero():
    point = trade_off(scored(0.3, 0.8).scores, Baseline(scored(0.9, 0.8)), CONFIG)
    assert point["unlearning"] == pytest.approx((0.9 - 0.3) / 0.9)


@pytest.mark.parametrize(
    ("start", "retain", "message"),
    [
        (scored(0.1, 0.8), scored(0.1, 0.8), "nothing to forget: extraction_strength.* retain model's 0.1"),
        (scored(0.0, 0.8), None, "nothing to forget"),
        (scored(0.9, 0.0), None, "nothing to keep: retain_extraction_strength"),
    ],
)
def test_trade_off_without_room_is_an_error(start, retain, message):
    with pytest.raises(InputError, match=message):
        trade_off(scored(0.1, 0.1).scores, Baseline(start, retain), CONFIG)


def test_trade_off_names_a_metric_that_was_not_evaluated():
    with pytest.raises(InputError, match="extraction_strength was not evaluated"):
        trade_off({}, Baseline(scored(0.9, 0.8)), CONFIG)


# --- checks before anything runs -------------------------------------------------------------------------


def benchmark(perturbed: bool, *sets: str) -> Benchmark:
    wrong = ("no", "never") if perturbed else ()
    return Benchmark("mine", (), (), {s: (EvalRow(f"{s}:0", "q", "a", perturbed=wrong),) for s in sets})


QUALITY = EvaluateConfig(metrics=("extraction_strength", "model_utility", "forget_quality"))


def test_check_metrics_accepts_a_full_benchmark():
    check_metrics(QUALITY, True, benchmark(True, "forget", "retain", "authors", "facts"))
    assert requested(QUALITY) == ("extraction_strength", "model_utility", "forget_quality")
    check_metrics(EvaluateConfig(), False, None)  # the defaults ask for no retain model


@pytest.mark.parametrize(
    ("config", "retain_model", "message"),
    [
        (EvaluateConfig(metrics=("forget_qualty",)), True, "unknown metric 'forget_qualty'; did .* 'forget_quality'"),
        (EvaluateConfig(unlearning="model_utility"), True, "unlearning: got 'model_utility', allowed: exact_mem"),
        (EvaluateConfig(unlearning="forget_quality"), True, "evaluate.unlearning"),
        (EvaluateConfig(retention="forget_rouge"), True, "retention: got 'forget_rouge', allowed: authors_prob"),
        (EvaluateConfig(retention="retain_truth_ratio"), True, "evaluate.retention"),
        (QUALITY, False, "forget_quality compares .*set retain_model"),
    ],
)  # fmt: skip
def test_check_metrics_refuses_with_one_clear_line(config, retain_model, message):
    with pytest.raises(InputError, match=message) as caught:
        check_metrics(config, retain_model, None)
    assert "\n" not in str(caught.value)


def test_check_metrics_says_what_a_benchmark_lacks():
    bare = benchmark(False, "forget", "retain")
    with pytest.raises(InputError, match="forget_quality cannot be computed on mine: 1 of 1 rows of its forget set"):
        check_metrics(QUALITY, True, bare)
    check_metrics(EvaluateConfig(metrics=("model_utility",)), False, bare)  # partial, with a note
    with pytest.raises(InputError, match="model_utility cannot be computed on mine: it has no retain set"):
        check_metrics(EvaluateConfig(metrics=("forget_rouge",)), False, benchmark(False, "forget"))


def test_every_metric_has_a_role_and_a_need():
    assert {m.role for m in METRICS.values()} == {"forget", "utility", "report"}
    for name, metric in METRICS.items():
        assert metric.needs, name
        sets = {need.set for need in metric.needs}
        assert (sets <= {"forget", "verbmem", "forget_knowmem"}) == (
            metric.role == "forget" or name in ("forget_truth_ratio", "forget_quality")
        )
