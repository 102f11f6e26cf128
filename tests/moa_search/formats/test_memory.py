"""Memory told before anything is loaded."""

import pytest
import torch

from moa_search import MoACache, Plan, apply_plan, load_model
from moa_search.formats import ModelSignature
from moa_search.formats.memory import GIB, dense_need, plan_need
from moa_search.formats.paged import grouped
from moa_search.modeling.loading import count_parameters
from moa_search.spans import DENSE, SpanRule


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(str(tiny_model_dir), dtype="bfloat16")[0]


def mixed(model, tiers=None):
    rules = [[SpanRule(96, 0), SpanRule(0, 128)], [DENSE, SpanRule(64, 32)]]
    return Plan.from_rules(rules, ModelSignature.of(model.config), sink=16, block=16, tiers=tiers)


@pytest.mark.parametrize("tiers", [None, [[(8, 8), (16, 16)], [(8, 4), (16, 8)]]])
def test_caches_take_what_was_told_within_a_block_per_head(model, tiers):
    plan = mixed(model, tiers)
    apply_plan(model, plan)
    prompt = torch.arange(2, 250)[None].repeat(3, 1)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    assert isinstance(cache, MoACache)
    told = plan_need(plan, 0, "transformers").total(248, 3)
    block = 3 * 4 * plan.block * 2 * 2 * plan.model.head_dim  # a batch of 3, of 4 heads
    assert told <= cache.nbytes <= told + block


def test_a_dense_cache_takes_what_was_told(model):
    apply_plan(model, Plan.uniform(DENSE, ModelSignature.of(model.config)))
    need = dense_need(mixed(model), 1000)
    assert need.total(100, 2) == 1000 + 2 * 2 * 2 * 2 * 8 * 2 * 100, "2 samples, keys and values of 2 x 2 heads of 8"


def test_layers_with_a_window_of_their_own_never_take_more(native_plan):
    need = dense_need(native_plan, 0)
    assert need.cache(1000) == 2 * 2 * 8 * 2 * (2 * 1000 + 128)
    assert plan_need(native_plan, 0, "transformers").cache(1000) == native_plan.kv_bytes(1000)


def test_what_fits_is_the_most_that_does(model):
    need = plan_need(mixed(model), 2**20, "transformers")
    room = need.total(500, 8)
    assert need.most_tokens(8, room) == 500
    assert need.most_tokens(8, room - 1) == 499
    assert need.most_samples(500, room) == 8
    assert need.most_samples(500, room - 1) == 7
    assert need.most_tokens(1, GIB) == need.context == 2048
    assert need.most_tokens(1, 2**20 - 1) == need.most_samples(500, 2**20 - 1) == 0


def test_vllm_holds_whole_groups(model):
    plan = mixed(model)
    dense, need = dense_need(plan, 0), plan_need(plan, 0, "vllm")
    assert need.cache(1000) == round(grouped(plan, 2048).held(1000) * dense.cache(1000))
    assert need.cache(1000) >= plan.kv_bytes(1000)


def test_parameters_are_counted_without_weights(tiny_model_dir, model):
    assert count_parameters(str(tiny_model_dir)) == sum(p.numel() for p in model.parameters())
