"""Cutting a prompt into passes: only where nothing but memory can be told from one pass, or else with a warning."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, GPT2Config

from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, apply_plan, chunks
from moa_search.runtime.chunks import constant_rope_tokens
from moa_search.spans import DENSE

from .explicit import explicit, logits, tiny_model, tiny_plan, tokens

LIMIT = 64
"""Tokens up to which the models here keep one rotary table."""

HALF = 4
"""Frequencies of a rotary table: half a head."""

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * HALF,
    "long_factor": [8.0, 16.0, 32.0, 64.0],
    "original_max_position_embeddings": LIMIT,
    "factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": LIMIT}
PHIMOE = {**LONG, "short_mscale": 1.1, "long_mscale": 1.4}

PER_CALL = {
    "phi3": ("Phi3", {"head_dim": 2 * HALF, "rope_parameters": LONG, "original_max_position_embeddings": LIMIT}),
    "phimoe": (
        "Phimoe",
        {
            "head_dim": 2 * HALF,
            "rope_parameters": PHIMOE,
            "original_max_position_embeddings": LIMIT,
            "num_local_experts": 2,
        },
    ),
    "llama longrope": ("Llama", {"rope_parameters": LONG, "head_dim": 2 * HALF}),
    "llama dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
    "qwen2 dynamic": ("Qwen2", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
}
"""Models whose rotary table depends on the longest position of a pass."""

FIXED = {
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": LIMIT},
    "yarn with an attention factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "attention_factor": 1.3,
        "original_max_position_embeddings": LIMIT,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LIMIT,
    },
}
"""Rotary tables that are scaled, but the same in every pass."""


def made(name, **changes):
    model = tiny_model(name, **changes)
    if name == "Phimoe":
        model.set_experts_implementation("eager")  # the others have no float64
    return model


def passes(model, prompt, **options):
    """Lengths of the forward passes of a generation of one token, and its logits."""
    lengths = []
    layer = model.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    options = {
        "max_new_tokens": 1,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    } | options
    try:
        result = model.generate(prompt, **options)
    finally:
        handle.remove()
    return lengths, result.logits[0]


def dense_plan(model):
    return Plan.uniform(DENSE, ModelSignature.of(model.config), sink=4, block=8)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "PREFILL_CHUNK_TOKENS", 32)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["growing", "fixed"])
@pytest.mark.parametrize("kind", PER_CALL)
def test_beyond_the_limit_a_prompt_is_one_pass_as_without_a_plan(kind, options):
    name, changes = PER_CALL[kind]
    prompt = tokens(2, LIMIT + 40)
    _, dense = passes(made(name, **changes), prompt)
    model = made(name, **changes)
    apply_plan(model, dense_plan(model))
    lengths, found = passes(model, prompt, **options)
    assert lengths == [LIMIT + 40]
    torch.testing.assert_close(found, dense)
    apply_plan(model, tiny_plan(model))
    assert not torch.allclose(passes(model, prompt, **options)[1], dense, atol=1e-3)


@pytest.mark.parametrize("kind", PER_CALL)
def test_up_to_the_limit_a_prompt_is_cut_without_a_trace(kind):
    name, changes = PER_CALL[kind]
    model = made(name, **changes)
    plan = tiny_plan(model)
    expected = logits(explicit(model, plan), tokens(2, LIMIT))[:, -1]
    apply_plan(model, plan)
    lengths, found = passes(model, tokens(2, LIMIT))
    assert lengths == [32, 32]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PER_CALL)
def test_a_chunk_size_that_changes_the_output_is_told(kind):
    name, changes = PER_CALL[kind]
    model = made(name, **changes)
    apply_plan(model, tiny_plan(model))
    with pytest.warns(UserWarning, match=f"prefill_chunk_size=48 changes the output: beyond {LIMIT} tokens"):
        lengths, _ = passes(model, tokens(1, LIMIT + 40), prefill_chunk_size=48)
    assert lengths == [48, 48, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passes(model, tokens(1, LIMIT), prefill_chunk_size=48)
        passes(model, tokens(1, LIMIT + 40), prefill_chunk_size=LIMIT + 40)


@pytest.mark.parametrize("kind", FIXED)
def test_tables_that_never_change_are_cut_without_a_trace(kind):
    model = tiny_model(rope_parameters=FIXED[kind])
    plan = tiny_plan(model)
    expected = logits(explicit(model, plan), tokens(2, 200))[:, -1]
    apply_plan(model, plan)
    lengths, found = passes(model, tokens(2, 200))
    assert lengths == [32] * 6 + [8]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_tables_of_some_layers_and_unknown_ones_count_too():
    config = tiny_model("Gemma3", layer_types=["full_attention"] * 3).config
    assert constant_rope_tokens(config) is None
    config.rope_parameters = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default"}}
    config.max_position_embeddings = 512
    assert constant_rope_tokens(config) == LIMIT
    config.rope_parameters = {"rope_type": "of tomorrow", "rope_theta": 1.0}
    assert constant_rope_tokens(config) == 0
    # Code from the hub names it as transformers 4 did.
    config = SimpleNamespace(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=512)
    config.get_text_config = lambda decoder: config
    assert constant_rope_tokens(config) == 512
    assert constant_rope_tokens(GPT2Config()) is None


def test_continuing_a_cache_over_the_limit_is_told_and_gives_what_a_dense_cache_gives():
    name, changes = PER_CALL["llama dynamic"]
    sequence = tokens(1, LIMIT + 20)
    dense = made(name, **changes)
    model = made(name, **changes)
    plan = dense_plan(model)
    apply_plan(model, plan)
    found = []
    for network, cache in ((dense, DynamicCache(config=dense.config)), (model, MoACache(model.config, plan))):
        with torch.no_grad():
            network(sequence[:, :40], past_key_values=cache)
        if network is model:
            with pytest.warns(UserWarning, match=f"holds 40 tokens and grows to {LIMIT + 20}"):
                found.append(passes(network, sequence, past_key_values=cache)[1])
        else:
            found.append(passes(network, sequence, past_key_values=cache)[1])
    torch.testing.assert_close(found[1], found[0])


class TestWhereThePhisStartOver:
    """Phi-3 and PhiMoE drop the cache when the context passes the limit, and compute everything anew."""

    @pytest.fixture(params=["phi3", "phimoe"])
    def model(self, request):
        name, changes = PER_CALL[request.param]
        return made(name, **changes)

    @staticmethod
    def greedy(reference, prompt, new_tokens):
        sequence = prompt
        for _ in range(new_tokens):
            sequence = torch.cat([sequence, logits(reference, sequence)[:, -1:].argmax(-1)], 1)
        return sequence

    @pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["growing", "fixed"])
    def test_the_cache_stays_what_it_was_made_for(self, model, options):
        plan = tiny_plan(model)
        expected = self.greedy(explicit(model, plan), tokens(2, LIMIT - 6), 16)
        apply_plan(model, plan)
        result = model.generate(
            tokens(2, LIMIT - 6), max_new_tokens=16, do_sample=False, return_dict_in_generate=True, **options
        )
        assert torch.equal(result.sequences, expected)
        assert type(result.past_key_values) is MoACache
        assert result.past_key_values.is_compileable == bool(options)
        assert int(result.past_key_values.get_seq_length()) == LIMIT + 9

    @pytest.mark.parametrize("max_length", [None, 128])
    def test_a_cache_handed_over_is_the_one_that_goes_on(self, model, max_length):
        plan = tiny_plan(model)
        sequence = tokens(1, LIMIT + 20)
        expected = self.greedy(explicit(model, plan), sequence, 6)
        apply_plan(model, plan)
        cache = MoACache(model.config, plan, max_length=max_length)
        with torch.no_grad():
            model(sequence[:, :40], past_key_values=cache)
        result = model.generate(
            sequence, past_key_values=cache, max_new_tokens=6, do_sample=False, return_dict_in_generate=True
        )
        assert torch.equal(result.sequences, expected)
        assert result.past_key_values is cache
        assert int(cache.get_seq_length()) == LIMIT + 25

    def test_drafts_may_span_the_limit(self, model):
        """Dense, too, drafts that span it are judged by the other table: equal to dense is all one can ask."""
        options = {"max_new_tokens": 24, "do_sample": False, "prompt_lookup_num_tokens": 5}
        prompt = tokens(1, 20).repeat(1, 3)[:, : LIMIT - 6]
        expected = model.generate(prompt, **options)
        apply_plan(model, dense_plan(model))
        assert torch.equal(model.generate(prompt, **options), expected)

    def test_beams_may_span_the_limit(self, model):
        options = {"max_new_tokens": 16, "do_sample": False, "num_beams": 3}
        expected = model.generate(tokens(2, LIMIT - 6), **options)
        apply_plan(model, dense_plan(model))
        assert torch.equal(model.generate(tokens(2, LIMIT - 6), **options), expected)


def test_states_of_linear_attention_are_never_cut_by_default():
    model = tiny_model("Bamba", attn_layer_indices=[1], mamba_n_heads=6, mamba_d_head=16, mamba_d_state=16)
    apply_plan(model, tiny_plan(model))
    assert passes(model, tokens(1, 100))[0] == [100]
