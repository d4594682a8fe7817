"""YAML and --set into configs: what is taken, what is refused and in which words, and the way back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gru_core.config import RectifyConfig, RunConfig, SearchConfig
from gru_core.errors import ConfigError, InputError
from pipelines import settings, yamltext

NAMES = st.text(st.characters(categories=("L", "N", "P", "Zs")), max_size=20)


def write(folder: Path, text: str) -> str:
    file = folder / "study.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def refused(*overrides: str) -> str:
    """The one line with which an override is refused."""
    with pytest.raises(InputError) as caught:
        settings.check(settings.load(None, overrides))
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_no_source_gives_the_defaults() -> None:
    assert settings.load(None) == RunConfig()


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    config = settings.load(write(tmp_path, "rectify: {strength: 2}\nunlearn:\n  lr: 1e-5\n"))
    assert config.rectify == RectifyConfig(strength=2.0)
    assert isinstance(config.rectify.strength, float)
    assert config.unlearn.lr == 0.00001
    assert config.benchmark == RunConfig().benchmark


@pytest.mark.parametrize("text", ["", "# only a comment\n", "rectify:\n", "{}"])
def test_an_empty_file_or_section_is_the_default(tmp_path: Path, text: str) -> None:
    assert settings.load(write(tmp_path, text)) == RunConfig()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E5", 1e5), ("-2e+3", -2000.0), ("1.5", 1.5), ("1.5e-3", 0.0015), (".5", 0.5), ("3", 3),
        ("-7", -7), ("1.", 1.0), ("e5", "e5"), ("1e", "1e"), ("2024-01-01", "2024-01-01"), ("12e3x", "12e3x"),
        ("true", True), ("null", None), ("", None), ("'1e-5'", "1e-5"),
    ],
)  # fmt: skip
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    parsed = yamltext.parse(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | NAMES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
        max_leaves=8,
    ).map(lambda value: {"key": value})
)
def test_what_dump_writes_parse_reads(value: dict[str, object]) -> None:
    assert yamltext.parse(yamltext.dump(value), "test") == value


def test_the_resolved_config_is_valid_input_and_complete(tmp_path: Path) -> None:
    config = settings.load(
        None,
        [
            "rectify.strength=2", "retain.size=200", "unlearn.lr=3e-4", "unlearn.clip=null",
            "search.trials=4", "search.space={retain.size: [50, 0.5], unlearn.lr: {low: 1e-5, high: 1e-3, log: true}}",
            "search.families={a: {fixed: {rectify.rule: none}}, b: {}}", "track.experiment='1e5'",
        ],
    )  # fmt: skip
    text = settings.to_yaml(config)
    assert settings.load(write(tmp_path, text)) == config
    assert settings.from_dict(settings.to_dict(config)) == config
    assert yaml.safe_load(text)["model"]["path"] == "prepared"  # another reader reads it too
    sections = [line.rstrip(":") for line in text.splitlines() if re.fullmatch(r"\w+:", line)]
    assert sections == ["model", "benchmark", "unlearn", "rectify", "retain", "train", "evaluate", "prepare",
                        "search", "requests", "track", "output"]  # fmt: skip
    assert "    unlearn.lr: {low: 1.0e-05, high: 0.001, log: true}" in text.splitlines()


def test_overrides_win_in_order_and_sections_are_merged(tmp_path: Path) -> None:
    file = write(tmp_path, "rectify: {rule: sum, ema: 0.6}\n")
    config = settings.load(file, ["rectify={retain_weight: 3}", "rectify.ema=0.9", "rectify.ema=0.5"])
    assert config.rectify == RectifyConfig(rule="sum", ema=0.5, retain_weight=3.0)


def test_dotted_keys_below_space_stay_whole() -> None:
    config = settings.load(
        None,
        [
            "search.space={rectify.strength: {low: 0, high: 5}}",
            "search.space.rectify.strength.high=3",
            "search.space.retain.size=[50, 100]",
            "search.families.mine.fixed.rectify.rule=none",
            "search.families.mine.space.unlearn.lr=[1e-5, 1e-4]",
        ],
    )
    assert config.search.space == {"rectify.strength": {"low": 0, "high": 3}, "retain.size": [50, 100]}
    assert config.search.families["mine"].fixed == {"rectify.rule": "none"}
    assert config.search.families["mine"].space == {"unlearn.lr": [1e-5, 1e-4]}


def test_with_values_checks_and_leaves_the_original_alone() -> None:
    before = RunConfig()
    after = settings.with_values(before, {"rectify.strength": 2, "retain.size": 100})
    assert (after.rectify.strength, after.retain.size) == (2.0, 100)
    assert before == RunConfig()
    with pytest.raises(ConfigError, match=r"^rectify\.strength: got -1"):
        settings.with_values(before, {"rectify.strength": -1.0})
    with pytest.raises(InputError, match=r"unknown key 'rectify\.power'"):
        settings.with_values(before, {"rectify.power": 1.0})


def test_flat_has_every_key_once_and_scalars_alone() -> None:
    config = settings.load(None, ["search.space={retain.size: [50, 100]}"])
    flat = settings.flat(config)
    assert flat["rectify.strength"] == 1.0
    assert flat["model.lora"] is None
    assert flat["evaluate.metrics"] == "extraction_strength, model_utility"
    assert flat["search.space.retain.size"] == "50, 100"
    assert all(isinstance(value, str | int | float | bool | None) for value in flat.values())
    lora = {f"model.lora.{name}" for name in ("rank", "alpha", "dropout", "targets")}
    empty = {"search.space", "search.families", "evaluate.lm_eval.data"}
    best = {"evaluate.best.maximise", "evaluate.best.at_least"}
    assert set(settings.keys()) - set(flat) == empty | lora | best  # model.lora and evaluate.best are null


# ------------------------------------------------------------------------------------------------ refusals

BAD = [
    ("rectify.strenght=1", "unknown key 'rectify.strenght'; did you mean 'rectify.strength'?", "rectify.ema"),
    ("strength=1", "unknown key 'strength'; did you mean 'rectify.strength'?", "unlearn"),
    ("rectfy.rule=gru", "unknown key 'rectfy'; did you mean 'rectify'?", "benchmark"),
    ("rectify.strength.low=1", "unknown key 'rectify.strength.low'; did you mean 'rectify.strength'?", ""),
    ("search.families.a.fixd={}", "unknown key 'search.families.a.fixd'", "search.families.a.fixed"),
    ("rectify={rule: gru, strenght: 1}", "unknown key 'rectify.strenght'", "rectify.strength"),
    ("rectify.strength=-0.5", "rectify.strength: got -0.5", "from 0"),
    ("rectify.strength=.nan", "rectify.strength: got nan", "from 0"),
    ("rectify.strength=.inf", "rectify.strength: got inf", "from 0"),
    ("rectify.strength=yes", "rectify.strength: got True", "a number"),
    ("rectify.strength=two", "rectify.strength: got 'two'", "a number"),
    ("rectify.ema=0", "rectify.ema: got 0.0", "above 0, at most 1"),
    ("rectify.ema=1.1", "rectify.ema: got 1.1", "above 0, at most 1"),
    ("retain.size=0", "retain.size: got 0", "a row count from 1"),
    ("retain.size=1.5", "retain.size: got 1.5", "at most 1.0"),
    ("retain.size=true", "retain.size: got True", "a whole number or a number"),
    ("unlearn.steps=0", "unlearn.steps: got 0", "a whole number from 1"),
    ("unlearn.steps=2.5", "unlearn.steps: got 2.5", "a whole number"),
    ("unlearn.steps=", "unlearn.steps: got None", "a whole number"),
    ("unlearn.schedule=step", "unlearn.schedule: got 'step'", "constant, linear, cosine"),
    ("unlearn.dropout=1", "unlearn.dropout: got 1", "true or false"),
    ("model.path=3", "model.path: got 3", "text"),
    ("model.dtype=float16", "model.dtype: got 'float16'", "bfloat16"),
    ("model.lora={r: 8}", "unknown key 'model.lora.r'", "rank"),
    ("model.lora=8", "model.lora: got 8", "a mapping"),
    ("model.lora.rank=0", "model.lora.rank: got 0", "from 1"),
    ("train.strategy=fsdp", "train.workers: got 0", "fsdp"),
    ("train.strategy=zero", "train.strategy: got 'zero'", "ddp, fsdp"),
    ("train.workers=40", "unlearn.batch_size: got 32", "at least train.workers (40)"),
    ("train.min_workers=3", "train.min_workers: got 3", "1 to train.workers"),
    ("train.cpu_offload=true", "train.cpu_offload: got True", "fsdp"),
    ("train.grace=0", "train.grace: got 0", "above 0"),
    ("output.merged=true", "output.merged: got True", "model.lora"),
    ("train.gpus_per_worker=all", "train.gpus_per_worker: got 'all'", "a number or auto"),
    ("train.workers=-1", "train.workers: got -1", "from 0"),
    ("evaluate.metrics=extraction_strength", "evaluate.metrics: got 'extraction_strength'", "a list"),
    ("evaluate.metrics=[]", "evaluate.metrics", "at least one"),
    ("rectify=3", "rectify: got 3", "a mapping"),
    ("unlearn.objective=gaa", "unknown objective 'gaa'; did you mean 'ga'?", "npo"),
    ("rectify.rule=gro", "unknown rule 'gro'; did you mean 'gru'?", "sum"),
    ("retain.loss=nl", "unknown retain loss 'nl'; did you mean 'nll'?", "nll"),
    ("benchmark.name=author", "unknown benchmark 'author'; did you mean 'authors'?", "tofu"),
    ("evaluate.metrics=[extraction]", "unknown metric 'extraction'; did you mean", "model_utility"),
    ("evaluate.unlearning=model_utility", "evaluate.unlearning: got 'model_utility'", "extraction_strength"),
    ("evaluate={metrics: [forget_quality]}", "forget_quality", "retain_model"),
    ("search.trials=7", "search.trials: got 7", "a multiple of 3"),
    ("search.metrics=[speed]", "search.metrics: got ['speed']", "retention"),
    ("search.space={rectify.power: [1]}", "unknown key in search.space 'rectify.power'", "rectify.strength"),
    ("search.space={search.trials: [1]}", "search.space: 'search.trials' cannot differ between trials", "rectify"),
    ("search.space={rectify.strength: {low: -1, high: 1}}", "search.space.rectify.strength", "from 0"),
    ("search.space={rectify.ema: {low: 0.5, high: 1.5}}", "search.space.rectify.ema", "at most 1"),
    ("search.space={rectify.ema: {low: 0.5, hihg: 1}}", "'hihg'; did you mean 'high'?", "low"),
    ("search.space={rectify.ema: {low: 0.5}}", "search.space.rectify.ema.high: got None", "a number"),
    ("search.space={rectify.ema: {low: 0.9, high: 0.5}}", "search.space.rectify.ema.high: got 0.5", "above low"),
    ("search.space={rectify.strength: {low: 0, high: 5, log: true}}", "strength.low: got 0", "above 0"),
    ("search.space={unlearn.steps: {low: 10, high: 20.5}}", "search.space.unlearn.steps", "a whole number"),
    ("search.space={unlearn.objective: [npo, gaa]}", "unknown objective 'gaa'", "npo"),
    ("search.space={rectify.ema: []}", "search.space.rectify.ema: got []", "at least one"),
    ("search.space={rectify.ema: 0.5}", "search.space.rectify.ema: got 0.5", "a list of choices"),
    ("search.families={a: {fixed: {rectify.rule: gro}}, b: {}, c: {}}", "unknown rule 'gro'", "gru"),
    ("search.families={a: {fixed: {rectify.ema: 3}}}", "search.families.a.fixed", "at most 1"),
    ("search.families={a: {fixed: {rectify.ema: 1}, space: {rectify.ema: [1]}}}", "both fixed and space", "one"),
    ("no-equals-sign", "--set 'no-equals-sign'", "key=value"),
    ("=1", "--set '=1'", "key=value"),
    ("output.dir=[", "--set output.dir, line 1", "expected"),
    ("rectify={ema: 1, ema: 2}", "key 'ema' given twice", "line 1"),
    ("model.path=!!python/name:os.system", "--set model.path, line 1", "python"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "names", "allowed"), BAD, ids=[case[0] for case in BAD])
def test_bad_values_are_named_with_what_is_allowed(override: str, names: str, allowed: str) -> None:
    line = refused(override)
    assert names in line
    assert allowed in line


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("rectify:\n  ema: 1\n  ema: 0.8\n", 3, "key 'ema' given twice (first on line 2)"),
        ("rectify: {ema: 1}\nunlearn: {}\nrectify: {}\n", 3, "key 'rectify' given twice (first on line 1)"),
        ("rectify:\n  ema: [1\n", 3, "expected"),
        ("rectify:\n\tema: 1\n", 2, "cannot start any token"),
        ("a: &x 1\nb: *y\n", 2, "undefined alias"),
        ("a: 1\n---\nb: 1\n", 2, "but found another document"),
        ("a: !!python/object/apply:os.getcwd []\n", 1, "python"),
    ],
)
def test_malformed_yaml_names_file_and_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        settings.load(file)
    assert str(caught.value).startswith(f"{file}, line {line}, column ")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a: \x00", "not a text file"),
        (b"- a\n- b\n", "got list"),
        (b"text", "got str"),
        (b"a: &x [*x]", "a value that no key can hold"),
        (b"unlearn: {1: 2}", "unknown key 'unlearn.1'"),
        (b"a: " + b"[" * 5000, ""),
        (b"unlearn: {steps: " + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(tmp_path: Path, raw: bytes, what: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        settings.load(str(file))
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_source_that_does_not_exist_lists_the_shipped_studies(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'demmo'; did you mean 'demo'\? \(shipped: demo, .*own_data.*\)"):
        settings.load("demmo")
    with pytest.raises(InputError, match=r"did you mean 'demo'\?"):
        settings.load(str(tmp_path / "demo.yaml"))
    with pytest.raises(InputError, match="a folder, expected a YAML file"):
        settings.load(str(tmp_path))


def test_shipped_studies_load_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings.load("demo").benchmark.name == "authors"
    (tmp_path / "demo").mkdir()  # a folder of that name does not hide it
    assert settings.load("demo").benchmark.name == "authors"


def test_an_error_of_the_config_itself_keeps_its_own_words() -> None:
    """The line for a bad value is the same from YAML as from the dataclass."""
    with pytest.raises(ConfigError) as ours:
        settings.load(None, ["search.sampler=optuna", "search.concurrent=0"])
    with pytest.raises(ConfigError) as theirs:
        SearchConfig(concurrent=0)
    assert str(ours.value) == str(theirs.value)
    assert ours.value.field == "search.concurrent"


def test_relative_paths_stay_as_typed() -> None:
    config = settings.load(None, ["output.dir=runs/x", "benchmark.data_dir=../data", "model.path=~/m"])
    assert (config.output.dir, config.benchmark.data_dir, config.model.path) == ("runs/x", "../data", "~/m")
