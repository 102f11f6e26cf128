"""moa-profile --under-plan: samples as ever, then everything runs under the plan."""

import numpy as np
import pytest

from moa_search import api
from moa_search.errors import ConfigError, ModelMismatchError
from moa_search.formats import ModelSignature, Plan
from moa_search.spans import SpanRule

OPTIONS = {"lengths": [300], "samples": 2, "answers": "dataset", "dtype": "float32"}


@pytest.fixture
def plan(tiny_model_dir):
    from transformers import AutoConfig

    return Plan.uniform(SpanRule(64, 0), ModelSignature.of(AutoConfig.from_pretrained(tiny_model_dir)))


def test_plan_and_its_file_give_the_same_profile_over_the_same_samples(tiny_model_dir, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    dense, from_file, from_plan = (
        api.profile_model(str(tiny_model_dir), **OPTIONS, under_plan=given)
        for given in (None, str(tmp_path / "plan.json"), plan)
    )
    assert from_file.checksum == from_plan.checksum
    assert from_file.header.calibration["under_plan"] == plan.checksum
    assert from_file.header.calibration["sample_hashes"] == dense.header.calibration["sample_hashes"]
    assert (from_file.by_length[300].loss != dense.by_length[300].loss).all()
    assert "under_plan" not in dense.header.calibration


def test_profile_under_a_plan_is_searched_like_any_other(tiny_model_dir, plan):
    profile = api.profile_model(str(tiny_model_dir), **OPTIONS, under_plan=plan)
    found = api.search_plan(profile, density=0.5, budget_lengths=[300])
    assert found.density(300) <= 0.5
    assert np.isfinite(found.provenance.objective)


def test_what_cannot_be_used_is_refused_before_the_work(tiny_model_dir, tiny_plan, monkeypatch, tmp_path):
    monkeypatch.setattr("moa_search.calibration.calibrate", lambda *args, **options: pytest.fail("samples were drawn"))
    with pytest.raises(ModelMismatchError, match="under_plan"):
        api.profile_model(str(tiny_model_dir), **OPTIONS, under_plan=tiny_plan)
    with pytest.raises(ConfigError, match="no\\.json"):
        api.profile_model(str(tiny_model_dir), **OPTIONS, under_plan=str(tmp_path / "no.json"))
