"""Caches whose heads store keys and values in fewer than 16 bits; the matrix checks their outputs."""

from __future__ import annotations

import pickle

import pytest
import torch

from moa_search import from_pretrained
from moa_search.errors import BackendUnavailableError, ModelUnsupportedError, PlanFormatError, UnsupportedInputError
from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, applied, apply_plan, remove_plan
from moa_search.runtime.coded import CodedCacheLayer

from .explicit import RULES, explicit, greedy, key_transforms, logits, tiny_model, tiny_plan, tokens

TIERS = [[(4, 8), (16, 2)], [(16, 16), (16, 16)], [(3, 3), (2, 16)]]


def mixed_plan(model, tiers=TIERS, **sizes):
    signature = ModelSignature.of(model.config)
    plain = tiny_plan(model)
    sizes = {"sink": plain.sink, "block": plain.block, **sizes}
    return Plan.from_rules(plain.rules, signature, tiers=tiers, transforms=key_transforms(signature), **sizes)


@pytest.fixture
def model():
    model = tiny_model()
    return apply_plan(model, mixed_plan(model))


@torch.no_grad()
def run(model, cache, sequence):
    return model(sequence, past_key_values=cache).logits


def held_bytes(cache):
    """What the tensors of a cache's layers take."""
    found, total = set(), 0
    for layer in cache.layers:
        tensors = [layer.keys, layer.values]
        if isinstance(layer, CodedCacheLayer):
            tensors += [
                t for head in layer._rings for ring in head for t in (ring.packed, ring.scales) if t is not None
            ]
        for tensor in tensors:
            if tensor.data_ptr() not in found:
                found.add(tensor.data_ptr())
                total += tensor.untyped_storage().nbytes()
    return total


def test_layers_with_sixteen_bits_stay_as_they_are(model):
    with torch.no_grad():
        cache = model(tokens(1, 20)).past_key_values
    assert [isinstance(layer, CodedCacheLayer) for layer in cache.layers] == [True, False, True]


def test_bytes_are_within_one_block_per_head_of_what_the_plan_keeps(model):
    plan, batch = mixed_plan(model), 2
    cache = MoACache(model.config, plan)
    width, seen = plan.model.head_dim, 0
    for step in [1, 3, 30, 1, 1, 64, 100, 1, 200]:
        run(model, cache, tokens(batch, step))
        seen += step
        kept = plan.kv_bytes(seen, batch=batch, bytes_per_element=8)  # the model computes in double precision
        assert cache.nbytes == held_bytes(cache) == cache.describe().nbytes
        # A block to spare, and the sink twice: as it is, and among the codes.
        spare = batch * sum(2 * (plan.block + plan.sink) * 8 * width for layer in plan.rules for _ in layer)
        assert cache.nbytes <= kept + spare


def test_ten_thousand_tokens_keep_their_bytes_once_constant_rings_are_full():
    model = tiny_model(max_position_embeddings=16384, num_hidden_layers=1)
    signature = ModelSignature.of(model.config)
    constant = Plan.from_rules(
        [[RULES[0], RULES[5]]],
        signature,
        sink=4,
        block=8,
        tiers=[[(4, 2), (2, 8)]],
        transforms=key_transforms(signature),
    )
    apply_plan(model, constant)
    cache = MoACache(model.config, constant)
    run(model, cache, tokens(1, 100))
    after = cache.nbytes
    sequence = tokens(1, 9900, seed=1)
    for part in sequence.split(495, 1):
        run(model, cache, part)
        assert cache.nbytes == after
    # Whole masks of 10,000 tokens would be too large a reference: one pass is what the matrix checks.
    alone = MoACache(model.config, constant)
    whole = torch.cat([tokens(1, 100), sequence], 1)
    run(model, alone, whole)
    new = tokens(1, 5, seed=2)
    torch.testing.assert_close(run(model, cache, new), run(model, alone, new))


def test_greedy_generation_equals_repeated_whole_passes(model):
    reference = explicit(tiny_model(), mixed_plan(model))
    prompt = tokens(1, 60)
    assert torch.equal(model.generate(prompt, max_new_tokens=40, do_sample=False), greedy(reference, prompt, 40))


def test_a_copied_prefix_and_a_rollback_go_on_as_if_nothing_had_happened(model):
    reference, prompt = explicit(tiny_model(), mixed_plan(model)), tokens(1, 80)
    cache = MoACache(model.config, mixed_plan(model))
    cache.activate_past_recording()
    run(model, cache, prompt)
    for seed in (1, 2):
        branch, ending = cache.copy(), tokens(1, 30, seed=seed)
        expected = logits(reference, torch.cat([prompt, ending], 1))[:, 80:]
        torch.testing.assert_close(run(model, branch, ending), expected)
        branch.crop(-12)
        torch.testing.assert_close(run(model, branch, ending[:, 18:]), expected[:, 18:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunks_give_what_one_pass_gives_in_any_type(dtype):
    model = tiny_model(dtype=dtype)
    plan = mixed_plan(model)
    apply_plan(model, plan)
    sequence = tokens(2, 90)
    whole = run(model, MoACache(model.config, plan), sequence)
    cache = MoACache(model.config, plan)
    parts = torch.cat([run(model, cache, part) for part in sequence.split([1, 40, 1, 1, 30, 17], 1)], 1)
    assert parts.dtype == dtype
    # Products of other shapes round otherwise, and a code may flip where a number lies between two levels.
    assert (parts - whole).abs().float().mean() <= 4 * torch.finfo(dtype).eps * whole.abs().float().max()


def test_saved_and_loaded_with_its_transforms(model, tmp_path):
    prompt = tokens(1, 60)
    expected = model.generate(prompt, max_new_tokens=20, do_sample=False)
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("transforms-*.safetensors"))) == 1
    loaded = from_pretrained(tmp_path, dtype=torch.float64)
    loaded.generation_config.eos_token_id = None
    assert torch.equal(loaded.generate(prompt, max_new_tokens=20, do_sample=False), expected)
    next(tmp_path.glob("transforms-*.safetensors")).unlink()
    with pytest.raises(PlanFormatError, match="keep that file beside the plan"):
        from_pretrained(tmp_path)


def test_a_pickled_model_stores_the_same_codes(model):
    prompt = tokens(1, 60)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(
        again.generate(prompt, max_new_tokens=20, do_sample=False),
        model.generate(prompt, max_new_tokens=20, do_sample=False),
    )


def test_not_a_number_shows_instead_of_hiding(model):
    cache = MoACache(model.config, mixed_plan(model))
    layer = cache.layers[0]
    states = torch.zeros(1, 2, 10, 16, dtype=torch.float64)
    states[0, 0, 7, 3] = torch.nan
    layer.update(states, states)
    layer.commit(states, states, None)
    keys, _ = layer.states()
    assert keys[0, layer.layout.offsets[0] + 7].isnan().all()
    assert not keys[0, layer.layout.offsets[0] + 8].isnan().any()


class TestRefusals:
    @pytest.mark.parametrize("impl", ["triton", "cpu"])
    def test_kernels_that_read_no_codes(self, impl):
        model = tiny_model(dtype=torch.float32)
        with pytest.raises(BackendUnavailableError):
            apply_plan(model, mixed_plan(model), impl=impl)
        assert model.config._attn_implementation != "moa"

    def test_a_plan_without_its_transforms(self):
        model = tiny_model()
        text = Plan.loads(mixed_plan(model).dumps())
        with pytest.raises(PlanFormatError, match=r"use Plan\.load on its file"):
            apply_plan(model, text)

    def test_caches_of_fixed_size(self, model):
        with pytest.raises(ModelUnsupportedError, match="fixed size can't store fewer than 16 bits"):
            MoACache(model.config, mixed_plan(model), max_length=100)
        with pytest.raises(ModelUnsupportedError, match="fixed size can't store fewer than 16 bits"):
            model.generate(tokens(1, 10), max_new_tokens=3, cache_implementation="static")

    def test_gradients(self, model):
        with pytest.raises(UnsupportedInputError, match="let no gradient through"):
            model(tokens(1, 10), use_cache=False)

    def test_a_cache_of_other_bits(self, model):
        cache = MoACache(model.config, mixed_plan(model, [[(8, 8)] * 2] * 3))
        with pytest.raises(UnsupportedInputError, match="made for another plan"):
            run(model, cache, tokens(1, 10))


def test_a_block_under_a_plan_leaves_the_model_dense():
    model = tiny_model()
    prompt = tokens(1, 30)
    before = logits(model, prompt)
    with applied(model, mixed_plan(model)):
        assert not torch.equal(logits(model, prompt), before)
    assert torch.equal(logits(model, prompt), before)
    assert torch.equal(logits(remove_plan(apply_plan(model, mixed_plan(model))), prompt), before)
