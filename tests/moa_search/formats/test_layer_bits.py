"""Precisions per layer, as ModelOpt and KVTuner write them."""

import json

import numpy as np
import pytest
import yaml

from moa_search.errors import ConfigError, ModelMismatchError, PlanFormatError
from moa_search.formats import ModelSignature, Plan
from moa_search.formats.foreign import read_foreign, restricted, save_as
from moa_search.formats.transforms import KeyTransforms
from moa_search.spans import DENSE, SpanRule

LAYERS, HEADS, WIDTH = 3, 2, 8
MODEL = ModelSignature(
    architecture="llama",
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=HEADS,
    head_dim=WIDTH,
    config={"max_position_embeddings": 1000},
)
TRANSFORMS = KeyTransforms.of(
    {
        "balance": np.tile(np.eye(WIDTH, dtype=np.float32), (LAYERS, HEADS, 1, 1)),
        "frequencies": np.ones((LAYERS, WIDTH // 2), np.float32),
        "mean": np.zeros((LAYERS, HEADS, WIDTH), np.float32),
        "order": np.arange(WIDTH, dtype=np.int32),
    },
    MODEL,
)
BOTH = ["modelopt", "kvtuner"]


def plan_of(tiers, rule=DENSE, **fields):
    rules = [[rule] * HEADS] * LAYERS
    return Plan.from_rules(rules, MODEL, tiers=tiers, transforms=TRANSFORMS, **{"sink": 4, **fields})


@pytest.mark.parametrize("format", BOTH)
def test_what_is_written_reads_back_as_what_was_said_to_be_kept(tmp_path, format):
    mixed = plan_of([[(16, 16)] * 2, [(8, 4), (4, 8)], [(4, 2), (2, 2)]], SpanRule(100, 0))
    for plan in (mixed, plan_of([[(8, 8)] * 2] * 3), Plan.uniform(DENSE, MODEL)):
        kept = save_as(plan, tmp_path / "out", format)
        again = read_foreign(tmp_path / "out", MODEL, transforms=TRANSFORMS)
        assert again.tiers == kept.tiers
        assert (again.sink, again.rules) == (kept.sink, kept.rules) == (0, [[DENSE] * 2] * 3)
        assert again.key_transforms == kept.key_transforms


@pytest.mark.parametrize(
    ("format", "tiers"), [("modelopt", [(16, 16), (8, 8), (4, 4)]), ("kvtuner", [(16, 16), (8, 8), (4, 2)])]
)
def test_a_layer_stores_no_head_in_fewer_bits_than_the_plan(format, tiers):
    plan = plan_of([[(16, 16)] * 2, [(8, 4), (4, 8)], [(3, 2), (2, 2)]], SpanRule(100, 0))
    kept = restricted(plan, format)
    assert kept.tiers == [[tier] * 2 for tier in tiers]
    notes = "; ".join(kept.provenance.notes)
    assert "2 of 3 layers store some KV head in more bits than the plan" in notes
    assert "spans aren't kept" in notes
    assert "the first 4 tokens are stored in as few bits" in notes
    assert f"{plan.share(1000):.3f} -> {kept.share(1000):.3f} at 1000" in notes
    assert [metrics.share for metrics in kept.predicted] == [kept.share(n) for n in plan.lengths]


def test_keys_want_more_bits_than_values_where_modelopt_can_say_so():
    assert restricted(plan_of([[(8, 4)] * 2] * 3), "modelopt").tiers == [[(8, 4)] * 2] * 3
    assert restricted(plan_of([[(4, 8)] * 2] * 3), "modelopt").tiers == [[(8, 8)] * 2] * 3


def test_modelopt_has_the_keys_that_its_exporter_writes(tmp_path):
    save_as(plan_of([[(8, 8)] * 2, [(4, 4)] * 2, [(16, 16)] * 2]), tmp_path / "out", "modelopt")
    section = json.loads((tmp_path / "out").read_text())["quantization"]
    assert section == {
        "quant_algo": None,
        "kv_cache_quant_algo": "MIXED_PRECISION",
        "kv_cache_quantized_layers": {
            "model.layers.0.self_attn": {"quant_algo": "FP8"},
            "model.layers.1.self_attn": {"quant_algo": "NVFP4"},
        },
        "kv_cache_schema_version": 1,
    }
    save_as(plan_of([[(8, 4)] * 2] * 3), tmp_path / "out", "modelopt")
    assert json.loads((tmp_path / "out").read_text())["quantization"]["kv_cache_quant_algo"] == "FP8_K_NVFP4_V"


def test_kvtuner_has_every_layer(tmp_path):
    save_as(plan_of([[(8, 4)] * 2, [(4, 2)] * 2, [(16, 16)] * 2]), tmp_path / "out", "kvtuner")
    text = (tmp_path / "out").read_text()
    assert yaml.safe_load(text) == {
        0: {"nbits_key": 8, "nbits_value": 4},
        1: {"nbits_key": 4, "nbits_value": 2},
        2: {"nbits_key": 16, "nbits_value": 16},
    }
    assert text.startswith("# as KVTuner stores it")


def read(tmp_path, text, **options):
    (tmp_path / "file").write_text(text)
    return read_foreign(tmp_path / "file", MODEL, **{"transforms": TRANSFORMS, **options})


def test_modelopt_in_a_configuration_under_other_modules_names_and_before_layers(tmp_path):
    layers = {"model.language_model.layers.2.self_attn": {"quant_algo": "NVFP4_AFFINE"}}
    config = {
        "model_type": "x",
        "quantization_config": {"quant_method": "modelopt", "kv_cache_quantized_layers": layers},
    }
    assert read(tmp_path, json.dumps(config)).tiers == [[(16, 16)] * 2] * 2 + [[(4, 4)] * 2]
    older = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    assert read(tmp_path, json.dumps(older)).tiers == [[(8, 8)] * 2] * 3


def test_kvtuner_by_head(tmp_path):
    pair = "{nbits_key: 8, nbits_value: 4}"
    heads = f"{{0: {pair}, 1: {{nbits_key: 4, nbits_value: 2}}}}"
    text = f"0: {heads}\n1: {heads}\n2: {pair}\n"
    assert read(tmp_path, text).tiers == [[(8, 4), (4, 2)]] * 2 + [[(8, 4)] * 2]


BAD = [
    ('{"kv_cache_quantized_layers": 3}', PlanFormatError, "is no object of layers"),
    ('{"kv_cache_quantized_layers": {"lm_head": {"quant_algo": "FP8"}}}', PlanFormatError, "lm_head names no layer"),
    (
        '{"kv_cache_quantized_layers": {"layers.0.a": {"quant_algo": "FP8"}, "x.layers.0.b": {"quant_algo": "FP8"}}}',
        PlanFormatError,
        "x.layers.0.b is layer 0, which another name has",
    ),
    ('{"kv_cache_quantized_layers": {"layers.0": {"quant_algo": "FP6"}}}', PlanFormatError, r"FP6 is no format .*FP8"),
    ('{"kv_cache_quantized_layers": {"layers.0": null}}', PlanFormatError, "None is no format"),
    (
        '{"kv_cache_quantized_layers": {"layers.3": {"quant_algo": "FP8"}}}',
        ModelMismatchError,
        "has a layer 3, the model",
    ),
    (
        '{"kv_cache_quantized_layers": {}, "kv_cache_schema_version": 2}',
        PlanFormatError,
        "version 2 is unknown; 1 is read",
    ),
    ("0: {nbits_key: 4, nbits_value: 4}", PlanFormatError, "layer 1 is missing"),
    ("0: {nbits_key: 5, nbits_value: 4}", PlanFormatError, "layer 0: nbits_key is 5; 16, 8, 4, 3 and 2 bits"),
    ("0: {nbits_key: 4}", PlanFormatError, "layer 0: nbits_value is None"),
    ("0: {0: {nbits_key: 4, nbits_value: 4}}", ModelMismatchError, "bits of heads 0; the model has 2 KV heads"),
    ("0: {nbits_key: 4, nbits_value: 4}\n7: {}", ModelMismatchError, "it has a layer 7, the model 3 layers"),
]


@pytest.mark.parametrize(("text", "error", "message"), BAD)
def test_damaged_files_are_refused_in_one_line(tmp_path, text, error, message):
    with pytest.raises(error, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "0: {nbits_key: 4, nbits_value: 8}\n1: {nbits_key: 8, nbits_value: 8}\n2: {nbits_key: 8, nbits_value: 8}",
        '{"kv_cache_quantized_layers": {"layers.0": {"quant_algo": "NVFP4"}}}',
    ],
)
def test_keys_in_few_bits_need_transforms(tmp_path, text):
    with pytest.raises(ConfigError, match=r"keys in 4 bits need transforms .* made with moa-profile --tiers"):
        read(tmp_path, text, transforms=None)


def test_a_precision_for_formats_that_say_none(tmp_path):
    text = "kv_cache_config: {max_attention_window: [100]}"
    plan = read(tmp_path, text, bits=(8, 4), transforms=None)
    assert plan.tiers == [[(8, 4)] * 2] * 3
    assert plan.spans(500) == [[100] * 2] * 3
    with pytest.raises(ConfigError, match="keys in 2 bits need transforms"):
        read(tmp_path, text, bits=(2, 2), transforms=None)
    with pytest.raises(ConfigError, match=r"bits: .* is KVTuner's and says its own"):
        read(tmp_path, "0: {nbits_key: 4, nbits_value: 4}", bits=(8, 8))
