"""Layers that keep the model's own sliding window under a plan."""

from __future__ import annotations

import pytest
import torch

from moa_search.errors import ModelMismatchError
from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, applied
from moa_search.spans import DENSE

from .explicit import explicit, logits, tiny_model, tiny_plan, tokens

WINDOW, BLOCK = 24, 8
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "Gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "tie_word_embeddings": False},
    "Gemma3": {"query_pre_attn_scalar": 16, "tie_word_embeddings": False},
    "Qwen2": {"use_sliding_window": True},
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": None},
}


def tiny(kind, dtype=torch.float64, **changes):
    dtype = torch.float32 if kind == "GptOss" else dtype
    return tiny_model(kind, dtype, **{**MODELS[kind], "sliding_window": WINDOW, "layer_types": LAYERS, **changes})


def native(plan):
    """The plan with the sliding layers native."""
    return Plan.from_rules(plan.rules, plan.model, native_layers=(0, 2), sink=plan.sink, block=plan.block)


def dense(model):
    return native(Plan.uniform(DENSE, ModelSignature.of(model.config), block=BLOCK))


def generate(model):
    """40 greedy tokens of a left-padded batch, whose prompts are longer than the window, and their logits."""
    prompt = tokens(2, 40)
    real = torch.ones_like(prompt)
    real[1, :13] = 0
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    result = model.generate(prompt, attention_mask=real, **options)
    return result.sequences, torch.stack(result.logits)


@pytest.mark.parametrize("kind", MODELS)
def test_with_all_other_heads_dense_generation_is_the_models_own(kind):
    model, wider = (tiny(kind, torch.float32, sliding_window=window) for window in (WINDOW, 400))
    for each in (model, wider):  # transformers' own eager attention gives NaN for padding in double
        each.set_attn_implementation("eager")
    expected, expected_logits = generate(model)
    with applied(model, dense(model)):
        found, found_logits = generate(model)
    assert torch.equal(found, expected)
    error = (found_logits - expected_logits).abs().max()
    assert error < 1e-3 * (generate(wider)[1] - expected_logits).abs().max()
    assert len(set(found[0, 40:].tolist())) > 5


@pytest.mark.parametrize("kind", MODELS)
def test_the_other_heads_follow_their_rules(kind):
    model = tiny(kind)
    plan = native(tiny_plan(model))
    reference = explicit(model, plan)
    prompt = tokens(1, 90)
    with applied(model, plan, impl="torch"), torch.no_grad():
        found = logits(model, prompt)
        generated = model.generate(prompt, max_new_tokens=40, do_sample=False)
    torch.testing.assert_close(found, logits(reference, prompt))
    assert torch.equal(generated[:, 90:], logits(reference, generated)[:, 89:-1].argmax(-1))


def test_chunks_of_any_size_and_padding_leave_the_output_as_it_is():
    model = tiny("Gemma2")
    plan = native(tiny_plan(model))
    reference = explicit(model, plan)
    sequence = tokens(1, 120)
    padded = torch.cat([sequence.new_zeros(1, 7), sequence], 1)
    real = (torch.arange(127) >= 7).long()[None]
    cache = MoACache(model.config, plan)
    found, end = [], 0
    with applied(model, plan), torch.no_grad():
        for size in (10, 1, 50, 1, 1, 30, 34):
            end += size
            part, position = padded[:, end - size : end], (real.cumsum(1) - 1).clamp(min=0)[:, end - size : end]
            found.append(model(part, attention_mask=real[:, :end], position_ids=position, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1)[:, 7:], logits(reference, sequence))


@pytest.mark.parametrize("kind", MODELS)
def test_the_cache_holds_their_window_and_no_sink_besides(kind):
    model = tiny(kind)
    plan = native(tiny_plan(model))
    cache = MoACache(model.config, plan)
    with applied(model, plan), torch.no_grad():
        for size in (10, 5, 1, 20, 100, 1):
            model(tokens(1, size), past_key_values=cache)
            itemsize = model.dtype.itemsize
            kept = plan.kv_bytes(cache.get_seq_length(), bytes_per_element=itemsize)
            assert kept <= cache.nbytes <= kept + 6 * 2 * BLOCK * model.config.head_dim * itemsize  # six heads
    held = [slots.stop - slots.start for slots in cache.layers[0].slots(only_sink=False)]
    assert held == [WINDOW, WINDOW]


def test_rollbacks_stay_exact():
    model = tiny("Gemma2")
    plan = native(tiny_plan(model))
    reference = explicit(model, plan)
    sequence, other = tokens(1, 100), tokens(1, 30, seed=1)
    cache = MoACache(model.config, plan)
    cache.activate_past_recording()
    with applied(model, plan), torch.no_grad():
        model(sequence, past_key_values=cache)
        cache.crop(-60)
        found = model(other, past_key_values=cache).logits
    whole = torch.cat([sequence[:, :40], other], 1)
    torch.testing.assert_close(found, logits(reference, whole)[:, 40:])


def test_a_layer_without_a_window_of_its_own_cannot_be_native():
    model = tiny("Gemma2")
    signature = ModelSignature.of(model.config)
    plan = Plan.uniform(DENSE, signature, native_layers=(0, 1))
    with pytest.raises(ModelMismatchError, match="layer 1 is to keep the model's own window of 24 tokens, but it att"):
        MoACache(model.config, plan)
