"""Caches whose heads store keys and values in fewer than 16 bits; the matrix checks their outputs."""

from __future__ import annotations

import pickle

import pytest
import torch
from moa_kernels.codes.storage import ALIGNMENT
from moa_kernels.cpu.library import unavailable
from torch._dynamo.utils import counters

from moa_search import from_pretrained
from moa_search.errors import BackendUnavailableError, CacheFormatError, PlanFormatError, UnsupportedInputError
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


NEEDS_LIBRARY = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@torch.no_grad()
def run(model, cache, sequence):
    return model(sequence, past_key_values=cache).logits


def held_bytes(cache):
    """What the tensors of a cache's layers take."""
    found, total = set(), 0
    for layer in cache.layers:
        tensors = [layer.keys, layer.values]
        if isinstance(layer, CodedCacheLayer):
            tensors = list(layer.stored)
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
        # A block to spare, and heads that begin aligned.
        spare = batch * sum(2 * (plan.block * 8 * width + ALIGNMENT) for layer in plan.rules for _ in layer)
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


@pytest.mark.parametrize("length", [1, 3, 4, 5, 12])
def test_prompts_within_the_sink_and_at_the_first_wrap(model, length):
    """The sink has 4 tokens, the smallest ring 8."""
    reference, prompt = explicit(tiny_model(), mixed_plan(model)), tokens(1, length)
    expected = greedy(reference, prompt, 20)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(prompt, max_new_tokens=20, do_sample=False, **options), expected)


def test_padding_before_tokens_without_positions_is_told_of_once(model, caplog):
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[0, 20:] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask)  # on the right
        mask = mask.flip(1)
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        model.generate(ids, attention_mask=mask, max_new_tokens=3)
        assert not caplog.records
        with applied(model, tiny_plan(model)):
            model(ids, attention_mask=mask)  # 16 bits
        assert not caplog.records
        for _ in range(2):
            model(ids, attention_mask=mask, past_key_values=MoACache(model.config, mixed_plan(model)))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "attention_mask has padding before tokens and no position_ids are given"
    ]


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


@pytest.mark.parametrize("impl", ["torch", pytest.param("cpu", marks=NEEDS_LIBRARY)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunks_give_what_one_pass_gives_in_any_type(dtype, impl):
    model = tiny_model(dtype=dtype)
    plan = mixed_plan(model)
    apply_plan(model, plan, impl="torch")
    sequence = tokens(2, 90)
    whole = run(model, MoACache(model.config, plan), sequence)
    apply_plan(model, plan, impl=impl)
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


@NEEDS_LIBRARY
@pytest.mark.parametrize("static", [False, True])
def test_the_library_stores_and_attends_a_padded_batch_as_torch_does(static):
    model = tiny_model(dtype=torch.float32)
    plan, found = mixed_plan(model), []
    real = torch.ones(3, 50, dtype=torch.int64)
    real[0, :13] = 0
    real[1, :40] = 0
    options = {"cache_implementation": "static"} if static else {}
    for impl in ("cpu", "torch"):
        apply_plan(model, plan, impl=impl)
        out = model.generate(
            tokens(3, 50),
            attention_mask=real,
            max_new_tokens=40,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
        found.append(out)
    assert torch.equal(found[0].sequences, found[1].sequences)
    layers = [out.past_key_values.layers[0] for out in found]
    assert torch.equal(layers[0].lens, layers[1].lens)
    # Inputs of a layer differ by rounding; hardly a code does.
    codes = [layer.key_codes for layer in layers]
    assert (codes[0] != codes[1]).float().mean() < 0.01


def test_saved_joined_and_taken_apart(model, tmp_path):
    plan, prompts = mixed_plan(model), [tokens(1, 40), tokens(1, 70, seed=1)]
    caches = [MoACache(model.config, plan) for _ in prompts]
    for cache, prompt in zip(caches, prompts, strict=True):
        run(model, cache, prompt)
    caches[0].save(tmp_path / "cache.safetensors")
    new, reference = tokens(1, 9, seed=2), explicit(tiny_model(), plan)
    expected = [logits(reference, torch.cat([prompt, new], 1))[:, -9:] for prompt in prompts]
    loaded = MoACache.load(tmp_path / "cache.safetensors", plan)
    assert loaded.nbytes == caches[0].nbytes
    batch = MoACache.merge([loaded, caches[1]])
    for sample in (0, 1):
        torch.testing.assert_close(run(model, batch.take(sample), new), expected[sample])


def test_a_file_whose_codes_were_cut_off_is_refused(model, tmp_path):
    cache, path = MoACache(model.config, mixed_plan(model)), tmp_path / "cache.safetensors"
    run(model, cache, tokens(1, 40))
    cache.layers[0].value_codes = cache.layers[0].value_codes[:, :-16]
    cache.save(path)
    with pytest.raises(CacheFormatError, match=r"layer 0: value_codes holds torch\.uint8"):
        MoACache.load(path, mixed_plan(model))


def test_a_wider_type_widens_what_is_held():
    model = tiny_model(dtype=torch.bfloat16)
    plan = mixed_plan(model)
    apply_plan(model, plan)
    cache, prompt, new = MoACache(model.config, plan), tokens(1, 60), tokens(1, 20, seed=1)
    run(model, cache, prompt)
    before = [states.float() for states in cache.layers[0].states()]
    model.float()
    whole = cache.copy()
    found = torch.cat([run(model, cache, part) for part in new.split(1, 1)], 1)
    for old, wide in zip(before, whole.layers[0].states(), strict=True):
        torch.testing.assert_close(wide.to(torch.bfloat16).float(), old)
    torch.testing.assert_close(found, run(model, whole, new), rtol=1e-3, atol=1e-3)


def test_a_compiled_step_of_fixed_size_is_one_graph():
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model()
    plan = mixed_plan(model)
    apply_plan(model, plan)
    reference, sequence = explicit(tiny_model(), plan), tokens(2, 50)
    cache = MoACache(model.config, plan, max_length=60)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    run(model, cache, sequence[:, :30])
    places = [part.data_ptr() for layer in cache.layers for part in layer.fixed_storage]
    found = []
    with torch.no_grad():
        for at in range(30, 50):
            position = torch.full((2, 1), at)
            token = sequence[:, at : at + 1].contiguous()
            found.append(step(token, position_ids=position, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), logits(reference, sequence)[:, 30:])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert [part.data_ptr() for layer in cache.layers for part in layer.fixed_storage] == places
    torch._dynamo.reset()


class TestRefusals:
    def test_tensor_cores_in_a_type_that_they_do_not_take(self):
        model = tiny_model(dtype=torch.float32)
        with pytest.raises(BackendUnavailableError, match=r"float16 and bfloat16, not torch\.float32"):
            apply_plan(model, mixed_plan(model), impl="triton")
        assert model.config._attn_implementation != "moa"

    def test_a_plan_without_its_transforms(self):
        model = tiny_model()
        text = Plan.loads(mixed_plan(model).dumps())
        with pytest.raises(PlanFormatError, match=r"use Plan\.load on its file"):
            apply_plan(model, text)

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


def test_caches_share_the_transforms(model):
    """Each is some MiB at a real model's size, and kernels make tables of them."""
    found = []
    for _ in range(2):
        with torch.no_grad():
            found.append(model(tokens(1, 20)).past_key_values)
    found.append(found[0].copy())
    assert len({id(cache.layers[0].codecs.turns) for cache in found}) == 1
