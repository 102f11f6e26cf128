"""What a cache takes, how it grows, and what a prefill takes beside it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from moa_kernels.cpu.library import unavailable
from transformers import DynamicCache

from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, apply_plan, chunks
from moa_search.runtime.rules import LayerRules
from moa_search.spans import BLOCK_TOKENS, DENSE, SpanRule

from .explicit import RULES, explicit, logits, tiny_model, tiny_plan, tokens
from .peak import Peak

PLANS = {
    "mixed": [SpanRule(128, 0), SpanRule(0, 64), SpanRule(-100, 160), SpanRule(300, 32)],
    "25 %": [SpanRule(0, 64)] * 4,
    "constant": [SpanRule(100, 0), SpanRule(48, 0), SpanRule(1000, 0), SpanRule(5000, 0)],
    "one dense": [DENSE, SpanRule(48, 0), SpanRule(48, 0), SpanRule(-4000, 256)],
}


@pytest.fixture(scope="module")
def wide():
    """A model whose plan has four KV heads per layer."""
    return tiny_model(dtype=torch.float32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4)


def store(layer, count, batch=1, heads=4):
    """Put ``count`` more tokens into a cache layer."""
    states = torch.zeros(batch, heads, count, 16)
    layer.update(states, states)
    layer.commit(states, states, None)


@pytest.mark.parametrize("name", PLANS)
def test_bytes_are_within_one_block_per_head_of_what_the_plan_keeps(wide, name):
    signature = ModelSignature.of(wide.config)
    plan = Plan.from_rules([PLANS[name]] * 2, signature)
    cache, batch, heads = MoACache(wide.config, plan), 2, 8
    width = 2 * signature.head_dim * torch.float32.itemsize
    lengths = [1, 2, 63, 64, 65, 100, 127, 128, 200, 511, 512, 1000, 1024, 1500, 2047, 2048, 3000, 4097, 6000, 8192]
    for before, length in zip([0, *lengths], lengths, strict=False):
        for layer in cache.layers:
            store(layer, length - before, batch)
        allocated = sum(
            states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values)
        )
        assert cache.nbytes == allocated
        predicted = plan.kv_bytes(length, batch=batch, bytes_per_element=4)
        dense = batch * heads * length * width
        assert predicted == pytest.approx(plan.density(length) * dense)
        assert predicted <= allocated <= predicted + batch * heads * BLOCK_TOKENS * width


@pytest.mark.parametrize("name", PLANS)
def test_growing_moves_less_than_a_block_th_of_the_cache_per_token(wide, name):
    plan = Plan.from_rules([PLANS[name]] * 2, ModelSignature.of(wide.config))
    layer, moved = MoACache(wide.config, plan).layers[0], 0
    store(layer, 2000)
    for _ in range(1000):
        before = layer.keys
        store(layer, 1)
        moved += 0 if layer.keys is before else before.nbytes
    steepest = max(1 if rule.alpha > 3000 else rule.beta for rule in PLANS[name])
    assert moved / 1000 <= layer.keys.nbytes * max(steepest / BLOCK_TOKENS, 1 / 2000)


def test_a_layout_lasts_until_some_head_has_grown_by_a_block():
    for rules in ([rule] for rule in RULES):
        layer = LayerRules(tuple(rules), sink=4, block=8)
        for length in range(1, 700, 3):
            roomy = layer.roomy_length(length)
            assert length < roomy <= 2 * (length + 8)
            assert layer.capacities(roomy)[0] - layer.capacities(length)[0] <= 8
            if roomy < 2 * (length + 8):
                assert layer.capacities(roomy + 1)[0] - layer.capacities(length)[0] > 8


def test_memory_is_flat_where_the_plan_is_flat(wide):
    plan = Plan.from_rules([PLANS["constant"]] * 2, ModelSignature.of(wide.config))
    layer = MoACache(wide.config, plan).layers[0]
    store(layer, 5000)
    keys = layer.keys
    for _ in range(1000):
        store(layer, 7)
    assert layer.keys is keys


@torch.no_grad()
def peak_of(model, length, **options):
    """Bytes beside the cache at the worst moment of prefilling ``length`` tokens, and the first new token."""
    prompt = tokens(1, length)
    with Peak() as peak:
        result = model.generate(
            prompt, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
        )
    return peak.nbytes - result.past_key_values.nbytes, result.logits[0]


def test_the_peak_of_a_long_prefill_does_not_grow_with_the_prompt(monkeypatch):
    model = tiny_model(dtype=torch.float32, max_position_embeddings=2048)
    plan = Plan.uniform(SpanRule(60, 0), ModelSignature.of(model.config), sink=4, block=8)
    reference = explicit(model, plan)
    apply_plan(model, plan)
    monkeypatch.setattr(chunks, "PREFILL_CHUNK_TOKENS", 128)
    short, _ = peak_of(model, 384)
    long, chunked = peak_of(model, 1536)
    whole_short, _ = peak_of(model, 384, prefill_chunk_size=10_000)
    whole_long, whole = peak_of(model, 1536, prefill_chunk_size=10_000)
    assert long < 1.3 * short  # the prompt itself and its positions
    assert whole_long > 3 * whole_short
    assert long < whole_long / 5
    torch.testing.assert_close(chunked, whole, rtol=1e-3, atol=1e-3)
    expected = logits(reference, tokens(1, 1536))[:, -1]
    torch.testing.assert_close(chunked, expected, rtol=1e-3, atol=1e-3)


def test_no_layers_keys_outlive_their_layers_turn():
    """Even in one go, a prefill never holds the whole keys of two layers."""
    peaks = []
    for layers in (2, 8):
        model = tiny_model(dtype=torch.float32, num_hidden_layers=layers, max_position_embeddings=2048)
        apply_plan(model, Plan.uniform(SpanRule(16, 0), ModelSignature.of(model.config), sink=4, block=8))
        peaks.append(peak_of(model, 1500)[0])
    assert peaks[1] < 1.05 * peaks[0]


def chunks_of(model, **options):
    """Lengths of the forward passes of a generation of two tokens."""
    lengths = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    try:
        model.generate(max_new_tokens=2, do_sample=False, **options)
    finally:
        handle.remove()
    return lengths


def test_only_long_prompts_are_cut_and_only_where_nobody_chose(monkeypatch):
    model = tiny_model()
    apply_plan(model, tiny_plan(model))
    monkeypatch.setattr(chunks, "PREFILL_CHUNK_TOKENS", 32)
    assert chunks_of(model, inputs=tokens(1, 32)) == [32, 1]
    assert chunks_of(model, inputs=tokens(1, 70)) == [32, 32, 6, 1]
    assert chunks_of(model, inputs=tokens(1, 70), prefill_chunk_size=50) == [50, 20, 1]
    assert chunks_of(model, inputs=tokens(1, 70), past_key_values=DynamicCache(config=model.config)) == [70, 1]
    embeddings = model.get_input_embeddings()(tokens(1, 70)).detach()
    assert chunks_of(model, inputs_embeds=embeddings) == [70, 1]
    every = model.generate(
        tokens(1, 70), max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True
    ).hidden_states
    assert every[0][0].shape[1] == 70


def test_padded_batches_and_beams_are_cut_without_a_trace(monkeypatch):
    model = tiny_model()
    apply_plan(model, tiny_plan(model))
    prompt, real = tokens(3, 100), torch.ones(3, 100, dtype=torch.int64)
    for sample, padding in enumerate((0, 10, 80)):
        real[sample, :padding] = 0
    options = {"attention_mask": real, "max_new_tokens": 20, "do_sample": False, "num_beams": 2}
    expected = model.generate(prompt, **options)
    monkeypatch.setattr(chunks, "PREFILL_CHUNK_TOKENS", 32)
    assert torch.equal(model.generate(prompt, **options), expected)


def test_a_long_turn_on_a_kept_cache_stays_exact(monkeypatch):
    model = tiny_model()
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    apply_plan(model, plan)
    monkeypatch.setattr(chunks, "PREFILL_CHUNK_TOKENS", 32)
    cache = MoACache(model.config, plan)
    sequence = model.generate(tokens(1, 50), max_new_tokens=10, do_sample=False, past_key_values=cache)
    sequence = torch.cat([sequence, tokens(1, 60, seed=1)], 1)
    found = model.generate(sequence, max_new_tokens=10, do_sample=False, past_key_values=cache)
    assert torch.equal(found[:, 120:], logits(reference, found)[:, 119:-1].argmax(-1))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize(
    "impl",
    ["torch", pytest.param("cpu", marks=pytest.mark.skipif(unavailable() is not None, reason="needs the CPU library"))],
)
def test_a_cache_is_freed_as_soon_as_nobody_has_it(options, impl):
    model = tiny_model(dtype=torch.float32)
    apply_plan(model, tiny_plan(model), impl=impl)
    gc.collect()
    gc.disable()
    try:
        found = model.generate(tokens(1, 40), max_new_tokens=4, return_dict_in_generate=True, **options)
        layer = weakref.ref(found.past_key_values.layers[0])
        del found
        assert layer() is None
    finally:
        gc.enable()
