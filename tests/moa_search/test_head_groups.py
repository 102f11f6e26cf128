"""Groups of KV heads that share a block table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_search.errors import ConfigError
from moa_search.head_groups import GROUPS, PADDING, envelope, group_heads
from moa_search.spans import DENSE, SpanRule, span

MIN_SPAN = 48
RULES = st.builds(SpanRule, st.integers(-600, 3000), st.integers(0, 256))
LAYERS = st.integers(1, 4).flatmap(lambda heads: st.lists(st.lists(RULES, min_size=heads, max_size=heads), min_size=1))


@given(LAYERS, st.integers(1, 12))
def test_groups_are_equally_large_and_hold_what_their_heads_attend(rules, groups):
    found = group_heads(rules, min_span=MIN_SPAN, longest=4096, groups=groups)
    assert [len(layer) for layer in found.group_of] == [len(layer) for layer in rules]
    *whole, last = found.sizes
    assert len(found.sizes) <= groups
    assert len(set(whole)) <= 1
    assert not whole or last == whole[0] or last < whole[0] < last * PADDING, "else vLLM cuts all groups to the last"
    for n in (1, 77, 1024, 4096):
        for group in range(len(found.sizes)):
            spans = [
                span(n, rule, MIN_SPAN)
                for layer, labels in zip(rules, found.group_of, strict=True)
                for rule, label in zip(layer, labels, strict=True)
                if label == group
            ]
            assert found.span(group, n) == max(spans)
    assert found.held(4096) <= 1


@given(LAYERS)
def test_swapping_never_holds_more_than_heads_in_order(rules):
    flat = [rule for layer in rules for rule in layer]
    lengths = (4096, 2048, 1024, 512)
    found = group_heads(rules, min_span=MIN_SPAN, longest=4096, groups=3)
    size = found.sizes[0]
    spans = sorted(([span(n, rule, MIN_SPAN) / n for n in lengths] for rule in flat), key=sum, reverse=True)
    in_order = sum(
        min(size, len(spans) - at) * max(spans[i][j] for i in range(at, min(at + size, len(spans))))
        for at in range(0, len(spans), size)
        for j in range(len(lengths))
    )
    if len(flat) % size == 0 and found.sizes == [size] * len(found.sizes):
        assert sum(found.held(n) for n in lengths) * len(flat) <= in_order + 1e-6


def test_rules_that_fall_into_equal_parts_are_the_groups():
    """Nothing is held that isn't attended."""
    near, far = SpanRule(64, 0), SpanRule(0, 64)
    rules = [[near, DENSE], [far, far], [near, DENSE], [DENSE, DENSE]]
    found = group_heads(rules, min_span=MIN_SPAN, longest=4096)
    assert found.sizes == [2, 2, 2, 2]
    density = sum(span(4096, rule, MIN_SPAN) for layer in rules for rule in layer) / (8 * 4096)
    assert found.held(4096) == pytest.approx(density)


def test_equal_parts_that_are_too_many_are_put_together():
    rules = [[SpanRule(64 + 16 * i, 0)] for i in range(4 * GROUPS)]
    assert group_heads(rules, min_span=MIN_SPAN, longest=4096).sizes == [4] * GROUPS


def test_one_group_holds_what_the_longest_head_attends():
    found = group_heads([[SpanRule(64, 0), SpanRule(900, 0)]], min_span=MIN_SPAN, longest=4096, groups=1)
    assert found.envelopes == ((SpanRule(900, 0),),)
    assert found.held(4096) == pytest.approx(900 / 4096)


def test_an_envelope_names_the_rules_that_count_somewhere():
    flat, steep = SpanRule(500, 0), SpanRule(0, 64)
    assert set(envelope([steep, flat, SpanRule(100, 0)], min_span=MIN_SPAN, longest=4096)) == {flat, steep}
    assert envelope([flat, steep], min_span=MIN_SPAN, longest=1024) == (flat,)
    assert envelope([flat, DENSE, steep], min_span=MIN_SPAN, longest=4096) == (DENSE,)


def test_no_groups_at_all_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        group_heads([[DENSE]], min_span=MIN_SPAN, longest=64, groups=0)


@given(LAYERS, st.integers(1, 12), st.sampled_from([1, 2, 4]))
def test_every_rank_has_as_many_heads_of_a_group(layers, groups, ranks):
    rules = [layer * ranks for layer in layers]  # a layer's heads lie on the ranks in order
    found = group_heads(rules, min_span=MIN_SPAN, longest=4096, groups=groups, ranks=ranks)
    assert len(found.sizes) <= groups
    for group in range(len(found.sizes)):
        counts = [
            sum(labels[rank * len(labels) // ranks : (rank + 1) * len(labels) // ranks].count(group)
                for labels in found.group_of)
            for rank in range(ranks)
        ]  # fmt: skip
        assert len(set(counts)) == 1
        spans = [
            span(1024, rule, MIN_SPAN)
            for layer, labels in zip(rules, found.group_of, strict=True)
            for rule, label in zip(layer, labels, strict=True)
            if label == group
        ]
        assert found.span(group, 1024) == max(spans)


def test_heads_that_ranks_cannot_share_are_refused():
    with pytest.raises(ConfigError, match="3 KV heads don't fall into 2 equal shares"):
        group_heads([[DENSE] * 3], min_span=MIN_SPAN, longest=64, ranks=2)
