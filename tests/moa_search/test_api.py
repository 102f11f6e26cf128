import typing

import numpy as np
import pytest

from moa_search import api, load_model
from moa_search.errors import ConfigError
from moa_search.models import DTYPES
from moa_search.search import CRITERIA


def test_choices_are_those_of_the_parts_that_use_them():
    assert typing.get_args(api.Criterion) == CRITERIA
    assert typing.get_args(api.Dtype) == DTYPES


def test_a_loaded_model_serves_as_well_as_its_name(tiny_model_dir, tmp_path):
    """Profile, search and evaluate in Python, nothing read twice."""
    loaded = load_model(str(tiny_model_dir), dtype="float32")
    profile = api.profile_model(loaded, lengths=[300], samples=2)
    again = api.profile_model(str(tiny_model_dir), lengths=[300], samples=2, dtype="float32")
    np.testing.assert_array_equal(profile.by_length[300].loss, again.by_length[300].loss)
    plan = api.search_plan(profile, density=0.5)
    items = api.evaluate_model(loaded, plan=[plan], lengths=[300], samples=2)
    assert set(items["variant"]) == {"dense", "uniform", "signed"}
    assert api.inspect_plan(plan, lengths=[300], output=str(tmp_path / "spans.png")) is plan
    assert (tmp_path / "spans.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": [300, 300]}, "twice"),
        ({"samples": 0}, "samples"),
        ({"sink": -1}, "sink"),
        ({"lengths": []}, "lengths"),
        ({"row_buckets": 0}, "row_buckets"),
    ],
)
def test_settings_that_cannot_be(tiny_model_dir, changes, words):
    with pytest.raises(ConfigError, match=words):
        api.profile_model(str(tiny_model_dir), **{"lengths": [300], "samples": 1, **changes})


def test_plans_of_one_name_are_told_apart(tiny_plan, tmp_path):
    names = {}
    for path in ("half/plan.json", "quarter/plan.json", "other/half.json", "a/half.json"):
        tiny_plan.save(tmp_path / path)
        names[api._plan_name(str(tmp_path / path), tiny_plan, len(names), names)] = tiny_plan
    assert list(names) == ["half", "quarter", "other/half", "a/half"]
