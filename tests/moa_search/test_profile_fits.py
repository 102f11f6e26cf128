"""A profile and the model that it is used with: another model is refused, other weights are a note."""

import pytest

from moa_search import ModelSignature, Profile, load_model
from moa_search.api.common import require_profile_fits
from moa_search.errors import ModelMismatchError
from moa_search.modeling.loading import weights_hash


@pytest.fixture
def network(tiny_model_dir):
    return load_model(str(tiny_model_dir), dtype="float32")[0]


@pytest.fixture
def profile(tiny_profile, network):
    facts = {"model": ModelSignature.of(network.config), "weights_hash": weights_hash(network), "dtype": "float32"}
    return replace_header(tiny_profile, **facts)


def replace_header(profile, **facts):
    return Profile(profile.header.model_copy(update=facts), profile.by_length, profile.run)


def test_the_profiled_model_passes_without_a_word(profile, network, caplog):
    require_profile_fits(profile, network)
    assert not caplog.records


def test_fine_tuned_weights_are_a_note(profile, network, caplog):
    network.model.layers[1].mlp.up_proj.weight.data += 0.01
    require_profile_fits(profile, network)
    assert "measured on other weights" in caplog.text


def test_added_tokens_fit(profile, network, caplog):
    network.resize_token_embeddings(network.config.vocab_size + 8)
    require_profile_fits(profile, network)
    assert "measured on other weights" in caplog.text


def test_another_type_of_the_same_weights_is_no_note(profile, network, caplog):
    require_profile_fits(profile, network.bfloat16())
    assert not caplog.records


def test_a_profile_from_before_weights_were_hashed(profile, network, caplog):
    require_profile_fits(replace_header(profile, weights_hash=None), network)
    assert not caplog.records


def test_another_model_is_refused(tiny_profile, network):
    with pytest.raises(ModelMismatchError, match="the profile was made for another model"):
        require_profile_fits(tiny_profile, network)
