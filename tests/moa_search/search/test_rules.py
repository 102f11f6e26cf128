"""The candidate rules."""

import numpy as np
import pytest

from moa_search.search.rules import rule_grid
from moa_search.spans import DENSE, SpanRule, span

GRIDS = [([2048], 16, 32), ([512, 1024], 4, 64), ([300], 0, 1), ([100], 16, 32), ([8192], 64, 64)]


@pytest.fixture(params=GRIDS, ids=str)
def grid(request):
    lengths, sink, block = request.param
    return lengths, sink + block, rule_grid(lengths, sink=sink, block=block)


def spans_of(rule, longest, min_span):
    return tuple(span(np.arange(1, longest + 1), rule, min_span).tolist())


def test_the_smallest_span_and_dense_are_always_in(grid):
    _, min_span, rules = grid
    assert SpanRule(min_span, 0) in rules
    assert DENSE in rules


def test_no_two_rules_agree_at_every_position(grid):
    lengths, min_span, rules = grid
    assert len({spans_of(rule, max(lengths), min_span) for rule in rules}) == len(rules)


def test_equal_arguments_give_equal_rules_in_order(grid):
    lengths, min_span, rules = grid
    assert rules == sorted(rules)
    sink, block = next((s, b) for ls, s, b in GRIDS if ls == lengths and s + b == min_span)
    assert rules == rule_grid(lengths[::-1], sink=sink, block=block)


def test_every_kind_of_rule_is_on_offer(grid):
    lengths, min_span, rules = grid
    longest = max(lengths)
    kept = {span(longest, rule, min_span) / longest for rule in rules}
    assert max(b - a for a, b in zip(sorted(kept), sorted(kept)[1:], strict=False)) < 0.35  # no wide hole
    if longest >= 512:
        assert any(rule.beta_256 == 0 for rule in rules if rule.alpha > min_span)  # constant
        assert any(rule.alpha < 0 for rule in rules)  # far only in long contexts
        assert any(rule.alpha > 0 and rule.beta_256 for rule in rules if not rule.is_dense)


def test_of_rules_that_agree_the_slowest_growing_stays():
    """At up to 256 tokens 32 + n/32 never exceeds the smallest span of 48: the constant stands for it."""
    rules = rule_grid([256], sink=16, block=32)
    assert SpanRule(48, 0) in rules
    assert SpanRule(32, 8) not in rules
    assert SpanRule(32, 8) in rule_grid([1024], sink=16, block=32)


def test_of_rules_that_agree_dense_comes_first():
    """192 + n/4 spans all of 256 tokens, but fewer than all of 1024."""
    assert [r for r in rule_grid([256], sink=16, block=32) if span(256, r, 48) == 256 and r.alpha >= 192] == []
    assert SpanRule(192, 64) in rule_grid([1024], sink=16, block=32)


def test_long_contexts_take_a_few_hundred_rules():
    assert 300 < len(rule_grid([32_768], sink=16, block=32)) < 1000


def test_positions_are_sampled_where_there_are_millions():
    """Every position of every rule would take hours and gigabytes."""
    rules = rule_grid([100_000_000], sink=16, block=32)
    assert len({tuple(span(n, rule, 48) for n in (1_000, 1_000_000, 100_000_000)) for rule in rules}) > 1000
    assert {SpanRule(48, 0), DENSE} < set(rules)
