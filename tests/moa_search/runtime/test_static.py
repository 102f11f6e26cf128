"""Caches of fixed size: the same tokens, one graph, and no more than they were made for."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.generation import CompileConfig

from moa_search.errors import ConfigError, ModelUnsupportedError, UnsupportedInputError
from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, applied, apply_plan
from moa_search.spans import SpanRule
from tests.moa_search.architectures import make_model

from .explicit import explicit, logits, tiny_model, tiny_plan, tokens

KINDS = {
    "Llama": {},
    "Gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "GptOss": {"sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": None},
}


def tiny(kind="Llama", **changes):
    dtype = torch.float32 if kind == "GptOss" else torch.float64
    return tiny_model(kind, dtype, **{"num_hidden_layers": 2, **KINDS[kind], **changes})


@pytest.fixture
def compiler():
    """A fresh compiler, and its counters."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@torch.no_grad()
def decode(step, model, cache, prompt, count):
    """``count`` greedy tokens after a prompt, ``step`` by step."""
    following = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
    found = [following.contiguous()]
    for index in range(count - 1):
        position = torch.full((len(prompt), 1), prompt.shape[1] + index)
        following = step(found[-1], position_ids=position, past_key_values=cache).logits[:, -1:].argmax(-1)
        found.append(following.contiguous())
    return torch.cat(found, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_static_generation_is_that_of_a_growing_cache(kind):
    model = tiny(kind)
    plan = tiny_plan(model)
    prompt, real = tokens(3, 60), torch.ones(3, 60, dtype=torch.int64)
    real[0, :50] = 0
    real[1, :7] = 0
    with applied(model, plan):
        for options in ({"attention_mask": real}, {"num_beams": 2}, {"prefill_chunk_size": 25}):
            options = {"max_new_tokens": 50, "do_sample": False, "return_dict_in_generate": True, **options}
            expected = model.generate(prompt, **options)
            found = model.generate(prompt, cache_implementation="static", **options)
            assert torch.equal(found.sequences, expected.sequences)
            assert found.past_key_values.is_compileable
            assert not expected.past_key_values.is_compileable


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_is_one_graph_for_hundreds_of_tokens(kind, compiler):
    model = tiny(kind)
    plan = tiny_plan(model)
    apply_plan(model, plan)
    prompt = tokens(2, 20)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = decode(step, model, MoACache(model.config, plan, max_length=400), prompt, 250)
    assert torch.equal(found, decode(model, model, MoACache(model.config, plan), prompt, 250))
    assert compiler["stats"]["unique_graphs"] == 1
    assert not compiler["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own
def test_inductor_compiles_a_step(compiler):
    model = tiny(num_hidden_layers=1)
    plan = tiny_plan(model)
    apply_plan(model, plan)
    prompt = tokens(1, 20)
    step = torch.compile(model, fullgraph=True)
    found = decode(step, model, MoACache(model.config, plan, max_length=100), prompt, 60)
    assert torch.equal(found, decode(model, model, MoACache(model.config, plan), prompt, 60))
    assert compiler["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_generate_compiles_by_itself_and_only_its_steps(compiler):
    """As on a GPU, where transformers compiles whatever has a static cache; prompts of any length stay uncompiled."""
    model = tiny()
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    apply_plan(model, plan)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    options = {"do_sample": False, "cache_implementation": "static", "compile_config": config}
    for length, new in ((60, 40), (33, 50), (20, 30)):  # none longer than the first
        real = torch.ones(2, length, dtype=torch.int64)
        real[0, :9] = 0
        found = model.generate(tokens(2, length), attention_mask=real, max_new_tokens=new, **options)
        for sample, first in ((0, 9), (1, 0)):
            sequence = found[sample : sample + 1, first:]
            expected = logits(reference, sequence)[:, length - first - 1 : -1].argmax(-1)
            assert torch.equal(sequence[:, length - first :], expected)
    assert compiler["stats"]["unique_graphs"] == 1
    assert not compiler["graph_break"]


def test_several_new_tokens_and_padding_among_them_stay_exact():
    model = tiny()
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    apply_plan(model, plan)
    sequence, real = tokens(2, 150), torch.ones(2, 150, dtype=torch.int64)
    real[0, 40:55] = 0
    real[1, 100:103] = 0
    position = (real.cumsum(1) - 1).clamp(min=0)
    cache, found, end = MoACache(model.config, plan, max_length=150), [], 0
    with torch.no_grad():
        for size in (1, 8, 8, 30, 5, 40, 8, 1, 1, 1, 1, 20, 8, 8, 8, 2):
            part = slice(end, end + size)
            end += size
            masked = real[:, :end] if real[:, part].min() == 0 else None
            found.append(
                model(
                    sequence[:, part], attention_mask=masked, position_ids=position[:, part], past_key_values=cache
                ).logits
            )
    assert end == 150
    for sample, mask, mine in zip(sequence, real.bool(), torch.cat(found, 1), strict=True):
        torch.testing.assert_close(mine[mask], logits(reference, sample[mask][None])[0])


def test_capacities_are_what_the_plan_keeps_at_the_greatest_length():
    model = tiny()
    plan = tiny_plan(model)
    apply_plan(model, plan)
    cache = MoACache(model.config, plan, max_length=300)
    model.generate(tokens(1, 10), max_new_tokens=5, past_key_values=cache)
    before = cache.nbytes
    kept = [min(span + 7, 300) for spans in plan.spans(300) for span in spans]
    assert before == 2 * sum(kept) * model.config.head_dim * model.dtype.itemsize
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    model.generate(tokens(1, 250), max_new_tokens=40, past_key_values=cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses
    assert cache.layers[0].get_max_length() == 300


@pytest.mark.parametrize("compiled", [False, True])
def test_a_token_too_many_is_an_error(compiled, compiler):
    model = tiny()
    plan = tiny_plan(model)
    apply_plan(model, plan)
    step = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    decode(step, model, MoACache(model.config, plan, max_length=25), tokens(2, 20), 6)
    with pytest.raises(UnsupportedInputError, match=r"more tokens than the 25 .*max_length"):
        decode(step, model, MoACache(model.config, plan, max_length=25), tokens(2, 20), 7)


def test_generate_says_beforehand_that_a_cache_is_too_small():
    model = tiny()
    plan = tiny_plan(model)
    apply_plan(model, plan)
    cache = MoACache(model.config, plan, max_length=30)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("a token came out"))
    with pytest.raises(UnsupportedInputError, match="49 tokens, prompt and answer, don't fit a MoACache made for 30"):
        model.generate(tokens(1, 20), max_new_tokens=30, past_key_values=cache)
    with pytest.raises(ConfigError, match="max_length is 0"):
        MoACache(model.config, plan, max_length=0)


def test_generate_makes_a_cache_as_large_as_any_before():
    model = tiny()
    apply_plan(model, tiny_plan(model))
    options = {"cache_implementation": "static", "return_dict_in_generate": True, "do_sample": False}
    lengths = []
    for length, new in ((50, 10), (30, 5), (60, 20)):
        result = model.generate(tokens(1, length), max_new_tokens=new, **options)
        lengths.append(result.past_key_values.layers[0].get_max_length())
    assert lengths == [59, 59, 79]  # the last token is never stored
    embeddings = model.get_input_embeddings()(tokens(1, 90)).detach()
    result = model.generate(inputs_embeds=embeddings, max_new_tokens=15, **options)
    assert result.past_key_values.layers[0].get_max_length() == 104
    with applied(model, tiny_plan(model, shift=1)):
        result = model.generate(tokens(1, 20), max_new_tokens=5, **options)
        assert result.past_key_values.layers[0].get_max_length() == 104


def test_a_cache_that_is_reset_or_copied_goes_on_without_a_trace():
    model = tiny()
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    apply_plan(model, plan)
    cache = MoACache(model.config, plan, max_length=200)
    cache.reset()
    with torch.no_grad():
        model(tokens(1, 60), past_key_values=cache)
        address = cache.layers[0].keys.data_ptr()
        cache.reset()
        prefix = tokens(1, 70, seed=1)
        model(prefix, past_key_values=cache)
    assert cache.layers[0].keys.data_ptr() == address
    for seed in (2, 3):
        sequence = torch.cat([prefix, tokens(1, 30, seed=seed)], 1)
        found = model.generate(sequence, max_new_tokens=20, do_sample=False, past_key_values=cache.copy())
        assert torch.equal(found[:, 100:], logits(reference, found)[:, 99:-1].argmax(-1))
    assert int(cache.get_seq_length()) == 70


def test_rollbacks_and_other_batches_are_refused():
    model = tiny()
    plan = tiny_plan(model)
    apply_plan(model, plan)
    cache = MoACache(model.config, plan, max_length=100)
    with torch.no_grad():
        model(tokens(2, 20), past_key_values=cache)
        with pytest.raises(UnsupportedInputError, match="holds 2 samples and gets 1"):
            model(tokens(1, 1), past_key_values=cache)
    for rollback in (cache.activate_past_recording, lambda: cache.crop(-1)):
        with pytest.raises(UnsupportedInputError, match="can't be rolled back"):
            rollback()


def test_layers_that_also_carry_a_recurrence_are_refused_before_the_first_token():
    model = make_model("falcon_h1")
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("a token came out"))
    apply_plan(model, Plan.uniform(SpanRule(12, 0), ModelSignature.of(model.config), sink=4, block=8))
    with pytest.raises(ModelUnsupportedError, match="LinearAttentionAndFullAttentionLayer; leave max_length"):
        model.generate(tokens(1, 20), max_new_tokens=3, cache_implementation="static")


def test_a_step_asks_the_device_nothing(monkeypatch):
    """What waits for a GPU can't be recorded into a CUDA graph, and stalls every layer of every step."""
    model = tiny()
    plan = tiny_plan(model)
    apply_plan(model, plan)
    cache = MoACache(model.config, plan, max_length=60)
    with torch.no_grad():
        model(tokens(2, 40), past_key_values=cache)
    kind = type(cache.layers[0])
    for name in ("longest", "shortest"):
        monkeypatch.setattr(kind, name, property(lambda self: pytest.fail("asks the device")))
    with torch.no_grad():
        model(tokens(2, 1), past_key_values=cache)
