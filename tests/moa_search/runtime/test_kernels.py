"""Triton kernels in the runtime, by their interpreter where there is no GPU, against the torch path."""

from __future__ import annotations

import random

import pytest
import torch

from moa_search.errors import BackendUnavailableError, ConfigError
from moa_search.runtime import MoACache, applied, apply_plan, blockwise, kernels, layer, remove_plan
from moa_search.runtime.layer import MoACacheLayer
from moa_search.runtime.rules import LayerRules
from moa_search.spans import SpanRule

from .explicit import RULES, explicit, logits, tiny_model, tiny_plan, tokens

pytest.importorskip("triton", reason="needs Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one after the other."""
    decode = pytest.importorskip("moa_kernels.decode.launch")
    if not torch.cuda.is_available():
        monkeypatch.setattr(decode, "TILES_PER_MULTIPROCESSOR", 1)


@pytest.mark.parametrize("seed", range(40))
def test_a_chunk_after_a_past_attends_as_in_the_torch_path(seed):
    """Whatever the padding, the model's own window, the rules, and what the copy of the past leaves out."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2]), draw.choice([1, 3])
    rules = LayerRules(
        tuple(draw.choice([*RULES[:3], *RULES[4:], SpanRule(0, 20)] if seed % 4 else RULES) for _ in range(heads)),
        sink=draw.choice([0, 4, 20]),
        block=8,
        sliding_window=draw.choice([None, None, 1, 24, 300]),
    )
    options = {
        "scale": 0.3,
        "softcap": draw.choice([None, 3.0]),
        "sink_logits": draw.choice([None, torch.randn(heads * group, generator=generator, dtype=torch.float64)]),
    }
    layer, shifts = MoACacheLayer(rules), []
    sizes = [draw.choice([1, 3, 40, 130, 400]) for _ in range(8)]
    for size in sizes:
        query, key, value = (
            torch.randn(batch, many, size, 8, generator=generator, dtype=torch.float64)
            for many in (heads * group, heads, heads)
        )
        valid = None
        if draw.random() < 0.5:
            valid = torch.rand(batch, size, generator=generator) < torch.rand(batch, 1, generator=generator) + 0.3
        layer.update(key, value)
        layer.admit(key, value)
        expected = blockwise.attend(query, key, value, valid, rules, layer, **options)
        if not layer.is_empty:
            shifts.append(kernels._after_past(key, value, None, rules, layer)[-1])
        found = kernels.prefill(query, key, value, valid, rules, layer, impl="torch", **options)
        real = torch.ones(batch, size, dtype=torch.bool) if valid is None else valid
        torch.testing.assert_close(found.transpose(1, 2)[real], expected.transpose(1, 2)[real])
        layer.commit(key, value, valid)
    assert seed != 1 or max(shifts) > 0


@pytest.mark.parametrize(("rule", "window"), [(SpanRule(12, 0), None), (SpanRule(0, 20), None), (SpanRule(40, 0), 30)])
def test_nothing_that_is_attended_is_left_out_where_the_copy_gets_shorter(rule, window):
    rules = LayerRules((rule,), sink=4, block=8, sliding_window=window)
    options = {"scale": 0.3, "softcap": None, "sink_logits": None}
    generator, shifts = torch.Generator().manual_seed(0), set()
    for length in range(255, 320):
        layer = MoACacheLayer(rules)
        past, query, chunk = (torch.randn(1, 1, n, 8, generator=generator).double() for n in (length, 3, 3))
        layer.update(past, past)
        layer.admit(past, past)
        layer.commit(past, past, None)
        expected = blockwise.attend(query, chunk, chunk, None, rules, layer, **options)
        found = kernels.prefill(query, chunk, chunk, None, rules, layer, impl="torch", **options)
        torch.testing.assert_close(found, expected)
        shifts.add(kernels._after_past(chunk, chunk, None, rules, layer)[-1])
    assert shifts == {0, 256}


def test_long_pasts_are_copied_without_what_no_head_attends():
    rules = LayerRules((SpanRule(100, 0), SpanRule(12, 0)), sink=4, block=8)
    layer, states = MoACacheLayer(rules), torch.randn(1, 2, 5000, 8)
    layer.update(states, states)
    layer.admit(states, states)
    layer.commit(states, states, None)
    chunk = torch.randn(1, 2, 10, 8)
    key, _, starts, shift = kernels._after_past(chunk, chunk, None, rules, layer)
    assert shift == 4864
    assert starts.tolist() == [0]
    assert torch.equal(key[:, :, 136:], chunk)
    assert torch.equal(key[:, :, :4], states[:, :, :4])
    assert torch.equal(key[:, 0, 40:136], states[:, 0, 4904:])
    assert not key[:, 1, 4:128].any()


KINDS = {
    "Llama": {},
    "Gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "GptOss": {"sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_generation_by_kernels_is_the_torch_paths_token_for_token(kind):
    """Grouped queries, rings that wrap, left padding, soft caps, sink logits, the model's own window."""
    model = tiny_model(kind, torch.float32, num_hidden_layers=2, **KINDS[kind]).to(DEVICE)
    plan = tiny_plan(model, shift=1)
    prompt = tokens(2, 34).to(DEVICE)
    real = torch.ones_like(prompt)
    real[1, :13] = 0
    options = {"attention_mask": real, "max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    with applied(model, plan, impl="torch"):
        expected = model.generate(prompt, output_logits=True, **options)
    with applied(model, plan, impl="triton"):
        found = model.generate(prompt, output_logits=True, prefill_chunk_size=24, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for mine, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def calls(monkeypatch):
    """Shapes of the queries that each kernel gets from now on."""
    seen = []
    for module, name in ((kernels, "span_prefill"), (layer, "span_decode")):
        original = getattr(module, name)

        def spy(query, *args, original=original, name=name, **kwargs):
            seen.append((name, query.shape[2], kwargs["impl"]))
            return original(query, *args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    return seen


def test_a_prompt_is_prefilled_and_drafts_are_decoded_in_one_launch_each(monkeypatch):
    model = tiny_model(dtype=torch.float32, num_hidden_layers=1).to(DEVICE)
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    sequence = tokens(1, 32).to(DEVICE)
    apply_plan(model, plan, impl="triton")
    past, seen, found = MoACache(model.config, plan), calls(monkeypatch), []
    with torch.no_grad():
        for number, part in enumerate(sequence.split([20, 1, 3, 2, 4, 2], 1)):
            found.append(model(part, past_key_values=past).logits)
            if number == 2:
                past.activate_past_recording()
                past.crop(0)
    # Without room for a rollback, several new tokens would overwrite keys that the first of them attends.
    expected = [("prefill", 20), ("decode", 1), ("prefill", 3), ("prefill", 2), ("decode", 4), ("decode", 2)]
    assert seen == [(f"span_{name}", count, "triton") for name, count in expected]
    torch.testing.assert_close(torch.cat(found, 1).cpu(), logits(reference, sequence).cpu(), rtol=1e-3, atol=1e-3)


def test_auto_is_torch_without_a_gpu_and_wherever_kernels_cannot_run(monkeypatch):
    model = tiny_model(dtype=torch.float64).to(DEVICE)  # no kernel takes double precision
    seen = calls(monkeypatch)
    with applied(model, tiny_plan(model)):
        model.generate(tokens(1, 20).to(DEVICE), max_new_tokens=3)
    assert not seen


def test_insisting_on_what_kernels_cannot_do_is_an_error():
    double = tiny_model(dtype=torch.float64).to(DEVICE)
    with pytest.raises(BackendUnavailableError, match="float64"):
        apply_plan(double, tiny_plan(double), impl="triton")
    assert double.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="impl is 'cuda'"):
        apply_plan(double, tiny_plan(double), impl="cuda")
    model = tiny_model(dtype=torch.float32).to(DEVICE)
    apply_plan(model, tiny_plan(model), impl="triton")
    with pytest.raises(BackendUnavailableError, match=r"no gradient here; use torch.no_grad\(\)"):
        model(tokens(1, 5).to(DEVICE))
    states = torch.zeros(1, 2, 5, 16, device=DEVICE)
    with pytest.raises(BackendUnavailableError, match=r"\[8, 16\] wide"):
        kernels.chosen("triton", states, states, states[..., :8])
    assert kernels.chosen("auto", states, states, states[..., :8]) == "torch"


def test_without_a_gpu_or_the_interpreter_triton_is_refused_when_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(BackendUnavailableError, match="need a CUDA device, not 'cpu'"):
        apply_plan(model, tiny_plan(model), impl="triton")


def test_what_runs_is_remembered_with_the_plan():
    model = tiny_model(dtype=torch.float32).to(DEVICE)
    plan = tiny_plan(model)
    apply_plan(model, plan, impl="triton")
    with applied(model, plan, impl="torch"):
        assert {module._moa_impl for module in model.modules() if hasattr(module, "_moa_impl")} == {"torch"}
    assert {module._moa_impl for module in model.modules() if hasattr(module, "_moa_impl")} == {"triton"}
    remove_plan(model)
    assert not any(hasattr(module, "_moa_impl") for module in model.modules())


@pytest.mark.slow
def test_a_cache_of_fixed_size_decodes_by_kernels():
    model = tiny_model(dtype=torch.float32, num_hidden_layers=1).to(DEVICE)
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    sequence = tokens(2, 32).to(DEVICE)
    apply_plan(model, plan, impl="triton")
    past = MoACache(model.config, plan, max_length=32)
    with torch.no_grad():
        found = [model(part, past_key_values=past).logits for part in sequence.split([20, 1, 3, 8], 1)]
    torch.testing.assert_close(torch.cat(found, 1).cpu(), logits(reference, sequence).cpu(), rtol=1e-3, atol=1e-3)
