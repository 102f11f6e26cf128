"""Rules look at a token's own position only: what comes later, and how tokens are handed over, changes nothing."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, apply_plan, remove_plan
from moa_search.spans import DENSE, SpanRule

from .explicit import explicit, logits, tiny_model, tokens

RULES = st.one_of(
    st.just(DENSE),
    st.builds(SpanRule, st.integers(0, 60), st.just(0)),
    st.builds(SpanRule, st.integers(-40, 40), st.integers(1, 255)),
)
PLANS = st.tuples(st.lists(RULES, min_size=4, max_size=4), st.integers(0, 9), st.integers(1, 20))
SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=12)
QUICKLY = settings(max_examples=15)


@cache
def shared():
    return tiny_model(num_hidden_layers=2)


def under(drawn):
    """The model under a drawn plan, and the plan."""
    (a, b, c, d), sink, block = drawn
    plan = Plan.from_rules([[a, b], [c, d]], ModelSignature.of(shared().config), sink=sink, block=block)
    return apply_plan(shared(), plan), plan


@torch.no_grad()
def run(model, held, parts):
    return torch.cat([model(part, past_key_values=held).logits for part in parts], 1)


@QUICKLY
@given(PLANS, SIZES, st.data())
def test_any_chunks_give_the_same_output(drawn, sizes, data):
    model, plan = under(drawn)
    sequence = tokens(2, sum(sizes), seed=len(sizes))
    expected = logits(explicit(remove_plan(model), plan), sequence)
    model, _ = under(drawn)
    held = MoACache(model.config, plan)
    torch.testing.assert_close(run(model, held, sequence.split(sizes, 1)), expected)
    other = data.draw(st.permutations(sizes))
    again = MoACache(model.config, plan)
    torch.testing.assert_close(run(model, again, sequence.split(other, 1)), expected)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, sum(sizes) + 3).long()}
    following = torch.cat([sequence, tokens(2, 3)], 1)
    first, second = (model.generate(following, past_key_values=each, **options) for each in (held, again))
    assert torch.equal(first, second)
    assert torch.equal(first, model.generate(following, **options))


@QUICKLY
@given(PLANS, st.integers(1, 150), st.integers(1, 80))
def test_what_comes_later_changes_nothing(drawn, length, more):
    model, _ = under(drawn)
    sequence = tokens(1, length + more, seed=more)
    torch.testing.assert_close(logits(model, sequence)[:, :length], logits(model, sequence[:, :length]))


@QUICKLY
@given(PLANS, SIZES, st.integers(1, 50), st.integers(1, 50))
def test_a_prefix_cached_once_and_continued_twice_equals_two_full_runs(drawn, sizes, one, other):
    model, plan = under(drawn)
    prefix = tokens(1, sum(sizes), seed=1)
    held = MoACache(model.config, plan)
    run(model, held, prefix.split(sizes, 1))
    for more, seed in ((one, 2), (other, 3), (one, 2)):
        whole = torch.cat([prefix, tokens(1, more, seed=seed)], 1)
        own = copy.deepcopy(held)
        torch.testing.assert_close(run(model, own, [whole[:, sum(sizes) :]]), logits(model, whole)[:, sum(sizes) :])
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(whole)}
        found = model.generate(whole, past_key_values=copy.deepcopy(held), **options)
        assert torch.equal(found, model.generate(whole, **options))
    assert held.get_seq_length() == sum(sizes), "the copies were continued, not the prefix"


def test_a_prefix_serves_a_batch():
    model, plan = under(([SpanRule(12, 0), SpanRule(0, 64), DENSE, SpanRule(-20, 128)], 4, 8))
    prefix = tokens(1, 90)
    held = MoACache(model.config, plan)
    run(model, held, [prefix])
    batch = copy.deepcopy(held)
    batch.batch_repeat_interleave(3)
    following = tokens(3, 20, seed=1)
    whole = torch.cat([prefix.expand(3, -1), following], 1)
    torch.testing.assert_close(run(model, batch, [following]), logits(model, whole)[:, 90:])


@pytest.fixture(autouse=True, scope="module")
def tidy():
    yield
    remove_plan(shared())
