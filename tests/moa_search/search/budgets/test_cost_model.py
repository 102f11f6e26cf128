"""Times against counting touched tiles in explicit masks, and against rooflines worked out by hand."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_search.formats.signature import ModelSignature
from moa_search.masks import span_mask
from moa_search.search.budgets.cost_model import CostModel, touched_tiles
from moa_search.search.budgets.hardware import HARDWARE, Hardware
from moa_search.spans import DENSE, SpanRule

MODEL = ModelSignature(
    architecture="llama", num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=64
)
DEVICE = Hardware(name="toy", bandwidth_bytes_per_s=1e9, flops_per_s=1e12, tile_query=32, tile_key=16)
COST = CostModel(DEVICE, MODEL)

rules = st.builds(SpanRule, st.integers(-40, 200), st.sampled_from([0, 1, 32, 100, 200, 255, 256]))


def tiles_of(mask, tile_query, tile_key):
    """Blocks of a mask that hold something, one by one."""
    length = len(mask)
    return sum(
        bool(mask[row : row + tile_query, column : column + tile_key].any())
        for row in range(0, length, tile_query)
        for column in range(0, length, tile_key)
    )


@given(
    rules,
    st.integers(1, 150),
    st.integers(0, 40),
    st.integers(1, 40),
    st.sampled_from([1, 7, 16, 64, 256]),
    st.sampled_from([1, 5, 16, 64, 256]),
)
def test_tiles_are_those_that_the_mask_touches(rule, length, sink, block, tile_query, tile_key):
    settings = {"sink": sink, "min_span": sink + block}
    counted = touched_tiles(rule, length, tile_query=tile_query, tile_key=tile_key, **settings)
    assert counted == tiles_of(span_mask(rule, length, **settings), tile_query, tile_key)


def test_a_native_window_is_a_rule_without_sink():
    i, j = np.arange(100)[:, None], np.arange(100)[None, :]
    expected = tiles_of((j <= i) & (j > i - 24), 16, 8)
    settings = {"sink": 0, "min_span": 1, "tile_query": 16, "tile_key": 8}
    assert touched_tiles(SpanRule(24, 0), 100, **settings) == expected


def test_decoding_is_bound_by_bandwidth_and_reads_whole_tiles():
    """100 keys are 7 tiles of 16; keys and values of 64 numbers of 2 bytes; 4 samples; 1 byte per nanosecond."""
    assert COST.decode_ps(100, batch=4) == 2 * 7 * 16 * 64 * 2 * 4 * 1000
    assert COST.decode_ps(97, batch=4) == COST.decode_ps(112, batch=4) < COST.decode_ps(113, batch=4)


def test_decoding_on_a_device_that_computes_slowly():
    """4 query heads share the head: 2 products of 2 FLOPs each for every pair and number, at 1 FLOP per microsecond."""
    slow = CostModel(Hardware(name="slow", bandwidth_bytes_per_s=1e9, flops_per_s=1e6, tile_key=16), MODEL)
    assert slow.decode_ps(100) == 2 * 2 * 7 * 16 * 64 * 4 * 10**6


@given(rules, st.integers(1, 130), st.integers(1, 5))
def test_a_prefill_multiplies_whole_tiles_for_every_query_head(rule, length, batch):
    settings = {"sink": 16, "min_span": 48}
    tiles = tiles_of(span_mask(rule, length, **settings), 32, 16)
    flops = 4 * 64 * (32 * 16) * tiles * 4 * batch  # 1 FLOP per picosecond
    assert COST.prefill_ps(rule, length, batch=batch, **settings) == flops


def test_times_are_rounded_up_to_whole_picoseconds():
    odd = CostModel(Hardware(name="odd", bandwidth_bytes_per_s=7e15, flops_per_s=1e18, tile_key=1), MODEL)
    exact = Fraction(2 * 64 * 2 * 10**12, 7 * 10**15)
    assert odd.decode_ps(1) == 1 > exact


def test_weights_are_read_once_or_multiplied_with_every_token():
    """1 MB at 1 GB/s is a millisecond; half a million weights with 2000 tokens are 2e9 FLOPs: two milliseconds."""
    assert COST.weights_ps(10**6, 1) == 10**9
    assert COST.weights_ps(10**6, 2000) == 2 * 10**9


@given(rules, rules, st.integers(1, 300))
def test_what_sees_more_costs_no_less(one, other, length):
    settings = {"sink": 16, "min_span": 48}
    less, more = (span_mask(rule, length, **settings) for rule in (one, other))
    if (less <= more).all():
        assert COST.prefill_ps(one, length, **settings) <= COST.prefill_ps(other, length, **settings)


@pytest.mark.parametrize("device", HARDWARE.values(), ids=lambda device: device.name)
def test_magnitudes_of_llama_3_8b(device):
    """Decoding one token of 8B weights takes 16 GB over the bandwidth; dense attention adds 4 GiB at 32k tokens."""
    model = ModelSignature(
        architecture="llama", num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    )
    cost = CostModel(device, model)
    assert cost.weights_ps(16 * 10**9, 1) == pytest.approx(16e9 / device.bandwidth_bytes_per_s * 1e12)
    assert 256 * cost.decode_ps(32768) == pytest.approx(2**32 / device.bandwidth_bytes_per_s * 1e12, rel=1e-4)
    dense = 256 * cost.prefill_ps(DENSE, 32768, sink=16, min_span=48)
    causal_flops = 32 * 32 * 4 * 128 * (32768**2 / 2)
    assert dense == pytest.approx(causal_flops / device.flops_per_s * 1e12, rel=0.01)
