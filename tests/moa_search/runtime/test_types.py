"""Types and gradient modes that change within a pass or from turn to turn, as SDPA with a DynamicCache takes them."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from transformers import DynamicCache

from moa_search.errors import UnsupportedInputError
from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, apply_plan
from moa_search.spans import DENSE

from .explicit import explicit, greedy, logits, tiny_model, tiny_plan, tokens

GREEDY = {"max_new_tokens": 10, "do_sample": False}
HALVES = [torch.bfloat16, torch.float16]
KINDS = {
    "Llama": {},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 24, "num_hidden_layers": 2},
    "GptOss": {"sliding_window": 24, "num_hidden_layers": 2, "num_local_experts": 4},
}
MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": contextlib.nullcontext,
}


def dense(model):
    return Plan.uniform(DENSE, ModelSignature.of(model.config), sink=4, block=8)


def autocast(dtype):
    return torch.autocast("cpu", dtype=dtype)


def in_turns(model, cache, sequence, contexts):
    """Logits of a sequence in as many passes as there are contexts, on one cache."""
    parts = []
    for part, context in zip(sequence.split(len(sequence[0]) // len(contexts), 1), contexts, strict=True):
        with context():
            parts.append(model(part, past_key_values=cache).logits.detach().float().clone())
    return torch.cat(parts, 1)


def assert_as_good_as_dense(model, contexts, sequence, **options):
    """An all-dense plan is no further from float32 than twice SDPA with a DynamicCache is."""
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(sequence, use_cache=False).logits
    reference = in_turns(model, DynamicCache(config=model.config), sequence, contexts)
    plan = dense(model)
    apply_plan(model, plan)
    found = in_turns(model, MoACache(model.config, plan, **options), sequence, contexts)
    assert (found - exact).abs().max() <= 2 * (reference - exact).abs().max() + 1e-5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_under_autocast(kind, dtype):
    model = tiny_model(kind, dtype=torch.float32, **KINDS[kind])
    assert_as_good_as_dense(model, [lambda: autocast(dtype)] * 3, tokens(2, 90))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("max_length", [None, 128], ids=["growing", "fixed"])
def test_autocast_comes_for_some_turns_only(dtype, max_length):
    on, off = (lambda: autocast(dtype)), torch.no_grad
    for contexts in ([off, on, off], [off, off, on]):
        model = tiny_model(dtype=torch.float32)
        assert_as_good_as_dense(model, contexts, tokens(2, 90), max_length=max_length)


def test_autocast_that_ends_widens_a_growing_cache_and_a_fixed_one_refuses():
    on, off = (lambda: autocast(torch.bfloat16)), torch.no_grad
    assert_as_good_as_dense(tiny_model(dtype=torch.float32), [on, off, on], tokens(2, 90))
    model = tiny_model(dtype=torch.float32)
    plan = dense(model)
    apply_plan(model, plan)
    with pytest.raises(UnsupportedInputError, match=r"fixed size that holds torch.bfloat16 can't take torch.float32"):
        in_turns(model, MoACache(model.config, plan, max_length=128), tokens(1, 90), [on, off])


def test_a_cache_under_autocast_takes_half_of_what_it_takes_without():
    model = tiny_model(dtype=torch.float32)
    plan = tiny_plan(model)
    apply_plan(model, plan)
    with torch.no_grad():
        wide = model(tokens(1, 60)).past_key_values.nbytes
        with autocast(torch.bfloat16):
            assert model(tokens(1, 60)).past_key_values.nbytes == wide // 2


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 16}]
)
def test_generation_under_autocast_is_that_of_the_masks(options, dtype):
    """Double precision is left alone by autocast in attention, so that tokens are comparable one by one."""
    model = tiny_model()
    plan = tiny_plan(model)
    apply_plan(model, plan)
    expected = model.generate(tokens(2, 60), **GREEDY, **options)
    if "num_beams" not in options:
        assert torch.equal(expected, greedy(explicit(model, plan), tokens(2, 60), 10))
    model.float()
    with autocast(dtype):
        found = model.generate(tokens(2, 60), return_dict_in_generate=True, output_logits=True, **GREEDY, **options)
    assert found.sequences.shape == expected.shape
    assert found.past_key_values.layers[0].keys.dtype == dtype
    exact = logits(explicit(tiny_model(), plan), found.sequences[:2])[:, 59]
    if "num_beams" not in options:
        assert (found.logits[0].double() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("max_length", [None, 128], ids=["growing", "fixed"])
@pytest.mark.parametrize("modes", list(itertools.product(MODES, repeat=3)), ids="-".join)
def test_gradient_modes_may_change_from_turn_to_turn(modes, max_length):
    model = tiny_model()
    plan = tiny_plan(model)
    expected = logits(explicit(model, plan), tokens(2, 90))
    apply_plan(model, plan)
    cache = MoACache(model.config, plan, max_length=max_length)
    found = in_turns(model, cache, tokens(2, 90), [MODES[mode] for mode in modes])
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["growing", "fixed"])
def test_a_chat_goes_on_out_of_inference_mode_with_copies_and_beams(options):
    model = tiny_model()
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    apply_plan(model, plan)
    options = {"return_dict_in_generate": True, **GREEDY, **options}
    with torch.inference_mode():
        first = model.generate(tokens(1, 40), max_length=128, **{**options, "max_new_tokens": 10})
        again = first.past_key_values.copy()
    longer = torch.cat([first.sequences.clone(), tokens(1, 20, seed=1)], 1)
    expected = greedy(reference, longer, 10)
    if options.get("cache_implementation") is None:
        again.batch_repeat_interleave(3)
        beams = model.generate(longer, past_key_values=again, num_beams=3, **GREEDY)
        assert torch.equal(beams, model.generate(longer, num_beams=3, **GREEDY))
    kept = MoACache(model.config, plan, max_length=128 if "cache_implementation" in options else None)
    with torch.inference_mode():
        model(longer[:, :49], past_key_values=kept)
    found = model.generate(longer, past_key_values=kept, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_a_model_that_changes_its_type_between_turns(kernels):
    sequence = tokens(2, 90)
    for types in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        model = tiny_model(dtype=types[0])
        plan = tiny_plan(model)
        exact = logits(explicit(model.double(), plan), sequence)[:, 60:]
        model.to(types[0])
        apply_plan(model, plan, impl=kernels)
        cache = MoACache(model.config, plan)
        with torch.no_grad():
            model(sequence[:, :60], past_key_values=cache)
            model.to(types[1])
            found = model(sequence[:, 60:], past_key_values=cache).logits
        assert found.dtype == types[1]
        assert cache.layers[0].keys.dtype == torch.promote_types(*types)
        error = (found.double() - exact).abs().max() / exact.abs().max()
        assert error < (0.1 if torch.bfloat16 in types else 1e-5)


def test_another_default_type_changes_nothing():
    model = tiny_model(dtype=torch.float32)
    plan = tiny_plan(model)
    apply_plan(model, plan)
    options = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
    expected = model.generate(tokens(2, 60), **options)
    torch.set_default_dtype(torch.float64)
    try:
        found = model.generate(tokens(2, 60), **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.past_key_values.layers[0].keys.dtype == torch.float32


@pytest.mark.parametrize("order", ["plan first", "plan last"])
def test_accelerates_mixed_precision(order):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        model = tiny_model(dtype=torch.float32)
        plan = dense(model)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        if order == "plan first":
            apply_plan(model, plan)
        model = accelerator.prepare_model(model, evaluation_mode=True)
        if order == "plan last":
            apply_plan(accelerator.unwrap_model(model), plan)
        result = model.generate(tokens(2, 60), return_dict_in_generate=True, **GREEDY)
        assert type(result.past_key_values) is MoACache
        assert result.past_key_values.layers[0].keys.dtype == torch.bfloat16
        plain = accelerator.prepare_model(tiny_model(dtype=torch.float32), evaluation_mode=True)
        found, reference = model(tokens(2, 60)).logits, plain(tokens(2, 60)).logits
        exact = tiny_model(dtype=torch.float32)(tokens(2, 60)).logits
        assert (found - exact).abs().max() <= 2 * (reference - exact).abs().max()
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore")  # the trainer's own
def test_generation_after_training_in_mixed_precision(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = tiny_model(dtype=torch.float32)
    plan = tiny_plan(model)
    apply_plan(model, plan)
    data = [{"input_ids": row, "labels": row} for row in tokens(4, 30)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, bf16=True, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    before = model.lm_head.weight.detach().clone()
    Trainer(model, arguments, train_dataset=data).train()
    assert not torch.equal(before, model.lm_head.weight)
    model.eval()
    result = model.generate(tokens(2, 60), return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert type(result.past_key_values) is MoACache
    trained = tiny_model()
    trained.load_state_dict(model.state_dict())
    exact = logits(explicit(trained.double(), plan), tokens(2, 60))[:, -1]
    assert (result.logits[0].double() - exact).abs().max() < 0.05 * exact.abs().max()


def test_mixed_types_without_autocast_are_refused_in_one_line():
    model = tiny_model(dtype=torch.float32)
    apply_plan(model, tiny_plan(model))
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *given: given[-1].bfloat16())
    with pytest.raises(UnsupportedInputError, match="one type, or autocast on"):
        model(tokens(1, 20))
