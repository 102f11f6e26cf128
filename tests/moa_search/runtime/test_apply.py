from __future__ import annotations

import copy

import pytest
import torch
from transformers import BertConfig, BertModel, BloomConfig, BloomForCausalLM, DynamicCache

from moa_search.errors import ConfigError, ModelMismatchError, ModelUnsupportedError, UnsupportedInputError
from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, applied, apply_plan, remove_plan
from moa_search.spans import DENSE

from .explicit import explicit, logits, tiny_model, tiny_plan, tokens


def generate(model, **kwargs):
    return model.generate(tokens(1, 60), max_new_tokens=30, do_sample=False, **kwargs)


def test_generate_builds_the_ragged_cache_by_itself():
    model = tiny_model()
    plan = tiny_plan(model)
    assert apply_plan(model, plan) is model
    cache = generate(model, return_dict_in_generate=True).past_key_values
    assert type(cache) is MoACache
    kept, block = plan.kv_bytes(89, bytes_per_element=8), 2 * 16 * 8 * 8
    assert kept <= cache.nbytes <= kept + 6 * block  # of six heads


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_removing_a_plan_restores_everything(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    before = generate(model)
    config, attributes = model.config.to_dict(), set(vars(model))
    apply_plan(model, tiny_plan(model))
    assert not torch.equal(generate(model), before)
    assert remove_plan(model) is model
    assert model.config._attn_implementation == implementation
    assert model.config.to_dict() == config
    assert set(vars(model)) == attributes
    assert not any("moa" in name for module in model.modules() for name in vars(module))
    result = generate(model, return_dict_in_generate=True)
    assert torch.equal(result.sequences, before)
    assert type(result.past_key_values) is DynamicCache
    assert remove_plan(model) is model


def test_a_hook_that_someone_else_installed_is_called_and_restored():
    model = tiny_model()
    calls = []

    def hook(*args, **kwargs):
        calls.append(args)
        return type(model)._prepare_cache_for_generation(model, *args, **kwargs)

    model._prepare_cache_for_generation = hook
    with applied(model, tiny_plan(model)):
        assert type(generate(model, return_dict_in_generate=True).past_key_values) is MoACache
    assert len(calls) == 1
    assert model._prepare_cache_for_generation is hook


def test_a_second_plan_replaces_the_first():
    model = tiny_model()
    first, second = tiny_plan(model), tiny_plan(model, shift=1)
    reference = explicit(model, second)
    apply_plan(apply_plan(model, first), second)
    found = generate(model)
    assert torch.equal(found[:, 60:], logits(reference, found)[:, 59:-1].argmax(-1))
    remove_plan(model)
    assert model.config._attn_implementation == "sdpa"


def test_the_context_manager_returns_to_what_was_before():
    model = tiny_model()
    first, second = tiny_plan(model), tiny_plan(model, shift=1)
    dense = generate(model)
    with applied(model, first) as under_first:
        assert under_first is model
        expected = generate(model)
        with applied(model, second):
            assert not torch.equal(generate(model), expected)
        assert torch.equal(generate(model), expected)
    assert torch.equal(generate(model), dense)


def test_a_copy_of_a_model_under_a_plan_is_under_it_by_itself():
    model = tiny_model()
    apply_plan(model, tiny_plan(model))
    expected = generate(model)
    twin = copy.deepcopy(model)
    remove_plan(model)
    result = generate(twin, return_dict_in_generate=True)
    assert type(result.past_key_values) is MoACache
    assert torch.equal(result.sequences, expected)
    assert torch.equal(generate(remove_plan(twin)), generate(model))


def test_choosing_another_attention_suspends_the_plan():
    model = tiny_model()
    before = generate(model)
    apply_plan(model, tiny_plan(model))
    model.set_attn_implementation("sdpa")
    result = generate(model, return_dict_in_generate=True)
    assert type(result.past_key_values) is DynamicCache
    assert torch.equal(result.sequences, before)
    remove_plan(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_refused_plan_leaves_the_model_as_it_was():
    model, other = tiny_model(), tiny_model(num_hidden_layers=2)
    attributes = set(vars(model))
    with pytest.raises(ModelMismatchError, match="num_hidden_layers: 2 != 3"):
        apply_plan(model, tiny_plan(other))
    with pytest.raises(ConfigError, match="anchored_at"):
        apply_plan(model, tiny_plan(model).model_copy(update={"anchor": "prompt"}))
    assert set(vars(model)) == attributes
    assert model.config._attn_implementation == "sdpa"


def test_models_that_bypass_the_attention_interface_are_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=48, n_layer=2, n_head=3))
    plan = Plan.uniform(DENSE, ModelSignature.of(model.config))
    with pytest.raises(ModelUnsupportedError, match="AttentionInterface"):
        apply_plan(model, plan)


def test_encoders_are_refused():
    model = BertModel(BertConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=3))
    plan = Plan.uniform(DENSE, ModelSignature.of(model.config))
    with pytest.raises(ModelUnsupportedError, match="causal"):
        apply_plan(model, plan)


def test_something_that_is_no_transformers_model_is_refused():
    model = tiny_model()
    wrapper = torch.nn.Module()
    wrapper.config = model.config
    with pytest.raises(ModelUnsupportedError, match="not a transformers model"):
        apply_plan(wrapper, tiny_plan(model))


def test_continuous_batching_is_refused():
    model = tiny_model()
    with applied(model, tiny_plan(model)), pytest.raises(UnsupportedInputError, match="continuous batching"):
        model.generate_batch([[3, 4, 5]])
