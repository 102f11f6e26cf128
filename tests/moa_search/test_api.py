import typing
from contextlib import contextmanager

import numpy as np
import pytest

from moa_search import api, load_model, options
from moa_search.api.variants import given_plans, plan_name
from moa_search.errors import ConfigError, MoAError
from moa_search.modeling.loading import DTYPES
from moa_search.parallel import Workers
from moa_search.search import CRITERIA


def test_choices_are_those_of_the_parts_that_use_them():
    assert typing.get_args(options.Criterion) == CRITERIA
    assert typing.get_args(options.Dtype) == DTYPES


def test_a_loaded_model_serves_as_well_as_its_name(tiny_model_dir, tmp_path):
    """Profile, search and evaluate in Python, nothing read twice."""
    loaded = load_model(str(tiny_model_dir), dtype="float32")
    profile = api.profile_model(loaded, lengths=[300], samples=2, answers="dataset")
    again = api.profile_model(str(tiny_model_dir), lengths=[300], samples=2, answers="dataset", dtype="float32")
    np.testing.assert_array_equal(profile.by_length[300].loss, again.by_length[300].loss)
    plan = api.search_plan(profile, density=0.5)
    items = api.evaluate_model(loaded, plan=[plan], lengths=[300], samples=2)
    assert set(items["variant"]) == {"dense", "uniform like signed", "signed"}
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


def test_a_folder_for_samples_is_looked_at_before_the_work(tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("keep")
    monkeypatch.setattr("moa_search.modeling.loading.load_model", lambda *a, **b: pytest.fail("the work began"))
    with pytest.raises(ConfigError, match="holds no samples; give another folder"):
        api.profile_model(str(tiny_model_dir), save_samples=str(tmp_path / "mine"))


def test_only_the_first_process_needs_the_output_folder(tiny_model_dir, tmp_path, monkeypatch):
    """As docs/profiling.md promises for several machines."""

    class Second(Workers):
        def everywhere(self, mine):
            return [mine]

        def from_first(self, value):
            raise MoAError("got as far as profiling")

    @contextmanager
    def second():
        yield Second(1, 2)

    monkeypatch.setattr("moa_search.parallel.joined", second)
    (tmp_path / "file").write_text("")
    options = {"lengths": [300], "samples": 1, "answers": "dataset", "output": str(tmp_path / "file" / "p")}
    with pytest.raises(MoAError, match="got as far"):
        api.profile_model(str(tiny_model_dir), **options)


def test_plans_of_one_name_are_told_apart(tiny_plan, tmp_path):
    names = {}
    for path in ("half/plan.json", "quarter/plan.json", "other/half.json", "a/half.json"):
        tiny_plan.save(tmp_path / path)
        names[plan_name(str(tmp_path / path), tiny_plan, len(names), names)] = tiny_plan
    assert list(names) == ["half", "quarter", "other/half", "a/half"]


def test_plans_that_are_called_like_a_baseline_are_all_compared(tmp_path, tiny_plan):
    files = [tmp_path / folder / "dense.json" for folder in ("a", "b")]
    for file in files:
        tiny_plan.save(file)
    assert [list(plans) for plans in given_plans(list(map(str, files)))] == [["plan dense"], ["b/dense"]]
