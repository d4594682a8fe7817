"""lm-eval's tasks as metrics: what is refused, in one line and before anything is trained; and tasks of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from gru_core.config import EvaluateConfig, ModelConfig
from gru_core.errors import InputError
from gru_core.metrics import check_metrics, evaluate, find
from gru_core.metrics.lm_eval_load import load
from gru_core.metrics.lm_eval_tasks import fresh
from tests import lm_eval_small as small


@pytest.fixture(scope="module")
def bio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"wmdp_bio": small.write(tmp_path_factory.mktemp("data") / "bio.json", small.questions(30))}


def refusal(config: EvaluateConfig, benchmark: Any = small.NOTHING) -> str:
    with pytest.raises(InputError) as caught:
        check_metrics(config, True, benchmark)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_lm_eval_the_extra_is_named(bio: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gru_core.metrics import lm_eval_load

    monkeypatch.setattr(lm_eval_load.importlib.util, "find_spec", lambda name: None)
    said = refusal(small.asking("wmdp_bio", data=bio), None)
    assert said == 'lm_eval:wmdp_bio needs the package lm-eval: pip install "gru-unlearning[eval]"'


def test_a_role_that_it_cannot_play(bio: dict[str, str]) -> None:
    assert "lm_eval:TASK" in refusal(EvaluateConfig(unlearning="model_utility"))
    with pytest.raises(InputError, match="name of an lm-eval task is missing"):
        find("lm_eval:")
    with pytest.raises(InputError, match="lm_eval:TASK"):
        find("lm_evil:wmdp_bio")


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("a secret text")

    monkeypatch.setattr(datasets, "load_dataset", away)
    said = refusal(small.asking("wmdp"))
    assert said.startswith("lm_eval:wmdp: the data set of wmdp_bio, wmdp_chem, wmdp_cyber cannot be loaded")
    assert "evaluate.lm_eval.data: {wmdp_bio: FILE}" in said
    assert "secret" not in said


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of lm-eval's tasks take half a minute to read: here two folders of them stand for all."""
    import lm_eval.tasks

    from gru_core.metrics import lm_eval_load

    root = Path(lm_eval.tasks.__file__).parent
    some = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / "wmdp", root / "piqa"])
    monkeypatch.setattr(lm_eval_load, "_all", {None: some})
    said = refusal(small.asking("wmdp_boi"))
    assert said.startswith("unknown lm-eval task 'wmdp_boi'; did you mean 'wmdp_bio'?")


def test_code_from_the_hub_is_never_run() -> None:
    """HumanEval's own code asks for a metric of the hub, which runs what the model writes."""
    said = refusal(small.asking("humaneval"))
    assert said == "lm_eval:humaneval measures with code that would be fetched from the hub, which is never done"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": ["a", "b", "c"]}, "line 2: column 'choices' has 3 entries, needed: 4"),
        ({"answer": 4}, "line 2: column 'answer' must be a whole number from 0 to 3"),
        ({"answer": "B"}, "line 2: column 'answer' must be a whole number from 0 to 3"),
        ({"question": " "}, "line 2: column 'question' is an empty string"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    first, second = small.questions(2)
    file = tmp_path / "bio.jsonl"
    file.write_text("\n".join(map(json.dumps, (first, second | row))))
    message = refusal(small.asking("wmdp_bio", data={"wmdp_bio": str(file)}))
    assert said in message
    assert "place" not in message, "no text of a row"


def test_files_and_examples_that_do_not_fit(bio: dict[str, str], tmp_path: Path) -> None:
    assert refusal(small.asking("wmdp_bio", data={"wmdp_bio": "nowhere.json"}), None) == (
        "evaluate.lm_eval.data.wmdp_bio: there is no file 'nowhere.json'"
    )
    said = refusal(small.asking("wmdp_bio", data={"wmdp": bio["wmdp_bio"]}))
    assert said == "evaluate.lm_eval.data.wmdp: a group, allowed: a single task"
    check_metrics(small.asking("wmdp_bio", num_fewshot=2, data=bio), True, small.NOTHING)  # defined with 0: stays so
    shots = small.asking("mmlu_anatomy", num_fewshot=2, data={"mmlu_anatomy": bio["wmdp_bio"]})
    assert "mmlu_anatomy has no rows besides those it asks about" in refusal(shots)
    away = small.asking("wmdp_bio", include_path=str(tmp_path / "no"))
    assert "include_path: there is no folder" in refusal(away)


def test_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of task files: choices and examples as its file says."""
    import datasets

    tok = small.tokenizer()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"q": q["question"], "a": "ABC"[q["answer"] % 3]} for q in small.questions(24)]
    for name, part in (("test", rows[:4]), ("train", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    (tmp_path / "_own_template").write_text(
        "dataset_path: json\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: a\n"
        "doc_to_choice: [A, B, C]\ntest_split: test\ntraining_split: train\n"
    )
    (tmp_path / "own.yaml").write_text(
        f"include: _own_template\ntask: own\ndataset_kwargs: {{data_files: {{test: {tmp_path}/test.jsonl, "
        f"train: {tmp_path}/train.jsonl}}}}\n"
    )
    for shots in (0, 2):
        config = small.asking("own", include_path=str(tmp_path), num_fewshot=shots)
        prompts = [built(load("own", config.lm_eval).tasks["own"]) for _ in range(2)]
        assert prompts[0] == prompts[1], "each evaluation draws the same examples"
        assert {text.count("Which of these") for text in prompts[0]} == {1 + shots}
        found = evaluate(small.llama(tok), tok, small.NOTHING, config, ModelConfig()).scores
        assert found["lm_eval:own/chance"] == pytest.approx(1 / 3)
        assert found.keys() == {
            f"lm_eval:own{end}" for end in ("", "/stderr", "/chance", "/acc_norm", "/acc_norm_stderr")
        }


def built(task: Any) -> list[str]:
    """Prompts that one evaluation would ask."""
    own = fresh(task)
    own.build_all_requests()
    return [request.args[0] for request in own.instances]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("task: own\ndataset_path: json\nprocess_docs: !function code.run\n", "line 3: !function"),
        ("task: own\nclass: !function code.Own\n", "line 2: class"),
        ("include: inner\ntask: own\n", "inner, line 1: !function"),
        ("task: own\nmetric_list: [{metric: !!python/name:os.system }]\n", "line 2: tag:yaml.org,2002:python/name"),
        ("task: [", "is no task file"),
    ],
)
def test_code_in_a_folder_of_tasks_is_not_run(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "inner").write_text("doc_to_text: !function code.run\n")
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    said = refusal(small.asking("own", include_path=str(tmp_path)))
    assert what in said
    assert not (tmp_path / "ran").exists()
