"""What each family searches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from gru_core.config import RunConfig
from gru_core.errors import ConfigError, InputError
from pipelines import settings, space
from pipelines.search_inputs import retains, warn_size


def config(**values: Any) -> RunConfig:
    return settings.with_values(settings.load(None), values)


def families(given: RunConfig) -> tuple[dict[str, space.Family], list[str]]:
    said: list[str] = []
    return {family.name: family for family in space.families(given, said.append)}, said


def own(**parts: Any) -> dict[str, Any]:
    return {"search.families": parts}


def test_default_families_search_a_weight_of_their_own() -> None:
    shared = {"unlearn.lr": {"low": 1e-5, "high": 1e-3, "log": True}, "retain.size": [100, 200]}
    found, said = families(config(**{"search.space": shared}))
    assert {name: sorted(family.space) for name, family in found.items()} == {
        "plain": ["unlearn.lr"],
        "sum": ["rectify.retain_weight", "retain.size", "unlearn.lr"],
        "rectified": ["rectify.strength", "retain.size", "unlearn.lr"],
    }
    assert {family.trials for family in found.values()} == {8}
    assert found["sum"].fixed == {"rectify.rule": "sum", "rectify.ema": 1.0}
    assert said == ["note: retain.size not searched in family plain: fixed, or without effect there"]


def test_a_shared_dimension_takes_the_place_of_a_default_one() -> None:
    shared = {"rectify.strength": {"low": 0.0, "high": 2.0}, "rectify.ema": [0.8, 1.0], "unlearn.lr": [1e-3, 2e-3]}
    found, said = families(config(**{"search.space": shared}))
    assert found["rectified"].space["rectify.strength"] == {"low": 0.0, "high": 2.0}
    assert "rectify.ema" not in found["sum"].space  # fixed at 1 there
    assert "rectify.strength" not in found["sum"].space
    assert len(said) == 3  # plain and sum drop some; plain has fewer combinations than its share


def test_families_of_your_own() -> None:
    given = config(
        **own(
            mild={"fixed": {"rectify.rule": "gru"}, "space": {"rectify.strength": {"low": 0.0, "high": 1.0}}},
            strong={"fixed": {"rectify.rule": "gru"}, "space": {"rectify.strength": {"low": 1.0, "high": 9.0}}},
        )
    )
    found, said = families(given)
    assert [family.trials for family in found.values()] == [12, 12]
    assert said == [
        "note: no family of this search is plain unlearning (rectify.rule none): there is no such base line"
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (own(a={"fixed": {"rectify.rule": "none"}, "space": {"rectify.strength": [1.0, 2.0]}}), "no effect"),
        ({"search.space": {"train.workers": [1, 2]}}, "cannot differ between trials"),
        ({"search.space": {"model.path": ["a", "b"]}}, "cannot differ between trials"),
        ({"search.trials": 25}, "a multiple of 3"),
        ({"search.sampler": "grid", "search.space": {"unlearn.lr": {"low": 1e-5, "high": 1e-3}}}, "range with a step"),
        (own(**{"a/b": {"fixed": {"rectify.rule": "none"}}}), "names of letters"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        families(config(**values))


def test_a_grid_beyond_the_budget_is_refused_with_its_size() -> None:
    sizes = {"retain.size": [50, 100, 200], "unlearn.steps": {"low": 20, "high": 80, "step": 20}}
    given = own(one={"fixed": {"rectify.rule": "sum", "rectify.retain_weight": 1.0}})
    with pytest.raises(InputError, match="family one has 12 combinations"):
        families(config(**given, **{"search.sampler": "grid", "search.space": sizes, "search.trials": 11}))
    found, _ = families(config(**given, **{"search.sampler": "grid", "search.space": sizes, "search.trials": 99}))
    assert found["one"].trials == 12
    assert found["one"].grid is not None
    assert found["one"].grid[:2] == (
        {"retain.size": 50, "unlearn.steps": 20},
        {"retain.size": 50, "unlearn.steps": 40},
    )


def test_a_family_with_fewer_settings_than_trials_runs_each_once() -> None:
    found, said = families(config(**{"search.space": {"unlearn.objective": ["ga", "npo"]}}))
    assert found["plain"].trials == 2
    assert found["plain"].grid == ({"unlearn.objective": "ga"}, {"unlearn.objective": "npo"})
    assert found["rectified"].grid is None
    assert said == ["note: families of different size (plain 2, sum 8, rectified 8 trials): hypervolume grows with "
                    "the number of trials"]  # fmt: skip


def test_distributions_follow_the_field() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = space.distributions(
            {
                "rectify.strength": {"low": 0, "high": 5},  # a number: 0 to 5 is a range of all of them
                "unlearn.steps": {"low": 20, "high": 90, "step": 20},
                "retain.size": {"low": 10, "high": 1000, "log": True},
                "rectify.ema": {"low": 0.5, "high": 1.0, "step": 0.2},
                "unlearn.lr": {"low": 1e-5, "high": 1e-3, "log": True},
                "unlearn.objective": ["ga", "npo"],
            }
        )
    assert found == {
        "rectify.strength": FloatDistribution(0.0, 5.0),
        "unlearn.steps": IntDistribution(20, 80, step=20),
        "retain.size": IntDistribution(10, 1000, log=True),
        "rectify.ema": FloatDistribution(0.5, 0.9, step=0.2),
        "unlearn.lr": FloatDistribution(1e-5, 1e-3, log=True),
        "unlearn.objective": CategoricalDistribution((0, 1)),
    }


def test_choices_that_python_takes_for_equal_stay_apart() -> None:
    dimensions: dict[str, Any] = {"retain.size": [1, 1.0]}  # one row, or all of them
    for place in (0, 1):
        params = space.decode(dimensions, {"retain.size": place})
        assert type(params["retain.size"]) is (int, float)[place]
        assert space.encode(dimensions, params) == {"retain.size": place}


def test_a_trial_is_a_valid_config_of_its_own() -> None:
    base = config(**{"search.space": {"unlearn.lr": [1e-3, 2e-3]}})
    one = space.trial_config(base, {"rectify.rule": "sum", "unlearn.lr": 0.002}, "runs/x/trials/sum-000")
    assert (one.rectify.rule, one.unlearn.lr, one.output.dir) == ("sum", 0.002, "runs/x/trials/sum-000")
    assert one.search.space == {}
    assert settings.from_dict(settings.to_dict(one)) == one
    with pytest.raises(ConfigError, match=r"rectify\.strength"):
        space.trial_config(base, {"rectify.strength": -1.0}, "x")


def test_retain_sets_at_both_ends_and_the_warning() -> None:
    given = config(**{"search.space": {"retain.size": {"low": 100, "high": 3000}, "unlearn.steps": [10, 60]}})
    found = retains(given, space.families(given, lambda line: None))
    assert [(each.size, reads) for (each, _), reads in found] == [(100, 1920), (3000, 1920)] * 2  # not in plain
    said: list[str] = []
    warn_size([100, 3000], [1920, 1920], said.append)
    assert said == [
        "note: retain sets of up to 3000 rows, but a run reads at most 1920 (steps x batch_size): sizes above that "
        "cannot matter"
    ]
    warn_size([100, 1920], [1920, 1920], said.append)
    assert len(said) == 1
