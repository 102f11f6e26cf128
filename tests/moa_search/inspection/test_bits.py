"""Lines on a plan's bits."""

import pytest

from moa_search import Plan
from moa_search.inspection.frames.bits import bits_lines, byte_parts, tiers_text
from moa_search.spans import DENSE, SpanRule
from tests.moa_search.formats.test_tiers import tiered


@pytest.fixture
def plan(tiny_profile):
    """Sinks of 4 tokens, 3 layers of 2 KV heads."""
    model, transforms = tiny_profile.header.model, tiered(tiny_profile).tiers.transforms
    return Plan.from_rules(
        [[DENSE, SpanRule(100, 0)]] * model.num_hidden_layers,
        model,
        tiers=[[(8, 4), (16, 16)], [(8, 4), (16, 2)], [(8, 4), (2, 2)]],
        transforms=transforms,
        sink=4,
        block=64,
    )


def test_heads_by_bits_the_commonest_first(plan):
    assert tiers_text(plan) == "8/4: 3, 2/2: 1, 16/2: 1, 16/16: 1"


@pytest.mark.parametrize("length", [3, 64, 512])
def test_parts_add_up_to_the_share(plan, length):
    parts = byte_parts(plan, length)
    assert sum(parts.values()) == pytest.approx(plan.share(length), rel=1e-12)
    width = plan.model.head_dim
    scales = sum(
        2 * max(tokens - 4, 0) * sum(bits < 16 for bits in tier)
        for spans, tiers in zip(plan.spans(length), plan.tiers, strict=True)
        for tokens, tier in zip(spans, tiers, strict=True)
    )
    assert parts["scales"] == pytest.approx(scales / (4 * width * length * 6))


def test_plans_in_16_bits_have_none(tiny_plan, plan):
    assert bits_lines(tiny_plan, 512) == []
    first, second = bits_lines(plan, 512)
    assert first == "bits of keys/values: 8/4: 3, 2/2: 1, 16/2: 1, 16/16: 1 of 6 KV heads"
    assert second.startswith(f"bytes at 512 tokens: {plan.share(512):.1%} of a 16-bit cache (codes ")
