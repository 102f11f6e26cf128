from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from moa_search.errors import UnsupportedInputError
from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, applied, apply_plan
from moa_search.runtime.attention import moa_mask
from moa_search.runtime.blockwise import ROW_BLOCK
from moa_search.spans import DENSE

from .explicit import explicit, logits, tiny_model, tiny_plan, tokens

ARCHITECTURES = {
    "Qwen2": {},
    "Mistral": {"sliding_window": 24},
    "Phi3": {"head_dim": 8},
    "GPTNeoX": {"num_attention_heads": 3, "num_key_value_heads": None, "head_dim": None},
    "Gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "Gemma3": {"sliding_window": 24, "query_pre_attn_scalar": 16},
    "GptOss": {
        "sliding_window": 24,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": None,
    },
    "Bamba": {"attn_layer_indices": [0, 2], "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8},
}
SINGLE_PRECISION = {"GptOss"}
WINDOW_IN_ITS_MASK_ONLY = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "use_sliding_window": True,
    "sliding_window": 24,
    "max_window_layers": 1,
}


def tiny(kind, dtype=torch.float64):
    if kind == "Qwen2Moe":
        return tiny_model(kind, dtype, **WINDOW_IN_ITS_MASK_ONLY)
    return tiny_model(kind, torch.float32 if kind in SINGLE_PRECISION else dtype, **ARCHITECTURES[kind])


@pytest.fixture(scope="module")
def llama():
    return tiny_model()


@pytest.fixture(scope="module")
def plan(llama):
    return tiny_plan(llama)


@pytest.fixture(scope="module")
def reference(llama, plan):
    return explicit(llama, plan)


@pytest.mark.parametrize("length", [1, 3, 5, 64, ROW_BLOCK, ROW_BLOCK + 1, 300])
def test_a_forward_pass_without_cache_equals_explicit_masks(llama, plan, reference, length):
    prompt = tokens(2, length)
    with applied(llama, plan):
        found = logits(llama, prompt)
    torch.testing.assert_close(found, logits(reference, prompt))


def test_the_plan_changes_the_output(llama, reference):
    prompt = tokens(1, 100)
    assert (logits(llama, prompt) - logits(reference, prompt)).abs().max() > 1


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "Qwen2Moe"])
def test_a_dense_plan_equals_the_model_itself(kind):
    model = tiny(kind, torch.float32)  # transformers' own eager attention gives NaN for padding in double
    model.set_attn_implementation("eager")
    prompt = tokens(2, 90)
    real = torch.ones_like(prompt)
    real[0, :20] = 0
    with torch.no_grad():
        expected = model.generate(prompt, attention_mask=real, max_new_tokens=20, do_sample=False)
        with applied(model, Plan.uniform(DENSE, ModelSignature.of(model.config))):
            found = model.generate(prompt, attention_mask=real, max_new_tokens=20, do_sample=False)
    assert torch.equal(found, expected)


def test_a_stock_dynamic_cache_gives_the_same_output(llama, plan, reference):
    prompt = tokens(1, 150)
    cache = DynamicCache(config=llama.config)
    with applied(llama, plan), torch.no_grad():
        parts = [llama(part, past_key_values=cache).logits for part in prompt.split([100, 1, 49], 1)]
        generated = llama.generate(
            prompt, max_new_tokens=20, do_sample=False, past_key_values=DynamicCache(config=llama.config)
        )
    torch.testing.assert_close(torch.cat(parts, 1), logits(reference, prompt))
    assert torch.equal(generated[:, 150:], logits(reference, generated)[:, 149:-1].argmax(-1))


def test_padding_without_a_cache_leaves_each_sample_as_it_is_alone(llama, plan):
    prompt = tokens(3, 150)
    real = torch.ones_like(prompt)
    real[0, :40] = 0
    real[1, 110:] = 0
    real[2, 30:80] = 0
    position = (real.cumsum(1) - 1).clamp(min=0)
    with applied(llama, plan), torch.no_grad():
        found = llama(prompt, attention_mask=real, position_ids=position, use_cache=False).logits
        for sample, mask, mine in zip(prompt, real.bool(), found, strict=True):
            torch.testing.assert_close(mine[mask], logits(llama, sample[mask][None])[0])


def test_low_precision_stays_close_to_double(plan):
    prompt = tokens(1, 200)
    exact = logits(apply_plan(tiny_model(), plan), prompt)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 2.0)):
        found = logits(apply_plan(tiny_model(dtype=dtype), plan), prompt)
        assert found.dtype == dtype
        assert (found.double() - exact).abs().mean() < tolerance


@pytest.mark.parametrize("with_cache", [False, True])
def test_gradients_flow(llama, plan, reference, with_cache):
    prompt = tokens(1, 150)

    def gradients(model, **kwargs):
        inputs = model.get_input_embeddings()(prompt).detach().requires_grad_()
        loss = model(inputs_embeds=inputs, labels=prompt, **kwargs).loss
        return torch.autograd.grad(loss, [inputs, model.model.layers[0].self_attn.k_proj.weight])

    expected = gradients(reference, use_cache=False)
    with applied(llama, plan):
        cache = MoACache(llama.config, plan) if with_cache else None
        found = gradients(llama, past_key_values=cache, use_cache=with_cache)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "mask_function",
    [
        bidirectional_mask_function,
        sliding_window_bidirectional_mask_function(8),
        chunked_causal_mask_function(8, torch.zeros(1)),
        and_masks(causal_mask_function, packed_sequence_mask_function(torch.zeros(1, 4))),
        lambda *args: True,
    ],
)
def test_masks_that_are_not_plainly_causal_are_refused(mask_function):
    with pytest.raises(UnsupportedInputError, match="causal masks only"):
        moa_mask(1, 4, 4, mask_function=mask_function)


def test_causal_masks_give_the_padding_of_the_keys_at_hand():
    real = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert moa_mask(2, 4, 4, attention_mask=torch.ones(2, 4), mask_function=causal_mask_function) is None
    assert torch.equal(moa_mask(2, 4, 4, attention_mask=real), real.bool())
    assert moa_mask(2, 2, 2, 2, 2, attention_mask=real) is None
    assert torch.equal(
        moa_mask(2, 3, 3, 1, 1, sliding_window_causal_mask_function(8), torch.ones(2, 4) - real),
        ~real[:, 1:].bool(),
    )
    again = moa_mask(2, 4, 4, 3, 3, attention_mask=real)
    assert torch.equal(moa_mask(2, 4, 4, 3, 3, attention_mask=again), again)


def test_with_a_cache_of_fixed_size_the_padding_is_always_returned_and_looks_alike_at_every_step():
    seen = torch.tensor(5)
    for length in (6, 7):
        real = torch.ones(1, length, dtype=torch.bool)
        mask = moa_mask(1, 1, 1, seen, seen, attention_mask=real)
        assert mask.tolist() == [[True]]
        assert mask.stride() == (1, 1)
    with pytest.raises(UnsupportedInputError, match="StaticCache"):
        moa_mask(1, 1, 64, seen, 0, attention_mask=real)


def test_packed_sequences_are_refused(llama, plan):
    packed = torch.cat([torch.arange(20), torch.arange(30)])[None]
    with applied(llama, plan), pytest.raises(UnsupportedInputError, match="packed"):
        llama(tokens(1, 50), position_ids=packed, use_cache=False)


def test_a_static_cache_is_refused(llama, plan):
    cache = StaticCache(config=llama.config, max_cache_len=64)
    with applied(llama, plan), pytest.raises(UnsupportedInputError, match="StaticCache"):
        llama(tokens(1, 20), past_key_values=cache)


def test_a_stock_sliding_cache_is_refused_once_it_has_dropped_tokens():
    model = tiny("Mistral")
    cache = DynamicCache(config=model.config)
    with applied(model, tiny_plan(model)), torch.no_grad():
        model(tokens(1, 40), past_key_values=cache)
        with pytest.raises(UnsupportedInputError, match="use MoACache"):
            model(tokens(1, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"attention_mask": torch.zeros(1, 1, 20, 20)}, "4-D"),
        ({"attention_mask": torch.ones(1, 25)}, "attention_mask"),
        ({"output_attentions": True}, "output_attentions"),
        ({"cache": object()}, "paged"),
        ({"cu_seq_lens_q": torch.tensor([0, 20])}, "packed"),
        ({"is_causal": False}, "causal"),
    ],
)
def test_arguments_that_a_plan_cannot_honour_are_refused(llama, plan, arguments, reason):
    with applied(llama, plan), pytest.raises(UnsupportedInputError, match=reason):
        llama(tokens(1, 20), use_cache=False, **arguments)


def test_dropout_is_refused():
    model = tiny_model(attention_dropout=0.1).train()
    with applied(model, tiny_plan(model)), pytest.raises(UnsupportedInputError, match="dropout"):
        model(tokens(1, 20), use_cache=False)


def test_keys_shared_by_two_layers_are_refused(llama, plan):
    with applied(llama, plan), torch.no_grad():
        cache = MoACache(llama.config, plan)
        key, value = cache.update(torch.zeros(1, 2, 5, 16).double(), torch.zeros(1, 2, 5, 16).double(), 0)
        key.take()
        with pytest.raises(UnsupportedInputError, match="two layers"):
            value.take()


def test_a_moa_cache_without_its_plan_is_refused(llama, plan):
    with pytest.raises(UnsupportedInputError, match=r"apply_plan\(model, plan\)"):
        llama(tokens(1, 20), past_key_values=MoACache(llama.config, plan))
    with (
        applied(llama, tiny_plan(llama, shift=1)),
        pytest.raises(UnsupportedInputError, match="another plan"),
    ):
        llama(tokens(1, 20), past_key_values=MoACache(llama.config, plan))


def test_a_failed_forward_pass_is_noticed_by_the_next(llama, plan):
    cache = MoACache(llama.config, plan)
    with applied(llama, plan), torch.no_grad():
        with pytest.raises(UnsupportedInputError, match="output_attentions"):
            llama(tokens(1, 20), past_key_values=cache, output_attentions=True)
        with pytest.raises(UnsupportedInputError, match=r"reset\(\)"):
            llama(tokens(1, 20), past_key_values=cache)
        cache.reset()
        llama(tokens(1, 20), past_key_values=cache)
    assert cache.get_seq_length() == 20
