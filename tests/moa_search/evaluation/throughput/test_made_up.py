from collections import Counter

import pytest

from moa_search.errors import ConfigError
from moa_search.evaluation.throughput import made_up_plan
from moa_search.formats import ModelSignature
from moa_search.spans import BETA_ONE


@pytest.fixture
def signature():
    return ModelSignature(
        architecture="llama", num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    )


@pytest.mark.parametrize("density", [1.0, 0.9, 0.5, 1 / 3, 0.25, 0.0626, 0.0625, 0.03])
@pytest.mark.parametrize("length", [4096, 8192, 32768])
def test_the_density_is_what_was_asked_for(signature, density, length):
    assert made_up_plan(signature, density).density(length) == pytest.approx(density, abs=1 / 256 / 256 + 1e-9)


@pytest.mark.parametrize("density", [0.9, 0.5, 0.25, 0.1])
def test_dense_heads_are_spread_and_all_but_one_of_the_others_are_short(signature, density):
    rules = made_up_plan(signature, density).rules
    dense = [sum(rule.is_dense for rule in layer) for layer in rules]
    assert max(dense) - min(dense) <= 1
    others = Counter(rule.beta_256 for layer in rules for rule in layer if not rule.is_dense)
    assert sorted(others.values(), reverse=True)[1:] in ([], [1])
    assert others.most_common(1)[0][0] == 16


def test_below_a_sixteenth_all_heads_grow_alike(signature):
    grown = {rule.beta_256 for layer in made_up_plan(signature, 0.03).rules for rule in layer}
    assert grown == {7, 8}
    assert max(rule.beta_256 for layer in made_up_plan(signature, 1.0).rules for rule in layer) == BETA_ONE


def test_native_layers_stay_as_they_are(windowed_signature):
    plan = made_up_plan(windowed_signature, 0.5, native_layers=(1,))
    assert plan.native_layers == (1,)
    assert plan.density(8192) == pytest.approx(0.5, abs=1 / 256)


@pytest.mark.parametrize("density", [0, -1, 1.01, float("nan")])
def test_densities_out_of_range_are_refused(signature, density):
    with pytest.raises(ConfigError, match="density"):
        made_up_plan(signature, density)
