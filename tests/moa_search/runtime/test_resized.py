"""A model keeps its plan when tokens are added."""

import pytest
import torch

import moa_search
from moa_search.runtime import MoACache, apply_plan, remove_plan

from .explicit import explicit, tiny_model, tiny_plan, tokens

OPTIONS = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": list(range(97, 104))}
"""Tokens beyond the 97 of `tiny_model` are never drawn: their embeddings are random."""


@pytest.fixture
def resized():
    torch.manual_seed(0)
    model = tiny_model()
    plan = tiny_plan(model)
    expected = explicit(model, plan).generate(tokens(1, 60), use_cache=False, max_new_tokens=20, do_sample=False)
    return model, plan, expected


def test_tokens_added_before_the_plan(resized):
    model, plan, expected = resized
    model.resize_token_embeddings(104)
    assert torch.equal(apply_plan(model, plan).generate(tokens(1, 60), **OPTIONS), expected)
    assert isinstance(model(tokens(1, 60)).past_key_values, MoACache)


def test_tokens_added_under_the_plan_and_saved(resized, tmp_path):
    model, plan, expected = resized
    apply_plan(model, plan).resize_token_embeddings(104)
    assert torch.equal(model.generate(tokens(1, 60), **OPTIONS), expected)
    model.save_pretrained(tmp_path)
    loaded = moa_search.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(tokens(1, 60), **OPTIONS), expected)
    dense = remove_plan(moa_search.from_pretrained(tmp_path))
    assert torch.equal(apply_plan(dense, plan).generate(tokens(1, 60), **OPTIONS), expected)
