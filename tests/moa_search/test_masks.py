from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import repeat_kv

from moa_search.masks import head_masks, span_mask
from moa_search.spans import BETA_ONE, DENSE, SpanRule, span

RULES = st.builds(SpanRule, alpha=st.integers(-30, 30), beta_256=st.integers(0, BETA_ONE))


@given(rule=RULES, length=st.integers(1, 40), sink=st.integers(0, 8), block=st.integers(1, 12))
def test_says_what_the_design_says(rule: SpanRule, length: int, sink: int, block: int) -> None:
    mask = span_mask(rule, length, sink=sink, min_span=sink + block)
    for i in range(length):
        window = span(i + 1, rule, sink + block) - sink
        attended = [j <= i and (j < sink or j > i - window) for j in range(length)]
        assert mask[i].tolist() == attended
        assert mask[i].sum() == span(i + 1, rule, sink + block)


def test_dense_is_causal() -> None:
    expected = np.tril(np.ones((33, 33), dtype=bool))
    np.testing.assert_array_equal(span_mask(DENSE, 33, sink=4, min_span=12), expected)


def test_query_heads_are_in_the_order_of_repeat_kv() -> None:
    rules = [SpanRule(0, 0), SpanRule(0, 128), DENSE]
    group, length = 3, 50
    masks = head_masks(rules, group, length, sink=2, min_span=10)
    per_kv_head = np.stack([span_mask(rule, length, sink=2, min_span=10) for rule in rules])
    assert masks.shape == (9, length, length)
    np.testing.assert_array_equal(masks, repeat_kv(torch.from_numpy(per_kv_head)[None], group)[0].numpy())
