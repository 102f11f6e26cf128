"""The text decoder's attention is swapped, a tower's never; everything is put back."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moa_search import ModelSignature, Plan, SpanRule, apply_plan, remove_plan
from moa_search.errors import ModelUnsupportedError
from moa_search.evaluation.throughput.gate import masked_reference
from moa_search.modeling.attention import attention_choice, set_attention, swapped
from moa_search.modeling.private import attention_of
from moa_search.modeling.text import attention_modules, text_config
from moa_search.profiling.attention import observed
from tests.moa_search.modeling.towers import BUILDERS, LENGTH, TEXT


def build(name):
    torch.manual_seed(0)
    builder, tower = BUILDERS[name]
    model, given = builder()
    model = model.eval()
    set_attention(model, "sdpa")
    getattr(model.config, tower)._attn_implementation = "eager"
    return model, given, tower


def choices(model, tower):
    """What the text decoder, the tower and every part of the model attends with."""
    parts = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    every = [attention_of(config) for config in (model.config, getattr(model.config, tower), *parts.values())]
    return attention_of(text_config(model.config)), attention_of(getattr(model.config, tower)), every


def plan_for(model):
    signature = ModelSignature.of(model.config)
    rules = [[SpanRule(8, 0)] * signature.num_key_value_heads] * signature.num_hidden_layers
    return Plan.from_rules(rules, signature, sink=2, block=4)


@contextmanager
def planned(model):
    apply_plan(model, plan_for(model))
    try:
        yield
    finally:
        remove_plan(model)


SWAPS = {
    "profiled": observed,
    "under whole masks": lambda model: masked_reference(model, plan_for(model), torch.float32),
    "under a plan": planned,
}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("name", BUILDERS)
def test_a_towers_attention_is_left_alone(name, swap):
    model, _, tower = build(name)
    before = choices(model, tower)
    assert before[:2] == ("sdpa", "eager")
    with SWAPS[swap](model):
        text, seeing, _ = choices(model, tower)
        assert text.startswith("moa")
        assert seeing == "eager"
    assert choices(model, tower) == before


@pytest.mark.parametrize("name", BUILDERS)
def test_only_the_text_decoder_calls_what_was_swapped_in(name):
    model, given, _ = build(name)
    asked = []

    def attention(module, query, key, value, attention_mask, sliding_window=None, **kwargs):
        asked.append(module)
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        if sliding_window is not None:
            mask = mask.triu(1 - sliding_window)
        return sdpa_attention_forward(module, query, key, value, mask[None, None], **kwargs)

    with torch.no_grad():
        expected = model(**given, use_cache=False).logits
        with swapped(model, "counted", attention, lambda *args, **kwargs: None) as modules:
            found = model(**given, use_cache=False).logits
        again = model(**given, use_cache=False).logits
    assert [module.layer_idx for module in asked] == [0, 1]
    assert set(asked) <= set(modules)
    torch.testing.assert_close(found, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("name", BUILDERS)
def test_attention_modules_are_the_decoders(name):
    model, _, _ = build(name)
    modules = attention_modules(model)
    decoder = set(model.get_decoder().modules())
    assert modules
    assert all(module in decoder for module in modules)
    assert {module.layer_idx for module in modules} == {0, 1}


def test_an_error_within_puts_everything_back():
    model, _, tower = build("llava")
    before = choices(model, tower)
    modules = attention_modules(model)

    def fail():
        modules[0]._moa_recorder = object()
        raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"), observed(model):
        fail()
    assert choices(model, tower) == before
    assert not any(hasattr(module, "_moa_recorder") for module in modules)


def test_a_decoder_that_calls_its_attention_itself_is_refused_unchanged():
    model = FalconForCausalLM(
        FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=False)
    )
    before = attention_of(model.config)
    with pytest.raises(ModelUnsupportedError, match="AttentionInterface"), observed(model):
        pytest.fail("it isn't observed")
    assert attention_of(model.config) == before


def test_a_saved_configuration_names_the_text_decoder_alone():
    assert attention_choice(LlamaForCausalLM(LlamaConfig(**TEXT)), "moa") == "moa"
    for name in BUILDERS:
        assert attention_choice(build(name)[0], "moa") == {"text_config": "moa"}


def test_a_text_decoder_two_levels_down_is_found():
    from transformers import Qwen2_5OmniConfig

    class Model:
        config = Qwen2_5OmniConfig()

    assert attention_choice(Model, "moa") == {"thinker_config": {"text_config": "moa"}}
