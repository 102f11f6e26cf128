from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moa_search.errors import ConfigError
from moa_search.masks import span_mask
from moa_search.spans import BETA_ONE, DENSE, SpanRule, attention_densities, attention_density, density, span

RULES = st.builds(
    SpanRule,
    alpha=st.integers(-(2**31), 2**31 - 1) | st.integers(-2000, 2000),
    beta_256=st.integers(0, BETA_ONE) | st.sampled_from([0, 1, BETA_ONE - 1, BETA_ONE]),
)
SMALL_RULES = st.builds(SpanRule, alpha=st.integers(-40, 40), beta_256=st.integers(0, BETA_ONE))
LENGTHS = st.integers(1, 2**30) | st.integers(1, 5000) | st.just(1)
MIN_SPANS = st.integers(1, 2**21)


def by_definition(n: int, rule: SpanRule, min_span: int) -> int:
    """Design, section 2, in exact arithmetic."""
    beta = Fraction(rule.beta_256, 256)
    return min(n, max(min_span, rule.alpha + math.floor(beta * n)))


@given(rule=RULES, lengths=st.lists(LENGTHS, min_size=1, max_size=20), min_span=MIN_SPANS)
def test_int_numpy_and_torch_follow_the_definition(rule: SpanRule, lengths: list[int], min_span: int) -> None:
    expected = [by_definition(n, rule, min_span) for n in lengths]
    ints = [span(n, rule, min_span) for n in lengths]
    from_numpy = span(np.array(lengths, dtype=np.int64), rule, min_span)
    from_torch = span(torch.tensor(lengths), rule, min_span)
    assert ints == expected
    assert all(type(value) is int for value in ints)
    assert from_numpy.dtype == np.int64
    assert from_numpy.tolist() == expected
    assert from_torch.dtype == torch.int64
    assert from_torch.tolist() == expected


@pytest.mark.parametrize(
    ("n", "rule", "min_span", "expected"),
    [
        (1, DENSE, 68, 1),
        (2**30, DENSE, 68, 2**30),
        (1000, SpanRule(0, 0), 68, 68),
        (50, SpanRule(0, 0), 68, 50),
        (1000, SpanRule(300, 0), 68, 300),
        (1000, SpanRule(0, 128), 68, 500),
        (1001, SpanRule(0, 128), 68, 500),
        (1000, SpanRule(-100, 128), 68, 400),
        (1000, SpanRule(-1000, 256), 68, 68),
        (1000, SpanRule(1000, 256), 68, 1000),
    ],
)
def test_known_spans(n: int, rule: SpanRule, min_span: int, expected: int) -> None:
    assert span(n, rule, min_span) == expected


def test_keeps_the_shape() -> None:
    n = np.arange(1, 25, dtype=np.int64).reshape(2, 3, 4)
    assert span(n, SpanRule(4, 64), 4).shape == (2, 3, 4)
    assert span(torch.from_numpy(n), SpanRule(4, 64), 4).shape == (2, 3, 4)


@given(rule=RULES, start=LENGTHS, sink=st.integers(0, 100), block=st.integers(1, 100))
def test_grows_by_at_most_one_so_evicted_keys_stay_evicted(rule: SpanRule, start: int, sink: int, block: int) -> None:
    n = np.arange(start, start + 1000, dtype=np.int64)
    spans = span(n, rule, sink + block)
    window_start = n - (spans - sink)
    assert (np.diff(spans) >= 0).all()
    assert (np.diff(window_start) >= 0).all()
    assert (spans >= 1).all()
    assert (spans <= n).all()


@given(
    rules=st.lists(SMALL_RULES, min_size=1, max_size=4),
    length=st.integers(1, 60),
    sink=st.integers(0, 8),
    block=st.integers(1, 16),
)
def test_densities_count_the_mask(rules: list[SpanRule], length: int, sink: int, block: int) -> None:
    masks = np.stack([span_mask(rule, length, sink=sink, min_span=sink + block) for rule in rules])
    cache = masks[:, -1].sum() / (len(rules) * length)
    pairs = masks.sum() / (len(rules) * length * (length + 1) // 2)
    assert density(rules, length, sink + block) == pytest.approx(cache, rel=1e-12)
    assert attention_density(iter(rules), length, sink + block) == pytest.approx(pairs, rel=1e-12)


def test_dense_has_density_one() -> None:
    assert DENSE.is_dense
    assert SpanRule(5, BETA_ONE).is_dense
    assert not SpanRule(-1, BETA_ONE).is_dense
    assert density([DENSE], 12345, 68) == 1
    assert attention_density([DENSE], 12345, 68) == 1


@pytest.mark.parametrize(("alpha", "beta_256"), [(0, -1), (0, BETA_ONE + 1), (2**31, 0), (-(2**31) - 1, 0)])
def test_rejects_rules_out_of_range(alpha: int, beta_256: int) -> None:
    with pytest.raises(ConfigError):
        SpanRule(alpha, beta_256)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (DENSE, "dense"),
        (SpanRule(64, BETA_ONE), "dense"),
        (SpanRule(0, 64), "0.25n"),
        (SpanRule(-100, 128), "0.5n-100"),
        (SpanRule(320, 32), "0.125n+320"),
        (SpanRule(512, 0), "512"),
        (SpanRule(0, 0), "0"),
    ],
)
def test_reads_as_a_formula(rule: SpanRule, text: str) -> None:
    assert str(rule) == text


def test_attention_density_of_many_positions_is_the_same_in_slices(monkeypatch):
    rules = [SpanRule(-96, 200), SpanRule(64, 0), DENSE]
    whole = attention_density(rules, 5000, 68)
    for positions in (1, 999, 1000, 5000):
        monkeypatch.setattr("moa_search.spans.SLICE", positions)
        assert attention_density(rules, 5000, 68) == whole


def test_attention_densities_are_those_of_each_length_in_any_order():
    rules = [SpanRule(-96, 200), SpanRule(64, 0), DENSE]
    lengths = [700, 1, 300, 300, 5000]
    assert attention_densities(rules, lengths, 68) == [attention_density(rules, length, 68) for length in lengths]
