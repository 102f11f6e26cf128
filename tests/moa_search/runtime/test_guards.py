"""What a plan can't run on says so before the first token comes out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    StaticCache,
)

from moa_search.errors import ModelUnsupportedError, UnsupportedInputError
from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, applied, apply_plan
from moa_search.spans import DENSE, SpanRule

from .explicit import SIZES, tiny_model, tiny_plan, tokens

MLA = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
GEMMA_3N = {
    "layer_types": ["full_attention"] * 3,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 3,
}
UNSUPPORTED = {
    "bypasses the interface": ("bloom", {"n_layer": 2, "n_head": 6}, "AttentionInterface"),
    "bypasses the interface, too": ("gptj", {"n_embd": 48, "n_head": 6, "n_layer": 2, "rotary_dim": 8}, "Interface"),
    "MLA": ("deepseek_v3", MLA, "multi-head latent attention"),
    "keys shared across layers": ("gemma3n_text", {**GEMMA_3N, "num_kv_shared_layers": 1}, "share one layer's keys"),
    "chunked": ("llama4_text", {"attention_chunk_size": 16, "num_local_experts": 2}, "chunked"),
    "an encoder": ("bert", {}, "isn't causal"),
    "weights that many layers share": (
        "zamba2",
        {"layer_types": ["mamba", "hybrid", "hybrid"], "num_mem_blocks": 1, "mamba_d_state": 8},
        "don't know which layer they belong to",
    ),
    "weights that many layers share, too": (
        "zamba",
        {"layer_types": ["mamba", "hybrid", "hybrid"], "mamba_d_state": 8, "use_mamba_kernels": False},
        "don't know which layer they belong to",
    ),
    "a cache of its own": (
        "minimax",
        {"layer_types": ["linear_attention"] + ["full_attention"] * 2, "num_local_experts": 2},
        "a cache of its own",
    ),
    "no attention at all": ("mamba", {"state_size": 4}, "none of its layers attends"),
}


@pytest.fixture
def model():
    """A model that fails the test once a token comes out of it."""
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("a token came out"))
    return model


@pytest.fixture
def plan(model):
    return tiny_plan(model)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_that_cannot_follow_a_plan(name):
    kind, settings, reason = UNSUPPORTED[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings}))
    plan = Plan.uniform(SpanRule(12, 0), ModelSignature.of(model.config), sink=4, block=8)
    before = model.config._attn_implementation
    with pytest.raises(ModelUnsupportedError, match=reason):
        apply_plan(model, plan)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("mamba", "names no attention heads"), ("rwkv", "names no attention heads"), ("t5", "encoder-decoder")],
)
def test_configurations_that_no_plan_can_be_made_for(kind, reason, plan):
    config = AutoConfig.for_model(kind)
    with pytest.raises(ModelUnsupportedError, match=reason):
        MoACache(config, plan)


@pytest.mark.parametrize(
    "kind",
    ["doge", "diffllama"],
)
def test_models_that_change_keys_after_the_cache(kind):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).eval()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("a token came out"))
    apply_plan(model, Plan.uniform(SpanRule(12, 0), ModelSignature.of(model.config), sink=4, block=8))
    with pytest.raises(UnsupportedInputError, match="changes keys or values after they went through the cache"):
        model.generate(tokens(1, 20), max_new_tokens=2)


def test_falcon_bypasses_the_interface():
    config = AutoConfig.for_model("falcon", hidden_size=48, num_hidden_layers=2, num_attention_heads=6, vocab_size=97)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelUnsupportedError, match=r"FalconForCausalLM: .*AttentionInterface"):
        apply_plan(model, Plan.uniform(DENSE, ModelSignature.of(config)))


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="needs a newer transformers")
def test_layers_that_differ_from_each_other(plan):
    config = AutoConfig.for_model("gemma4_text", **{**SIZES, "num_kv_shared_layers": 0, "global_head_dim": 32})
    with pytest.raises(ModelUnsupportedError, match=r"gemma4_text: settings differ from layer to layer \(.*head_dim"):
        ModelSignature.of(config)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelUnsupportedError, match="settings differ"):
        apply_plan(model, plan)


def test_tensor_parallel_models_are_refused_when_a_plan_is_applied(model, plan):
    model._tp_size = 2
    with pytest.raises(ModelUnsupportedError, match="over 2 processes, and a plan isn't sliced"):
        apply_plan(model, plan)
    model._tp_size = 1
    apply_plan(model, plan)


def test_a_model_that_is_split_later_is_refused_when_it_runs(model, plan):
    apply_plan(model, plan)
    for layer in model.model.layers:  # what the second of two ranks holds
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight = torch.nn.Parameter(projection.weight.chunk(2)[1])
    for run in (model, partial(model.generate, max_new_tokens=2)):
        with pytest.raises(UnsupportedInputError, match="1 KV heads here, the plan 2; slice the plan"):
            run(tokens(1, 20))


@pytest.mark.parametrize("implementation", ["offloaded_static", "offloaded", "quantized", "sliding_window", "paged"])
def test_caches_of_generate(model, plan, implementation):
    reason = "continuous batching" if implementation == "paged" else f'cache_implementation "{implementation}"'
    with applied(model, plan), pytest.raises(UnsupportedInputError, match=reason):
        model.generate(tokens(1, 20), max_new_tokens=3, cache_implementation=implementation)


def test_a_static_cache_given_to_generate(model, plan):
    cache = StaticCache(config=model.config, max_cache_len=64)
    with applied(model, plan), pytest.raises(UnsupportedInputError, match="can't run on a StaticCache"):
        model.generate(tokens(1, 20), max_new_tokens=3, past_key_values=cache)


@pytest.mark.parametrize("entry", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_every_entry_to_continuous_batching(model, plan, entry):
    def run():
        if entry == "generate_batch":
            model.generate_batch([[3, 4, 5]])
        elif entry == "init_continuous_batching":
            model.init_continuous_batching()
        else:
            with model.continuous_batching_context_manager():
                pass

    with applied(model, plan), pytest.raises(UnsupportedInputError, match="continuous batching can't run"):
        run()
    assert model.config._attn_implementation == "sdpa"


def test_masks_per_kind_of_layer():
    model = tiny_model("Gemma2", sliding_window=24, query_pre_attn_scalar=16)
    whole = torch.ones(1, 1, 20, 20)
    masks = {"full_attention": whole, "sliding_attention": whole}
    with applied(model, tiny_plan(model)), pytest.raises(UnsupportedInputError, match="4-D attention mask"):
        model(tokens(1, 20), attention_mask=masks)


def test_images_that_are_attended_in_both_directions():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**SIZES, "sliding_window": 24, "query_pre_attn_scalar": 16},
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    prompt = tokens(1, 20)
    is_image = torch.zeros_like(prompt)
    is_image[:, 5:9] = 1
    with applied(model, Plan.uniform(SpanRule(12, 0), ModelSignature.of(config), sink=4, block=8)):
        for run in (model, partial(model.generate, max_new_tokens=2)):
            with pytest.raises(UnsupportedInputError, match="bidirectional"):
                run(prompt, token_type_ids=is_image)


def test_positions_that_start_again_mean_no_packing_where_a_cache_is_used():
    """As without a plan: transformers looks for packed samples only without a cache, and then they are refused."""
    model = tiny_model(dtype=torch.float32)
    prompt, packed = tokens(1, 50), torch.cat([torch.arange(20), torch.arange(30)])[None]
    with torch.no_grad():
        expected = model(prompt, position_ids=packed).logits
        with applied(model, Plan.uniform(DENSE, ModelSignature.of(model.config))):
            torch.testing.assert_close(model(prompt, position_ids=packed).logits, expected, rtol=1e-4, atol=1e-4)
            with pytest.raises(UnsupportedInputError, match="packed"):
                model(prompt, position_ids=packed, use_cache=False)


def test_a_pass_that_is_asked_not_to_be_causal(model, plan):
    apply_plan(model, plan)
    with pytest.raises(UnsupportedInputError, match="causal"):
        model(tokens(1, 20), is_causal=False, use_cache=False)
