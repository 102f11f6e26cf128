"""Plans cut down to what engines hold: one constant window per layer, for some with a sink."""

from pathlib import Path

import numpy as np
import pytest

from moa_search.errors import ConfigError, ModelMismatchError, PlanFormatError
from moa_search.formats import ModelSignature, Plan
from moa_search.formats.engines import ENGINES
from moa_search.formats.foreign import read_foreign, restricted, save_as
from moa_search.masks import head_masks
from moa_search.spans import DENSE, SpanRule

MODEL = ModelSignature(
    architecture="llama",
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    config={"max_position_embeddings": 1000},
)
LAYERED = Plan.from_rules(
    [[DENSE] * 2, [SpanRule(100, 0)] * 2, [SpanRule(20, 64)] * 2, [SpanRule(20, 0)] * 2], MODEL, sink=4, block=16
)
NAMES = list(ENGINES)


def saved(plan, format, folder, **options):
    kept = save_as(plan, folder / "out", format, **options)
    return kept, read_foreign(folder / "out", plan.model)


@pytest.mark.parametrize("format", NAMES)
def test_what_is_written_reads_back_as_what_was_said_to_be_kept(tmp_path, format):
    for plan in (LAYERED, Plan.uniform(DENSE, MODEL), Plan.uniform(SpanRule(40, 0), MODEL, sink=8)):
        kept, again = saved(plan, format, tmp_path, window_length=800)
        assert (again.rules, again.sink, again.block) == (kept.rules, kept.sink, kept.block)


@pytest.mark.parametrize("format", NAMES)
def test_windows_are_the_spans_at_one_length(format):
    kept = restricted(LAYERED, format, 800)
    spans = [[800] * 2, [100] * 2, [220] * 2, [20] * 2]
    assert kept.spans(800) == LAYERED.spans(800) == spans
    assert kept.spans(400)[2] == [220] * 2, "they don't shrink"
    assert kept.sink == (4 if format == "mlx" else 0)
    notes = kept.provenance.notes
    assert any("1 of 4 layers' spans grow" in note for note in notes)
    assert any("no sink: windows are 4 tokens longer" in note for note in notes) == (format != "mlx")
    assert not any("different spans" in note for note in notes)


def test_without_a_length_the_longest_that_the_plan_was_made_for():
    assert restricted(LAYERED, "onnx").spans(10**4)[2] == [20 + 1000 // 4] * 2


def test_a_layer_keeps_its_longest_span_and_the_notes_say_what_that_takes():
    plan = Plan.from_rules(
        [[DENSE, SpanRule(50, 0)], *[[SpanRule(30, 0), SpanRule(60, 0)]] * 3], MODEL, sink=4, block=16
    )
    kept = restricted(plan, "tensorrt-llm", 100)
    assert kept.spans(100) == [[100] * 2, *[[60] * 2] * 3]
    assert "4 of 4 layers have KV heads of different spans; density 0.525 -> 0.700 at 100" in kept.provenance.notes[1]


def test_bits_are_not_kept(tmp_path):
    plan = Plan.from_rules(LAYERED.rules, MODEL, sink=4, block=16, tiers=[[(8, 8)] * 2] * 4)
    kept, again = saved(plan, "mlx", tmp_path, window_length=800)
    assert kept.is_plain
    assert again.is_plain
    assert any("in 16 bits; share of bytes" in note for note in kept.provenance.notes)


def attended(plan, layer, n):
    return head_masks(plan.rules[layer], 1, n, sink=plan.sink, min_span=plan.min_span)[0]


def test_layers_attend_as_engines_do(tmp_path):
    """A window of w holds the query and w - 1 keys before it; MLX's ring overwrites from ``keep`` on."""
    i, j = np.arange(60)[:, None], np.arange(60)
    for format in set(NAMES) - {"mlx"}:
        kept, _ = saved(LAYERED, format, tmp_path, window_length=800)
        np.testing.assert_array_equal(attended(kept, 3, 60), (j <= i) & (i - j < 20))
    kept, _ = saved(LAYERED, "mlx", tmp_path, window_length=800)
    ring: list[int] = []
    for position, row in enumerate(attended(kept, 3, 60)):
        if len(ring) < 20:
            ring.append(position)
        else:
            ring[4 + (position - 20) % 16] = position
        assert sorted(ring) == np.flatnonzero(row).tolist()


@pytest.mark.parametrize("format", NAMES)
def test_native_layers_keep_their_own_window(tmp_path, windowed_signature, format):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = windowed_signature.model_copy(update={"config": {**windowed_signature.config, "layer_types": kinds}})
    plan = Plan.from_rules([[SpanRule(300, 0)] * 2, [DENSE] * 2, [DENSE] * 2], model, native_layers=(1,), sink=4)
    kept, again = saved(plan, format, tmp_path, window_length=1000)
    assert again.native_layers == kept.native_layers == (1,)
    assert again.spans(1000) == plan.spans(1000)


BAD = {
    "tensorrt-llm": [
        ("kv_cache_config: {max_attention_window: 5}", "is no list of windows"),
        ("kv_cache_config: {max_attention_window: [1, 0]}", r"\[1\] is 0, no number of tokens"),
        ("kv_cache_config: {max_attention_window: [1.5, 2]}", r"\[0\] is 1.5, no number"),
    ],
    "executorch": [
        ("model: {local_global_attention: [-5, 0]}", r"\[0\] is -5, no number of tokens"),
        ("model: {local_global_attention: []}", "is no list of windows"),
        ("model: {local_global_attention: '[16]'}", "is no list of windows"),
    ],
    "onnx": [('{"GroupQueryAttention": {"local_window_size": [true, 2]}}', r"\[0\] is True")],
    "mlx": [
        ('{"RotatingKVCache": 3}', "no list of caches"),
        (
            '{"RotatingKVCache": [{"max_size": 4, "keep": 4}, null, null, null]}',
            r"\[0\] is .*, not null nor a max_size",
        ),
        ('{"RotatingKVCache": [7, null, null, null]}', r"\[0\] is 7"),
        (
            '{"RotatingKVCache": [{"max_size": 9, "keep": 4}, {"max_size": 9, "keep": 2}, null, null]}',
            r"different sinks \(2, 4 tokens\)",
        ),
        ('{"RotatingKVCache": [null], "RotatingKVCache": [null]}', "not a JSON file"),
    ],
}


@pytest.mark.parametrize(("format", "text", "message"), [(f, *case) for f, cases in BAD.items() for case in cases])
def test_damaged_files_are_refused_in_one_line(tmp_path, format, text, message):
    (tmp_path / "file").write_text(text)
    with pytest.raises(PlanFormatError, match=message) as caught:
        read_foreign(tmp_path / "file", MODEL)
    assert "\n" not in str(caught.value)


def test_windows_repeat_over_layers_and_must_divide_them(tmp_path):
    (tmp_path / "file").write_text("kv_cache_config: {max_attention_window: [50, 5000]}")
    assert read_foreign(tmp_path / "file", MODEL).spans(900) == [[50] * 2, [900] * 2] * 2
    (tmp_path / "file").write_text("kv_cache_config: {max_attention_window: [50, 60, 70]}")
    with pytest.raises(ModelMismatchError, match="has 3 windows, the model 4 layers"):
        read_foreign(tmp_path / "file", MODEL)
    (tmp_path / "file").write_text('{"RotatingKVCache": [null]}')
    with pytest.raises(ModelMismatchError, match="it has 1 layers, the model 4"):
        read_foreign(tmp_path / "file", MODEL)


@pytest.mark.parametrize("format", ["plan", "moa", "duo", "modelopt", "kvtuner"])
def test_a_length_is_for_engines(tmp_path, format):
    with pytest.raises(ConfigError, match=f"window_length: it is for formats of engines .*, not {format}"):
        save_as(LAYERED, tmp_path / "out", format, window_length=100)
    assert not list(Path(tmp_path).iterdir())
