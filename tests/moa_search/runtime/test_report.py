from __future__ import annotations

import pytest
import torch

from moa_search.runtime import MoACache, apply_plan

from .explicit import explicit, logits, tiny_model, tiny_plan, tokens


@pytest.fixture(scope="module")
def model():
    model = tiny_model(dtype=torch.float32)
    return apply_plan(model, tiny_plan(model))


@pytest.fixture
def cache(model):
    cache = MoACache(model.config, model._moa_applied.plan)
    with torch.no_grad():
        model(tokens(3, 200), past_key_values=cache)
    return cache


def test_a_description_adds_up_to_what_is_allocated(cache):
    report = cache.describe()
    assert [layer.layer for layer in report.layers] == [0, 1, 2]
    assert report.nbytes == cache.nbytes == sum(layer.nbytes for layer in cache.layers)
    assert report.dense_nbytes == 3 * 3 * 2 * 200 * 2 * 16 * 4  # samples, layers, heads, tokens, K and V, width, bytes
    assert report.share == pytest.approx(cache.nbytes / report.dense_nbytes)
    for layer, held in zip(report.layers, cache.layers, strict=True):
        assert layer.capacities == held.layout.capacities
        assert layer.nbytes == held.nbytes
        assert (layer.batch, layer.length, layer.device) == (3, 200, "cpu")


def test_printed_it_is_a_table_with_a_line_per_layer(cache):
    first, header, *lines = str(cache.describe()).splitlines()
    assert first.startswith("3 x 200 tokens, 0.")
    assert "% of a dense cache's 0.44 MiB" in first
    assert header.split()[:3] == ["layer", "bytes", "share"]
    assert len(lines) == 3
    assert lines[1].endswith(" ".join(map(str, cache.layers[1].layout.capacities)))


def test_an_empty_cache_says_so(model):
    cache = MoACache(model.config, model._moa_applied.plan)
    assert str(cache.describe()) == "an empty cache"
    assert cache.describe().share == 0


def test_a_cache_of_fixed_size_is_set_against_a_dense_one_of_that_size(model):
    cache = MoACache(model.config, model._moa_applied.plan, max_length=500)
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
    report = cache.describe()
    assert report.layers[0].length == 500
    assert report.nbytes == cache.nbytes
    assert report.dense_nbytes == 3 * 2 * 500 * 2 * 16 * 4


def test_copies_of_a_prefix_are_continued_each_by_itself():
    model = tiny_model()
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    apply_plan(model, plan)
    prefix = tokens(2, 100)
    cache = MoACache(model.config, plan)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    nbytes = cache.nbytes
    for seed in (1, 2):
        sequence = torch.cat([prefix, tokens(2, 30, seed=seed)], 1)
        twin = cache.copy()
        assert type(twin) is MoACache
        assert twin.layers[0].keys.data_ptr() != cache.layers[0].keys.data_ptr()
        found = model.generate(sequence, max_new_tokens=20, do_sample=False, past_key_values=twin)
        assert torch.equal(found[:, 130:], logits(reference, found)[:, 129:-1].argmax(-1))
    assert (cache.nbytes, cache.get_seq_length()) == (nbytes, 100)
