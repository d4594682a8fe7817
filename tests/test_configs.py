"""Every shipped study, found by itself: loads, passes every check that needs no data, and survives a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest

from gru_core.benchmarks import load_benchmark, retain_subset
from gru_core.config import RunConfig
from gru_core.metrics import check_metrics
from pipelines import settings

FOLDER = Path(__file__).resolve().parents[1] / "tune_configs"
FILES = sorted(FOLDER.rglob("*.y*ml"))
SEARCHED = [file for file in FILES if not settings.load(str(file)).requests.splits]


def test_the_studies_are_there_and_go_by_their_names() -> None:
    names = {file.stem for file in FILES}
    assert {"demo", "tofu_llama32_1b", "own_data"} <= names
    assert set(settings.shipped()) == names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_study_is_valid_and_survives_a_round_trip(file: Path, tmp_path: Path) -> None:
    config = settings.load(str(file))
    settings.check(config)
    assert settings.load(file.stem) == config
    again = tmp_path / "config.yaml"
    again.write_text(settings.to_yaml(config))
    assert settings.load(str(again)) == config


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_study_is_explained(file: Path) -> None:
    """A user adapts a study by reading it: it starts with what it is and how it is run, and explains its keys."""
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert any("gru " in line for line in lines if line.startswith("#"))
    assert sum("#" in line for line in lines) >= 10


@pytest.mark.parametrize("file", SEARCHED, ids=lambda file: file.stem)
def test_families_are_compared_on_equal_terms(file: Path) -> None:
    """DESIGN, "A fair comparison": plain, sum and rectified, sum without a moving average, each its own weight."""
    families = settings.load(str(file)).search.families
    assert set(families) == {"plain", "sum", "rectified"}
    assert families["plain"].fixed["rectify.rule"] == "none"
    assert families["sum"].fixed == {"rectify.rule": "sum", "rectify.ema": 1.0}
    assert "rectify.retain_weight" in families["sum"].space
    assert families["rectified"].space["rectify.strength"]["low"] == 0


def test_the_demo_needs_nothing_from_outside() -> None:
    config = settings.load("demo")
    assert (config.benchmark.name, config.model.path, config.retain_model) == ("authors", "prepared", "prepared")
    assert config.train.workers == 0
    assert config.search.trials >= 24
    assert len(config.search.space["unlearn.objective"]) == 2
    strength = config.search.families["rectified"].space["rectify.strength"]
    assert (strength["low"], strength["high"]) == (0.0, 5.0)


def test_the_demo_fits_its_benchmark() -> None:
    """Every retain size of the search exists, and a run passes over all of its rows, so that size can matter."""
    config: RunConfig = settings.load("demo")
    benchmark = load_benchmark(config.benchmark)
    check_metrics(config.evaluate, True, benchmark)
    for size in config.search.space["retain.size"]:
        sized = settings.with_values(config, {"retain.size": size})
        assert len(retain_subset(benchmark, sized.retain, 0)) == size
        assert size <= config.unlearn.steps * config.unlearn.batch_size


def test_the_llama_study_names_the_published_models_and_settings() -> None:
    config = settings.load("tofu_llama32_1b")
    assert config.model.path == "open-unlearning/tofu_Llama-3.2-1B-Instruct_full"
    assert config.retain_model == "open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90"
    assert config.model.dtype == "bfloat16"
    assert config.unlearn.batch_size * config.unlearn.steps >= 5 * 400  # five epochs of forget10
    assert (config.unlearn.lr, config.unlearn.weight_decay, config.rectify.ema) == (1e-5, 0.01, 0.8)


@pytest.mark.parametrize("name", ["muse_news", "muse_news_scalability", "muse_news_sustainability"])
def test_the_muse_studies_name_the_published_models_and_settings(name: str) -> None:
    config = settings.load(name)
    assert config.model.path == "muse-bench/MUSE-News_target"
    assert config.model.tokenizer == "meta-llama/Llama-2-7b-hf"
    assert config.retain_model == "muse-bench/MUSE-News_retrain"
    assert (config.evaluate.unlearning, config.evaluate.retention) == ("forget_verbmem", "retain_knowmem")
    assert {"forget_verbmem", "forget_knowmem", "retain_knowmem", "privleak"} <= set(config.evaluate.metrics)
    assert (config.unlearn.lr, config.unlearn.batch_size) == (1e-5, 32)
    assert config.requests.sequential == name.endswith("sustainability")
    splits = {"muse_news_scalability": "scal", "muse_news_sustainability": "sust"}
    assert list(config.requests.splits) == [f"news/{splits[name]}_{n}" for n in range(1, 5) if name in splits]
