"""The torch path's decoding step and unmasked prefill against the general path, which masks everything."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from moa_search.runtime import blockwise, decoding, unmasked
from moa_search.runtime.layer import MoACacheLayer
from moa_search.runtime.rules import LayerRules
from moa_search.spans import SpanRule

from .explicit import RULES

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def drawn(seed):
    """Rules with neighbours alike and not, and what a model may ask for on top of them."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rules = LayerRules(
        tuple(rule for _ in range(3) for rule in [draw.choice([*RULES, SpanRule(0, 20)])] * draw.choice([1, 1, 2])),
        sink=draw.choice([0, 4, 20]),
        block=8,
        sliding_window=draw.choice([None, None, 1, 24, 300]),
    )
    group = draw.choice([1, 3])
    dtype = list(DTYPES)[seed % 3]
    logits = torch.randn(len(rules.rules) * group, generator=generator, dtype=dtype)
    options = {"scale": 0.3, "softcap": draw.choice([None, None, 3.0]), "sink_logits": draw.choice([None, logits])}

    def states(batch, heads, count, width=8):
        return torch.randn(batch, heads, count, width, generator=generator, dtype=torch.float64).to(dtype)

    return draw, rules, group, options, states, DTYPES[dtype]


@pytest.mark.parametrize("seed", range(60))
def test_a_step_attends_and_stores_as_the_general_path_does(seed):
    """Even and uneven samples, rings that grow and wrap, room for rollbacks, two widths."""
    draw, rules, group, options, states, tolerance = drawn(seed)
    batch, heads = draw.choice([1, 2, 3]), len(rules.rules)
    value_dim = draw.choice([8, 8, 5])
    mine, general = MoACacheLayer(rules), MoACacheLayer(rules)
    prompt = draw.choice([1, 3, 40, 130, 400])
    key, value = states(batch, heads, prompt), states(batch, heads, prompt, value_dim)
    valid = None
    if draw.random() < 0.4:
        valid = torch.arange(prompt) >= torch.randint(0, prompt, (batch, 1))
    for layer in (mine, general):
        layer.record_past = seed % 5 == 0
        layer.update(key, value)
        layer.commit(key, value, valid)
    for _ in range(40):
        query, key = states(batch, heads * group, 1), states(batch, heads, 1)
        value = states(batch, heads, 1, value_dim)
        assert decoding.applies(mine, None, query, key, value)
        expected = blockwise.attend(query, key, value, None, rules, general, **options)
        general.commit(key, value, None)
        found = decoding.decode_one(mine, query, key, value, **options)
        torch.testing.assert_close(found.transpose(1, 2), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(mine.lens, general.lens)
        position = general.positions()
        assert torch.equal(mine.positions(), position)
        held = (position < 2**31 - 1).expand(batch, -1)
        assert torch.equal(mine.keys[held], general.keys[held])
        assert torch.equal(mine.values[held], general.values[held])
        for cached in (mine.keys, mine.values, general.keys, general.values):  # nobody may read what is nowhere
            cached[~held] = torch.nan


@pytest.mark.parametrize("seed", range(40))
def test_prompts_without_padding_attend_as_under_whole_masks(seed, monkeypatch):
    draw, rules, group, options, states, tolerance = drawn(seed)
    monkeypatch.setattr(unmasked, "ROW_BLOCK", draw.choice([1, 16, 128]))
    keys = draw.choice([1, 5, 129, 257, 300])
    rows = draw.choice([keys, keys, draw.randint(1, keys)])
    heads = len(rules.rules)
    query = states(2, heads * group, rows)
    key, value = states(2, heads, keys), states(2, heads, keys, 5)
    if not unmasked.applies(query, rules, None, None):  # the model's window would hide sink tokens
        rules = replace(rules, sink=0)
    assert unmasked.applies(query, rules, None, None)
    found = unmasked.attend(query, key, value, rules, scale=0.3)
    # All real, but said so: then every key is masked by its position.
    options |= {"softcap": None, "sink_logits": None}
    expected = blockwise.attend(query, key, value, torch.ones(2, keys, dtype=torch.bool), rules, None, **options)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_steps_that_it_cannot_run_go_the_general_way():
    rules = LayerRules((SpanRule(12, 0),), sink=4, block=8)
    layer, states = MoACacheLayer(rules), torch.randn(1, 1, 30, 8)
    one = states[:, :, :1]
    assert not decoding.applies(layer, None, one, one, one), "nothing is stored"
    layer.update(states, states)
    layer.commit(states, states, None)
    assert decoding.applies(layer, None, one, one, one)
    assert not decoding.applies(layer, None, states, states, states), "several tokens"
    assert not decoding.applies(layer, torch.tensor([[False]]), one, one, one), "padding"
    assert not decoding.applies(layer, None, one.double(), one, one), "another type than the cache's"
    assert not decoding.applies(layer, None, one.clone().requires_grad_(), one, one), "a gradient"
    with torch.no_grad():
        assert decoding.applies(layer, None, one.clone().requires_grad_(), one, one)
