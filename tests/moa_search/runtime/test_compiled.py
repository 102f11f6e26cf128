"""Compiled models under a plan: by every way to compile, with growing and fixed caches, as without compiling."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from moa_search.runtime import MoACache, apply_plan, remove_plan

from .explicit import explicit, logits, tiny_model, tiny_plan, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit"),  # the compiler asks by the old name
    pytest.mark.filterwarnings("ignore:.*lru_cache"),
]

OPTIONS = [{}, {"dynamic": True}, {"fullgraph": True}]
CACHES = [None, "static"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def generate(model, cache=None, batch=2, **options):
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "disable_compile": True,
        "cache_implementation": cache,
    } | options
    return model.generate(tokens(batch, 70), **options)


def planned(kind="Llama", **changes):
    model = tiny_model(kind, dtype=torch.float32, **{"num_hidden_layers": 2} | changes)
    return apply_plan(model, tiny_plan(model))


def forward(model, **options):
    model.forward = torch.compile(model.forward, backend="eager", **options)


def decoder(model, **options):
    model.model.forward = torch.compile(model.model.forward, backend="eager", **options)


def layers(model, **options):
    for layer in model.model.layers:
        layer.compile(backend="eager", **options)


def attention(model, **options):
    for layer in model.model.layers:
        layer.self_attn.forward = torch.compile(layer.self_attn.forward, backend="eager", **options)


def in_place(model, **options):
    model.compile(backend="eager", **options)


@pytest.mark.parametrize(
    ("way", "cache", "options"),
    [(forward, cache, options) for cache in CACHES for options in OPTIONS]
    + [(way, None, {}) for way in (decoder, layers, attention, in_place)]
    + [(way, "static", {"fullgraph": True}) for way in (decoder, in_place)]
    + [(way, "static", {}) for way in (layers, attention)],
)
def test_generation_is_the_uncompiled_one(way, cache, options):
    model = planned()
    expected = generate(model, cache)
    way(model, **options)
    assert torch.equal(generate(model, cache), expected)
    assert torch.equal(generate(model, cache, batch=1), expected[:1])  # another cache, the same graphs


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["Gemma2", "GptOss", "Qwen2Moe"])
def test_models_with_windows_caps_sinks_and_experts_compile_too(kind, cache):
    changes = {"head_dim": 16, "sliding_window": 24} if kind != "Qwen2Moe" else {}
    model = planned(kind, **changes)
    expected = generate(model, cache)
    forward(model)
    assert torch.equal(generate(model, cache), expected)


@pytest.mark.parametrize("cache", CACHES)
def test_padding_within_a_compiled_forward(cache):
    model = planned()
    real = torch.ones(2, 70, dtype=torch.int64)
    real[0, :30] = 0
    expected = generate(model, cache, attention_mask=real)
    forward(model, fullgraph=True)
    assert torch.equal(generate(model, cache, attention_mask=real), expected)


@pytest.mark.parametrize("cache", CACHES)
def test_a_forward_compiled_before_the_plan_and_after_it(cache):
    model = tiny_model(dtype=torch.float32, num_hidden_layers=2)
    dense = generate(model, cache)
    forward(model)
    assert torch.equal(generate(model, cache), dense)
    plan = tiny_plan(model)
    apply_plan(model, plan)
    expected = generate(planned(), cache)
    assert torch.equal(generate(model, cache), expected)
    remove_plan(model)
    assert torch.equal(generate(model, cache), dense)


def test_a_second_plan_is_heeded_by_what_was_compiled_for_the_first():
    model = planned()
    forward(model, fullgraph=True)
    generate(model)
    apply_plan(model, tiny_plan(model, shift=1))
    other = tiny_model(dtype=torch.float32, num_hidden_layers=2)
    expected = generate(apply_plan(other, tiny_plan(other, shift=1)))
    assert torch.equal(generate(model), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_pass_without_a_cache_or_with_a_dense_one(options):
    model = tiny_model(dtype=torch.float32, num_hidden_layers=2)
    plan = tiny_plan(model)
    sequence = tokens(2, 90)
    expected = logits(explicit(model, plan), sequence)
    apply_plan(model, plan)
    compiled = torch.compile(model, backend="eager", **options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(sequence, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        cache = DynamicCache(config=model.config)
        compiled(sequence[:, :50], past_key_values=cache)
        found = compiled(sequence[:, 50:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[:, 50:], rtol=1e-4, atol=1e-4)


def test_a_pass_that_makes_its_cache_breaks_the_graph_and_still_makes_ours():
    model = planned()
    with torch.no_grad():
        expected = model(tokens(2, 50))
        found = torch.compile(model, backend="eager")(tokens(2, 50))
    assert torch.equal(found.logits, expected.logits)
    assert type(found.past_key_values) is MoACache
    assert found.past_key_values.nbytes == expected.past_key_values.nbytes


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it where a graph breaks
@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients_are_the_uncompiled_ones(use_cache):
    model = planned()
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        run(tokens(2, 60), labels=tokens(2, 60), use_cache=use_cache).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("cache", CACHES)
def test_inductor_compiles_it(cache, mode):
    model = planned()
    expected = generate(model, cache)
    model.forward = torch.compile(model.forward, mode=mode, fullgraph=True)
    assert torch.equal(generate(model, cache), expected)
    assert torch.equal(generate(model, cache, batch=1), expected[:1])


def test_a_cache_filled_uncompiled_goes_on_compiled_and_back():
    model = planned()
    sequence = tokens(1, 120)
    with torch.no_grad():
        expected = model(sequence, use_cache=False).logits
        for cache in (
            MoACache(model.config, tiny_plan(model)),
            MoACache(model.config, tiny_plan(model), max_length=128),
        ):
            step = torch.compile(model, backend="eager", fullgraph=True)
            parts = [
                run(part, past_key_values=cache).logits
                for run, part in zip((model, step, step, model), sequence.split([60, 30, 10, 20], 1), strict=True)
            ]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
