from __future__ import annotations

import json
from pathlib import Path

import pytest

from moa_search.errors import ConfigError, ModelMismatchError, PlanFormatError
from moa_search.formats import ModelSignature, Plan
from moa_search.formats.moa import read_moa, write_moa
from moa_search.spans import DENSE, SpanRule

GOLDEN = Path(__file__).parents[2] / "golden"
MODEL = ModelSignature(
    architecture="llama", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)
EXPANDED = MODEL.model_copy(update={"num_key_value_heads": 4})
TEXT = (GOLDEN / "moa-alphas-betas.json").read_text()


def edited(key, layer, head, value):
    content = json.loads(TEXT)
    content[key][layer][head] = value
    return json.dumps(content)


def test_spans_are_alpha_plus_beta_n_with_the_sink_inside():
    """As MoA's cache computes them: never over N, and at least 128 tokens."""
    plan = read_moa(TEXT, EXPANDED, source="f")
    assert (plan.anchor, plan.sink, plan.min_span) == ("prompt", 64, 128)
    assert plan.spans(4096) == [[1024, 1024, 512, 3072], [4096, 2048, 101 + 4096 * 77 // 256, 64 + 1024]]
    assert plan.spans(512)[0] == [512, 512, 128, 128]
    assert plan.anchored_at(4096).rules[0][2] == SpanRule(512, 0)


def test_rules_off_the_grid_are_rounded_and_it_is_said():
    plan = read_moa(TEXT, EXPANDED, source="f")
    assert plan.rules[1][2] == SpanRule(101, 77), "100.5 upwards, 0.3 * 256 = 76.8"
    notes = plan.provenance.notes
    assert "1 of 8 rules rounded" in notes[1]
    assert "at most 1.3 tokens at 1024, 2.1 tokens at 2048, 3.7 tokens at 4096" in notes[1]
    exact = json.dumps({"alphas": [[64.0] * 4] * 2, "betas": [[0.125] * 4] * 2})
    assert len(read_moa(exact, EXPANDED, source="f").provenance.notes) == 1


def test_query_heads_are_folded_and_the_cost_is_said():
    plan = read_moa(TEXT, MODEL, source="f")
    assert plan.rules == [[SpanRule(1024, 0), SpanRule(0, 256)], [DENSE, SpanRule(101, 77)]]
    folding, cost = plan.provenance.notes[2:]
    assert "3 of 4 unequal" in folding
    assert "1 with rules that cross" in folding
    assert "at every length" in folding
    before = read_moa(TEXT, EXPANDED, source="f").density(4096)
    assert f"{before:.3f} -> {plan.density(4096):.3f} at 4096" in cost
    assert [metrics.length for metrics in plan.predicted] == [1024, 2048, 4096]


def test_lengths_make_the_fold_of_crossing_rules_tighter():
    plan = read_moa(TEXT, MODEL, source="f", fold_lengths=[4096, 2048])
    assert plan.rules[0][1] == SpanRule(-1024, 256)
    assert "from 2048 to 4096 tokens" in plan.provenance.notes[2]
    assert [metrics.length for metrics in plan.predicted] == [2048, 4096]
    assert plan.density(4096) < read_moa(TEXT, MODEL, source="f").density(4096)


def test_there_and_back():
    plan = read_moa(TEXT, MODEL, source="f")
    text = write_moa(plan)
    assert json.loads(text)["betas"][0] == [0.0, 0.0, 1.0, 1.0]
    again = read_moa(text, MODEL, source="f")
    assert again.patterns == plan.patterns
    assert write_moa(again) == text
    saved = Plan.loads(plan.dumps())
    assert saved == plan
    assert write_moa(saved) == text


def test_what_moas_format_cannot_say():
    plan = read_moa(TEXT, MODEL, source="f")
    for change, words in (
        ({"sink": 16}, "sink is 16 tokens and MoA's is always 64"),
        ({"block": 32}, "block is 32 tokens"),
        ({"anchor": "position"}, "evaluated at every position"),
    ):
        with pytest.raises(ConfigError, match=words):
            write_moa(plan.model_copy(update=change))
    by_position = plan.model_copy(update={"anchor": "position"})
    assert write_moa(by_position, reanchor=True) == write_moa(plan)


def test_native_layers_cannot_be_said(native_plan):
    with pytest.raises(ConfigError, match="layer 1 keeps the model's own sliding window"):
        write_moa(native_plan)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXT[:50], "truncated"),
        ("[1]", "not a file of MoA's"),
        (edited("alphas", 0, 1, float("nan")), "NaN is not a JSON number"),
        (edited("betas", 1, 2, -0.25), r"betas\[1\]\[2\] is -0.25; it must lie in 0..1"),
        (edited("betas", 0, 0, 1.25), r"betas\[0\]\[0\] is 1.25"),
        (edited("alphas", 0, 3, "64"), r"alphas\[0\]\[3\] is 64, no number"),
        (edited("alphas", 0, 3, True), r"alphas\[0\]\[3\] is True, no number"),
        (edited("alphas", 0, 3, None), r"alphas\[0\]\[3\] is None, no number"),
        (edited("alphas", 1, 0, 10**400), r"alphas\[1\]\[0\] is 1000"),
        (edited("alphas", 1, 0, -1e12), r"alphas\[1\]\[0\] is -1e\+12"),
        (json.dumps({"alphas": [[1]]}), "betas is no list"),
        (json.dumps({"alphas": [1, 2], "betas": [[1]]}), "alphas is no list"),
        (json.dumps({**json.loads(TEXT), "beta": []}), r"unknown key \(did you mean 'betas'"),
        (json.dumps({"alphas": [[1] * 4] * 2, "betas": [[1] * 4, [1] * 3]}), "differ in shape"),
    ],
)
def test_damaged_files(text, words):
    with pytest.raises(PlanFormatError, match=words) as caught:
        read_moa(text, MODEL, source="file.json")
    assert str(caught.value).startswith("file.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_hidden_layers": 3}, "it has 2 layers, the model 3"),
        ({"num_attention_heads": 8}, "layer 0 has 4 heads, the model 8 query heads"),
    ],
)
def test_files_of_another_model(sizes, words):
    with pytest.raises(ModelMismatchError, match=words):
        read_moa(TEXT, MODEL.model_copy(update=sizes), source="f")
