from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moa_search.errors import ConfigError, ModelMismatchError, PlanFormatError
from moa_search.formats import ModelSignature, Plan
from moa_search.formats.duo import looks_like_scores, read_duo, read_duo_sizes, write_duo
from moa_search.masks import head_masks
from moa_search.spans import DENSE, SpanRule

GOLDEN = Path(__file__).parents[2] / "golden" / "duo-attention"
MODEL = ModelSignature(
    architecture="llama", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)
TABLE = (GOLDEN / "full_attention_heads.tsv").read_text()
SHORT = SpanRule(320, 0)


def read(table=TABLE, model=MODEL, **options):
    return read_duo(table, model, **{"sink": 64, "recent": 256, "source": "f.tsv", **options})


def test_dense_and_short_heads():
    plan = read()
    assert plan.rules == [[DENSE, SHORT], [DENSE, SHORT]], "0.5 is enough for a threshold of 0.5"
    assert plan.spans(1000) == [[1000, 320], [1000, 320]]
    assert (plan.anchor, plan.sink, plan.block) == ("position", 64, 32)
    assert "at least 0.5: 2 of 4 KV heads are dense, the others keep 64 + 256 tokens" in plan.provenance.notes[1]
    assert read(threshold=0.6).rules == [[DENSE, SHORT], [SHORT, SHORT]]
    assert read(threshold=-1).rules == [[DENSE, DENSE]] * 2


def test_short_heads_attend_as_duo_attentions_mask_says():
    """Its mask joins ``j < sink`` and ``j > i - recent``."""
    plan = read(sink=4, recent=3)
    i, j = np.arange(30)[:, None], np.arange(30)
    mask = head_masks(plan.rules[0], 1, 30, sink=plan.sink, min_span=plan.min_span)[1]
    np.testing.assert_array_equal(mask, (j <= i) & ((j < 4) | (j > i - 3)))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.77, 1.0])
def test_sparsity_is_a_quantile_of_the_scores(sparsity):
    rng = np.random.default_rng(0)
    scores = rng.random((7, 3))
    table = "\n".join("\t".join(map(str, row)) for row in scores)
    model = MODEL.model_copy(update={"num_hidden_layers": 7, "num_attention_heads": 3, "num_key_value_heads": 3})
    expected = scores >= np.quantile(scores, sparsity) if sparsity < 1 else np.zeros_like(scores, dtype=bool)
    found = [[rule.is_dense for rule in layer] for layer in read(table, model, sparsity=sparsity).rules]
    np.testing.assert_array_equal(found, expected)


def test_equal_scores_are_shortened_in_order():
    assert read("1\t1\n1\t1\n", sparsity=0.5).rules == [[SHORT, SHORT], [DENSE, DENSE]]


def test_sizes_are_those_of_the_configuration():
    assert read_duo_sizes((GOLDEN / "config.json").read_bytes(), source="c") == (64, 256)
    for text, words in (
        ("{", "not a JSON file"),
        ("[]", "sink_size"),
        ('{"sink_size": 1}', "recent_size is missing"),
        ('{"sink_size": 1.5, "recent_size": 2}', "sink_size is missing or no whole number"),
    ):
        with pytest.raises(PlanFormatError, match=words):
            read_duo_sizes(text, source="c")


def test_there_and_back():
    plan = read(threshold=0.45)
    files = write_duo(plan)
    again = read(files["full_attention_heads.tsv"])
    assert again.patterns == plan.patterns
    assert read_duo_sizes(files["config.json"], source="c") == (64, 256)
    assert write_duo(again) == files
    table = np.array([line.split("\t") for line in files["full_attention_heads.tsv"].splitlines()], dtype=float)
    np.testing.assert_array_equal(table, [[1, 0], [1, 0]])


def test_a_dense_plan_is_all_ones():
    files = write_duo(Plan.uniform(DENSE, MODEL))
    assert set(files["full_attention_heads.tsv"].split()) == {f"{1:.18e}"}


def test_what_duo_attentions_format_cannot_say(native_plan):
    for rules, words in (
        ([[DENSE, SHORT], [SpanRule(0, 32), DENSE]], r"layer 1, KV head 0: its span grows \(0.125n\)"),
        ([[DENSE, SHORT], [DENSE, SpanRule(400, 0)]], "layer 1, KV head 1: it keeps 400 tokens, heads before it 320"),
    ):
        with pytest.raises(ConfigError, match=words):
            write_duo(Plan.from_rules(rules, MODEL, sink=64, block=64))
    with pytest.raises(ConfigError, match="layer 1 keeps the model's own sliding window"):
        write_duo(native_plan)
    below = Plan.from_rules([[SpanRule(1, 0), SpanRule(48, 0)]] * 2, MODEL, sink=16, block=32)
    assert read_duo_sizes(write_duo(below)["config.json"], source="c") == (16, 32), "both keep the smallest span"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("0.5\tnan\n1\t1", "layer 0, KV head 1 is 'nan', no score"),
        ("0.5\t1\n1\tinf", "layer 1, KV head 1 is 'inf'"),
        ("0.5\tone\n1\t1", "'one'"),
        ("0.5\t\n1\t1", "layer 0, KV head 1 is ''"),
        (b"\xff\xfe", "no text"),
    ],
)
def test_damaged_tables(table, words):
    with pytest.raises(PlanFormatError, match=words):
        read(table)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "it has 0 layers, the model 2"),
        ("1\t1\n", "it has 1 layers, the model 2"),
        ("1\t1\n1\n", "layer 1 has 1 scores, the model 2 KV heads"),
        ("1\t1\t1\n1\t1\t1\n", "layer 0 has 3 scores"),
    ],
)
def test_tables_of_another_model(table, words):
    with pytest.raises(ModelMismatchError, match=words):
        read(table)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0.5, "sparsity": 0.5}, "exclude each other"),
        ({"threshold": float("nan")}, "threshold"),
        ({"sparsity": 1.5}, "sparsity: 1.5 is out of range"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"recent": 0}, "recent: 0 tokens"),
        ({"sink": -1}, "sink: -1 tokens"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ConfigError, match=words):
        read(**options)


def test_tables_are_told_by_their_first_line():
    assert looks_like_scores(TABLE.encode())
    assert looks_like_scores(b"1\n0\n")
    assert not looks_like_scores(b"")
    assert not looks_like_scores(b"layer\thead\n1\t2\n")
    assert not looks_like_scores(b"\xff")
