"""The integers of kernels mean what `moa_search.spans` means: there are two languages, but one definition."""

from __future__ import annotations

import pytest
import torch
from moa_kernels.rings import RingLayout
from moa_kernels.spans import FOREVER, HeadSpans


def test_windows_equal_the_rules_of_plans():
    spans = pytest.importorskip("moa_search.spans")
    n = torch.arange(1, 5000)
    for alpha, beta_256, sink, least in ((0, 256, 4, 36), (-500, 200, 0, 32), (77, 0, 16, 48), (0, 77, 1, 2)):
        rule = spans.SpanRule(alpha, beta_256)
        expected = n - (spans.span(n, rule, least) - sink)
        oldest = HeadSpans.of([(alpha, beta_256)], sink=sink, min_span=least).oldest_key(n - 1)[0]
        whole = spans.span(n, rule, least) == n
        assert torch.equal(oldest[~whole], expected[~whole])
        assert (oldest[whole] <= sink).all(), "everything that isn't sunk is in the window"


@pytest.mark.parametrize("sliding_window", [None, 7])
def test_visible_equals_the_masks_of_plans(sliding_window):
    masks = pytest.importorskip("moa_search.masks")
    spans = pytest.importorskip("moa_search.spans")
    rules = [(0, 100), (-9, 256), (12, 0)]
    expected = torch.from_numpy(masks.head_masks([spans.SpanRule(*rule) for rule in rules], 1, 60, sink=3, min_span=8))
    i, j = torch.arange(60)[:, None], torch.arange(60)
    if sliding_window:
        expected = expected & (j > i - sliding_window)
    found = HeadSpans.of(rules, sink=3, min_span=8, sliding_window=sliding_window).visible(torch.arange(60), j)
    assert torch.equal(found, expected)


def test_device_code_computes_the_same_integers_without_overflow():
    """``(beta_256 * n) >> 8`` in 32 bits, up to a billion tokens."""
    n = torch.tensor([1, 255, 256, 257, 2**23 - 1, 2**23, 2**24 + 12345, 2**30 - 1])
    for beta_256 in (0, 1, 77, 255, 256):
        narrow = n.int()
        split = (narrow >> 8) * beta_256 + (((narrow & 255) * beta_256) >> 8)
        assert torch.equal(split.long(), (n * beta_256) >> 8)


def test_flat_lists_come_back():
    spans = HeadSpans(((1, 2, -3, 4), (5, 6, 7, 8)), 9)
    assert HeadSpans.from_flat(spans.flat, spans.sliding_window) == spans
    layout = RingLayout((5, 9), (1, 2))
    assert RingLayout.from_flat(layout.flat) == layout


@pytest.mark.parametrize(
    ("heads", "window", "message"),
    [
        ((), FOREVER, "at least one head"),
        (((4, 4, 0, 0),), FOREVER, "sink < min_span"),
        (((-1, 4, 0, 0),), FOREVER, "sink < min_span"),
        (((0, 4, 0, 257),), FOREVER, "beta_256 is 257"),
        (((0, 4, 0, 0),), 0, "sliding_window is 0"),
    ],
)
def test_impossible_rules_are_refused(heads, window, message):
    with pytest.raises(ValueError, match=message):
        HeadSpans(heads, window)


def test_rings_hold_the_newest_positions():
    layout = RingLayout((6, 3), (2, 4))
    assert layout.offsets == [0, 6]
    assert layout.slot(0, torch.arange(9)).tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    assert layout.slot(torch.tensor([0, 1, 1]), torch.tensor([8, 0, 2])).tolist() == [4, 6, 8]
    assert layout.heads(torch.device("cpu")).tolist() == [0] * 6 + [1] * 3
    assert layout.positions(torch.tensor([1, 2, 5, 9])).tolist() == [
        [0, -1, -1, -1, -1, -1, 0, -1, -1],
        [0, 1, -1, -1, -1, -1, 0, 1, -1],
        [0, 1, 2, 3, 4, -1, 0, 1, 2],
        [0, 1, 6, 7, 8, 5, 0, 1, 2],
    ]
    assert layout.tensor(torch.device("cpu")).tolist() == [[0, 2, 6], [6, 4, 3]]
    with pytest.raises(ValueError, match="capacities"):
        RingLayout((1,), (1, 2))
