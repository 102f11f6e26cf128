"""Profiles that tests of the search share."""

import pytest

from moa_search.formats import ModelSignature, Profile


@pytest.fixture
def with_context(tiny_profile):
    """The same profile of a model that reads so many tokens."""

    def lengthen(context):
        model = tiny_profile.header.model
        longer = ModelSignature(
            **{**model.model_dump(), "config": {**model.config, "max_position_embeddings": context}}
        )
        return Profile(tiny_profile.header.model_copy(update={"model": longer}), tiny_profile.by_length)

    return lengthen
