"""Lines on a plan's bits."""

import pytest

from moa_search import Plan
from moa_search.inspection.frames.bits import bits_lines, byte_parts, tiers_text
from moa_search.inspection.frames.plans import layer_frame, plan_facts, plan_frame, plans_frame
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


def headings(table):
    return [column.heading for column in table.columns]


def test_tables_tell_bytes_from_tokens(plan, tiny_plan):
    table = plan_frame(plan, [512])
    assert headings(table)[:4] == ["tokens", "tokens kept", "bytes kept", "KV MiB"]
    shown = [column.show(table.frame.iloc[0]) for column in table.columns]
    assert shown[1:3] == [f"{plan.density(512):.1%}", f"{plan.share(512):.1%}"]
    assert shown[1] != shown[2]
    assert headings(plan_frame(tiny_plan, [512]))[:3] == ["tokens", "tokens kept", "KV MiB (16 bit)"]
    assert "KV MiB" in headings(plans_frame({"plain": tiny_plan, "bits": plan}, [512]))
    assert plan_facts(plan)["bits"] == f"of keys/values: {tiers_text(plan)} KV heads"
    assert "bits" not in plan_facts(tiny_plan)


def test_a_layer_takes_the_bytes_of_its_bits(plan):
    frame = layer_frame(plan, 512, {}).frame
    assert frame["kv_bytes"].tolist() == plan.bytes_by_layer(512)
    assert frame["kv_bytes"].sum() == plan.kv_bytes(512)


def test_density_is_drawn_beside_bytes(plan):
    tokens, share, computed = plan.plot_density([256, 512]).lines
    assert [line.get_label() for line in (tokens, share, computed)] == ["tokens kept", "bytes kept", "prefill computed"]
    assert share.get_ydata().tolist() == [100 * plan.share(256), 100 * plan.share(512)]
    assert f"{plan.density(512):.1%} of the tokens in {plan.share(512):.1%} of the bytes" == plan.kept_text(512)
