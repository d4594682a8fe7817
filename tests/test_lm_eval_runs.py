"""lm-eval's tasks in whole runs: on two processes under DDP and FSDP2, and behind the trade-off of ``gru unlearn``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from gru_core import models
from gru_core.config import ModelConfig, TrainConfig
from gru_core.metrics import evaluate
from gru_core.metrics.lm_eval_model import Adapter
from gru_core.parallel import Group
from gru_core.placing import place
from tests import lm_eval_small as small
from tests.study import Study, gru
from tests.test_lm_eval import by_hand, requests


def asked(model: Any, tok: Any, file: str, group: Group) -> dict[str, Any]:
    """Scores, and generations of other lengths on each rank."""
    scores = evaluate(
        model, tok, small.NOTHING, small.asking("wmdp_bio", data={"wmdp_bio": file}), ModelConfig(), group=group
    ).scores
    made = requests(*((f"Say which {i}", {"until": ["zz"], "max_gen_toks": 2 + 3 * i}) for i in range(3)))
    texts = Adapter(small.subject(model, tok, group), "t").generate_until(made)
    return {"scores": scores, "texts": texts}


def _rank(rank: int, store: str, folder: str, file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = Group(rank, 2, torch.device("cpu"))
    config, tok = ModelConfig(path=folder), models.load_tokenizer(folder)
    for strategy in ("ddp", "fsdp"):
        start = folder if strategy == "fsdp" else lambda: models.load_model(folder, config)
        net = place(start, config, TrainConfig(workers=2, strategy=strategy), group)  # type: ignore[arg-type]
        found = asked(net, tok, file, group)
        Path(f"{out}-{strategy}-{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_whole_or_sharded(tmp_path: Path) -> None:
    tok = small.tokenizer()
    model = small.llama(tok)
    small.teach(model, tok, small.questions(10), 30)
    models.save_model(model, tok, tmp_path / "model")
    file = small.write(tmp_path / "bio.json", small.questions(21))  # the ranks' shares differ
    want = asked(model, tok, file, Group())
    assert want["scores"]["lm_eval:wmdp_bio"] == pytest.approx(sum(by_hand(model, tok, small.questions(21))) / 21)
    mp.spawn(_rank, args=(str(tmp_path / "store"), str(tmp_path / "model"), file, str(tmp_path / "out")), nprocs=2)
    for strategy in ("ddp", "fsdp"):
        for rank in (0, 1):
            found = json.loads((tmp_path / f"out-{strategy}-{rank}").read_text())
            assert found["scores"] == pytest.approx(want["scores"], abs=1e-9), (strategy, rank)
            assert found["texts"] == want["texts"], (strategy, rank)


def overrides(folder: Path) -> list[str]:
    """The study's tokenizer knows no labels, so that every choice is as likely and A is taken: 12 and 6 of 20."""
    rows = small.questions(20)
    for name, right in (("bio", 12), ("chem", 6)):
        small.write(folder / f"{name}.json", [row | {"answer": int(i >= right)} for i, row in enumerate(rows)])
    data = f"{{wmdp_bio: {folder}/bio.json, wmdp_chem: {folder}/chem.json}}"
    return [
        "evaluate.unlearning=lm_eval:wmdp_bio", "evaluate.retention=lm_eval:wmdp_chem", "retain_model=null",
        "evaluate.metrics=[extraction_strength]", "evaluate.final=[lm_eval:mmlu_anatomy]", "unlearn.steps=4",
        f"evaluate.lm_eval.data={data[:-1]}, mmlu_anatomy: {folder}/bio.json}}",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_with_both_ends_from_lm_eval(study: Study, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from pipelines import unlearn

    said: list[str] = []
    config = study.load(tmp_path / "run", *overrides(tmp_path))
    done = unlearn.run(config, say=said.append)
    scores = done["scores"]
    assert scores["lm_eval:wmdp_bio"] == pytest.approx(12 / 20)
    assert scores["lm_eval:wmdp_chem"] == pytest.approx(6 / 20)
    assert scores["lm_eval:mmlu_anatomy"] == pytest.approx(12 / 20)
    assert scores["lm_eval:wmdp_bio/chance"] == 0.25
    assert (scores["unlearning"], scores["retention"]) == (0.0, 1.0)
    assert any("has fallen to what guessing scores" in line for line in said)
    tracked = MlflowClient(done["tracking_uri"]).get_run(done["run_id"]).data.metrics
    assert tracked["eval/lm_eval:wmdp_bio"] == pytest.approx(12 / 20)
    assert tracked["eval/lm_eval:wmdp_bio/stderr"] == pytest.approx(scores["lm_eval:wmdp_bio/stderr"])
    for file in (tmp_path / "run").rglob("*"):  # no text of a question anywhere
        assert not file.is_file() or b"stands at place" not in file.read_bytes(), file
    before = json.loads((tmp_path / "run" / "evaluations" / "step-00000004.json").read_text())["scores"]
    assert "lm_eval:mmlu_anatomy" in before


@pytest.mark.slow
def test_bad_input_is_said_before_anything_is_trained(study: Study, tmp_path: Path) -> None:
    """One line, exit code 2, nothing written; the hub is not asked for long."""
    environment = {**study.environment, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    out = tmp_path / "out"
    change = "evaluate.unlearning=lm_eval:wmdp_cyber"
    words = [word for each in (*overrides(tmp_path), change) for word in ("--set", each)]
    ended = gru(["unlearn", "-c", str(study.config), *words, "--output", str(out)], environment, tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "lm_eval:wmdp_cyber: the data set of wmdp_cyber cannot be loaded from the hub" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert not out.exists()
