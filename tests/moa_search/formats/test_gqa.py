from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_search.formats.gqa import merge_rules, to_kv_heads
from moa_search.spans import DENSE, SpanRule, span

RULE = st.builds(SpanRule, st.integers(-5000, 5000), st.integers(0, 256))
GROUP = st.frozensets(RULE, min_size=1, max_size=4)
LENGTHS = st.lists(st.integers(1, 20_000), min_size=1, max_size=3)


def needed(rules, n):
    return np.max([span(n, rule, 128) for rule in rules], axis=0)


@given(GROUP)
def test_without_lengths_the_fold_is_enough_everywhere(rules):
    n = np.arange(1, 40_000, 37)
    assert (span(n, merge_rules(rules, 128), 128) >= needed(rules, n)).all()


@given(GROUP, LENGTHS)
def test_with_lengths_it_is_enough_between_them_and_never_larger_there(rules, lengths):
    n = np.arange(min(lengths), max(lengths) + 1)
    tight, wide = (span(n, merge_rules(rules, 128, given), 128) for given in (lengths, ()))
    assert (tight >= needed(rules, n)).all()
    assert tight.sum() <= wide.sum()


@given(GROUP, st.integers(1, 20_000))
def test_at_one_length_it_keeps_exactly_the_maximum(rules, length):
    assert span(length, merge_rules(rules, 128, [length]), 128) == needed(rules, np.array([length]))[0]


def test_a_rule_that_dominates_is_taken_as_it_is():
    rules = frozenset({SpanRule(0, 32), SpanRule(64, 32), SpanRule(64, 16)})
    assert merge_rules(rules, 128) == merge_rules(rules, 128, [100, 9000]) == SpanRule(64, 32)


def test_crossing_rules_of_moas_plans():
    """Everywhere only dense is enough for these two; from 2048 on one of them is."""
    rules = frozenset({SpanRule(1024, 0), SpanRule(-1024, 256)})
    assert merge_rules(rules, 128).is_dense
    assert merge_rules(rules, 128, [2048, 16384]) == SpanRule(-1024, 256)
    chord = merge_rules(rules, 128, [1024, 4096])
    assert chord not in (*rules, DENSE)
    assert chord.alpha == pytest.approx(1024 - 1024 * chord.beta, abs=1)


def test_consecutive_query_heads_share_a_kv_head():
    a, b, c = SpanRule(100, 0), SpanRule(200, 0), SpanRule(300, 0)
    assert to_kv_heads([[a, b, c, c], [c, a, a, a]], 2, 16) == [[b, c], [c, a]]
