"""Options are read once: a single value stands for a list of one, and what can't be used is one line."""

import inspect
import pickle
from pathlib import Path

import numpy as np
import pytest

from moa_search import api
from moa_search.errors import ConfigError
from moa_search.options import (
    CompareOptions,
    DiffOptions,
    EvalOptions,
    FrontOptions,
    HardwareOptions,
    HarnessOptions,
    ImportOptions,
    InspectPlanOptions,
    ProfileOptions,
    ReportOptions,
    SearchOptions,
    ThroughputOptions,
    TuneOptions,
    ValidateOptions,
    takes,
)
from moa_search.options.base import Options

REQUIRED = {
    HarnessOptions: {"tasks": "t"},
    ReportOptions: {"output": "o"},
    TuneOptions: {"model": "demo", "output": "o"},
    ValidateOptions: {"model": "demo"},
}
KINDS = (
    CompareOptions, DiffOptions, EvalOptions, FrontOptions, HardwareOptions, HarnessOptions, ImportOptions,
    InspectPlanOptions, ProfileOptions, ReportOptions, ThroughputOptions, TuneOptions, ValidateOptions,
)  # fmt: skip
ONE = {
    "density": 0.25, "kv_share": 0.125, "densities": 0.5, "kv_shares": 0.125, "budget_lengths": 1024,
    "budget": "kv=2MiB@2048",
    "predict_lengths": 4096,
    "layer_floor": "0=1.0", "searchers": "moa", "lengths": 512, "sources": "copy", "criteria": "signed",
    "devices": "cuda:0", "tasks": "copy", "plan": "plan.json", "baselines": "dense", "depths": 0.5, "against": "dense",
    "ways": "plan", "batch": "1", "tiers": 8, "heads": "7:2", "fold_lengths": 1024, "samples": 7, "bits": 8,
    "rivals": "int4", "questions": "unknown",
    "context": 1024, "card": 24.0,
}  # fmt: skip


def made(kind, **values):
    return kind(**{**REQUIRED.get(kind, {}), **values})


def lists(kind):
    """Names of the options that take several values."""
    found = [name for name in kind.model_fields if "Sequence" in str(kind.model_fields[name].annotation)]
    assert found or kind is HardwareOptions
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_one_value_is_a_list_of_one(kind):
    for name in lists(kind):
        value = ONE[name]
        several = made(kind, **{name: [value]})
        for given in (value, (value,), np.array([value]) if not isinstance(value, str) else [value], iter([value])):
            assert list(getattr(made(kind, **{name: given}), name)) == list(getattr(several, name)) == [value]
        assert getattr(made(kind, **{name: str(value)}), name)[0] == value, "as a flag gives it"


@pytest.mark.parametrize("kind", KINDS)
def test_none_where_a_list_is_meant_is_none_given(kind):
    for name in lists(kind):
        if kind.model_fields[name].default == ():
            assert not getattr(made(kind, **{name: None}), name)


@pytest.mark.parametrize(
    ("kind", "name"), [(SearchOptions, "budget_lengths"), (CompareOptions, "lengths"), (ValidateOptions, "lengths")]
)
def test_none_is_the_default_and_an_empty_list_is_refused_where_lengths_are_needed(kind, name):
    assert getattr(made(kind, **{name: None}), name) is None
    with pytest.raises(ConfigError, match=f"^{name}: "):
        made(kind, **{name: []})


@pytest.mark.parametrize(
    "given", [{1024: 1, 2048: 3.0}, ["1024=1", "2048=3"], ("1024=1", "2048=3.0"), {"1024": "1", "2048": 3}]
)
def test_weights_as_a_mapping_or_as_text(given):
    assert SearchOptions(length_weights=given).length_weights == {1024: 1.0, 2048: 3.0}
    assert SearchOptions(length_weights="512=2").length_weights == {512: 2.0}


@pytest.mark.parametrize("given", [{"0-1": 1.0, 29: 0.5}, ["0-1=1.0", "29=0.5"]])
def test_floors_as_a_mapping_or_as_text(given):
    assert list(SearchOptions(layer_floor=given).layer_floor) == ["0-1=1.0", "29=0.5"]


def test_a_plan_is_one_value_and_paths_are_text(tiny_plan):
    assert EvalOptions(plan=tiny_plan).plan == [tiny_plan]
    assert EvalOptions(plan=Path("a.json"), output=Path("b.csv")) == EvalOptions(plan=["a.json"], output="b.csv")
    assert EvalOptions(plan=[tiny_plan, Path("a.json")]).plan == [tiny_plan, "a.json"]


def test_numbers_of_numpy_are_numbers():
    options = SearchOptions(density=np.float64(0.25), min_span=np.int64(64), budget_lengths=np.array([512, 1024]))
    assert (options.density, options.min_span, options.budget_lengths) == ([0.25], 64, [512, 1024])


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        (SearchOptions, {"density": 1.5}, "density: 1.5 is out of range; it must be at most 1"),
        (SearchOptions, {"density": [0.5, 0]}, "density: 0 is out of range; it must be over 0"),
        (SearchOptions, {"density": float("nan")}, "density: nan is out of range; it must be finite"),
        (SearchOptions, {"densty": 0.5}, "unknown option 'densty' (did you mean 'density'?)"),
        (SearchOptions, {"searcher": "moar"}, "searcher: 'moar' is unknown (did you mean 'moa'?); choose from"),
        (SearchOptions, {"rules_per_layer": 3}, "rules_per_layer: 3 is out of range; it must be at most 2"),
        (SearchOptions, {"robust": -1}, "robust: -1 is out of range; it must be at least 0"),
        (SearchOptions, {"front_steps": -1}, "front_steps: -1 is out of range; it must be at least 0"),
        (SearchOptions, {"front_steps": 1.5}, "front_steps: '1.5' is no whole number"),
        (SearchOptions, {"time_limit_s": 0}, "time_limit_s: 0 is out of range; it must be over 0"),
        (SearchOptions, {"length_weights": "512:1"}, "length_weights: '512:1' isn't of the form LENGTH=WEIGHT"),
        (SearchOptions, {"length_weights": {"a": 1}}, "length_weights: 'a' is no whole number"),
        (CompareOptions, {"searchers": ["exact", "moar"]}, "searchers: 'moar' is unknown (did you mean 'moa'?)"),
        (ProfileOptions, {"lengths": 0}, "lengths: 0 is out of range; it must be over 0"),
        (ProfileOptions, {"lengths": []}, "lengths"),
        (ProfileOptions, {"lengths": 2**27 + 1}, "lengths: 134217729 is out of range; it must be at most 134217728"),
        (ProfileOptions, {"tiers": "16,8,4"}, "tiers: '16,8,4' is no whole number; put spaces between several"),
        (ProfileOptions, {"samples": "many"}, "samples: 'many' is no whole number"),
        (ProfileOptions, {"resume": "perhaps"}, "resume: 'perhaps' is neither true nor false"),
        (ProfileOptions, {"sink": -1}, "sink: -1 is out of range; it must be at least 0"),
        (EvalOptions, {"depths": [0.5, 1.5]}, "depths: 1.5 is out of range; it must be at most 1"),
        (ReportOptions, {}, "output is required"),
        (ThroughputOptions, {"ways": "plann"}, "ways: 'plann' is unknown (did you mean 'plan'?)"),
        (TuneOptions, {"trials": 0, "model": "demo", "output": "o"}, "trials: 0 is out of range; it must be over 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(kind, given, says):
    with pytest.raises(ConfigError) as caught:
        kind(**given)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [FrontOptions, TuneOptions])
def test_one_density_and_several_stand_together(kind):
    from moa_search.cli import search
    from moa_search.cli.command import parser_of

    command = search.MAIN if kind is FrontOptions else search.COMMANDS["tune"]
    groups = [group for group in parser_of("moa-search", command)._action_groups if group.title == "budgets"]
    (budgets,) = groups
    named = {action.dest for action in budgets._group_actions}
    assert {"density", "densities", "kv_share", "budget"} <= named


def test_options_travel_and_change():
    options = FrontOptions(density=0.5, output="o", length_weights={512: 1})
    assert pickle.loads(pickle.dumps(options)) == options
    assert options.part(SearchOptions) == SearchOptions(density=0.5, length_weights={512: 1})
    assert options.replace(density=0.25).density == [0.25]
    with pytest.raises(ConfigError, match="density"):
        options.replace(density=2)


FUNCTIONS = [getattr(api, name) for name in api.__all__ if hasattr(getattr(api, name), "options")]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_show_their_options(function):
    """In `help`, in notebooks and wherever else signatures are shown."""
    parameters = inspect.signature(function).parameters
    for name, field in function.options.model_fields.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert field.description
        assert f"{name}: {field.description}" in function.__doc__
    assert "options:" not in function.__doc__


class TestTakes:
    @pytest.fixture
    def function(self):
        @takes(SearchOptions)
        def function(profile: str, options: SearchOptions) -> tuple[str, SearchOptions]:
            """Do.

            Args:
                profile: A file.
                options: As keywords.
            """
            return profile, options

        return function

    def test_calls(self, function):
        wanted = ("p", SearchOptions(density=[0.5]))
        assert (
            function("p", density=0.5)
            == function(Path("p"), density=[0.5])
            == function(profile="p", density=0.5)
            == wanted
        )

    def test_wrong_calls(self, function):
        with pytest.raises(TypeError, match="lacks its argument profile"):
            function(density=0.5)
        with pytest.raises(TypeError, match="one argument without a name"):
            function("p", 0.5)
        with pytest.raises(ConfigError, match="did you mean 'density'"):
            function("p", densitty=0.5)


def test_every_option_is_described_and_no_group_is_without_a_heading():
    def below(kind):
        return [kind, *(deeper for each in kind.__subclasses__() for deeper in below(each))]

    for kind in below(Options)[1:]:
        assert kind.__doc__
        assert len(kind.__doc__) < 40
        for name, field in kind.model_fields.items():
            assert (field.description or "").endswith("."), f"{kind.__name__}.{name}"
