"""The runtime on a GPU: kernels under `apply_plan`, graphs that replay, bytes as the allocator counts them."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers

from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, applied, apply_plan
from moa_search.spans import DENSE, SpanRule
from tests.moa_search.runtime.explicit import key_transforms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RULES = [SpanRule(64, 0), SpanRule(0, 64), DENSE, SpanRule(-200, 128)]
TIERS = [(4, 4), (8, 2), (16, 3), (3, 8), (2, 2)]
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
KINDS = {
    "Llama": {},
    "Gemma2": {"sliding_window": 300, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 20.0},
    "GptOss": {"sliding_window": 300, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": None},
}


@pytest.fixture(autouse=True)
def no_leftovers():
    """Frames of a failed test and what `torch.compile` keeps hold caches until they are collected."""
    gc.collect()


def build(kind="Llama", dtype=torch.float32, bits=16, **changes):
    """A random model on the GPU, and a plan with a different rule, and with ``"mixed"`` bits, per head."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **KINDS[kind], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to("cuda", dtype).eval()
    model.generation_config.eos_token_id = None
    signature = ModelSignature.of(config)
    layers, heads = range(signature.num_hidden_layers), range(signature.num_key_value_heads)
    rules = [[RULES[(index + head) % 4] for head in heads] for index in layers]
    if bits == 16:
        return model, Plan.from_rules(rules, signature)
    tiers = [[TIERS[(len(heads) * index + head) % 5] for head in heads] for index in layers]
    return model, Plan.from_rules(rules, signature, tiers=tiers, transforms=key_transforms(signature))


def tokens(batch, length, seed=0):
    return torch.randint(2, 1000, (batch, length), generator=torch.Generator().manual_seed(seed)).cuda()


@torch.no_grad()
def logits_in_parts(model, cache, sequence, sizes):
    return torch.cat([model(part, past_key_values=cache).logits for part in sequence.split(sizes, 1)], 1)


@pytest.mark.parametrize(("kind", "bits"), [*((kind, 16) for kind in KINDS), ("Llama", "mixed"), ("Gemma2", "mixed")])
def test_kernels_give_what_torch_gives_in_chunks_and_token_by_token(kind, bits):
    if bits == 16:
        model, plan = build(kind)
    else:
        # Kernels multiply codes on tensor cores, in 16 bits. One layer: the next one would code what rounding changes,
        # where a number on the border of two levels falls to either, and differences grow without bound.
        one = {"num_hidden_layers": 1, "num_key_value_heads": 8}
        one |= {"layer_types": ["full_attention"]} if kind == "Gemma2" else {}
        model, plan = build(kind, torch.float16, bits, **one)
    sequence, sizes = tokens(2, 1600), [700, 1, 1, 500, 300, *[1] * 98]
    found = {}
    for impl in ("torch", "triton", "auto"):
        with applied(model, plan, impl=impl):
            found[impl] = logits_in_parts(model, MoACache(model.config, plan), sequence, sizes)
    scale = found["torch"].abs().max()
    assert (found["triton"] - found["torch"]).abs().max() < (2e-3 if bits == 16 else 2e-2) * scale
    assert torch.equal(found["auto"], found["triton"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_errs_no_more_than_the_torch_path(dtype):
    model, plan = build()
    sequence, sizes = tokens(2, 700), [600, *[1] * 100]
    with applied(model, plan, impl="torch"):
        exact = logits_in_parts(model, MoACache(model.config, plan), sequence, sizes)
    model = model.to(dtype)
    errors = {}
    for impl in ("torch", "triton"):
        with applied(model, plan, impl=impl):
            found = logits_in_parts(model, MoACache(model.config, plan), sequence, sizes).float()
        errors[impl] = (found - exact).pow(2).mean().sqrt()
    assert errors["triton"] <= 1.5 * errors["torch"]


def padded(batch, length):
    real = torch.ones(batch, length, dtype=torch.int64, device="cuda")
    for sample in range(batch):
        real[sample, : sample * length // (batch + 1)] = 0
    return real


def test_padded_generation_is_the_same_by_kernels_from_a_fixed_cache_and_compiled():
    """`generate` compiles the steps over a fixed cache by itself; they replay CUDA graphs."""
    model, plan = build()
    prompt, real = tokens(4, 900), padded(4, 900)
    options = {"attention_mask": real, "max_new_tokens": 300, "do_sample": False}
    with applied(model, plan, impl="torch"):
        expected = model.generate(prompt, **options)
    with applied(model, plan, impl="triton"):
        assert torch.equal(model.generate(prompt, **options), expected)
        plain = model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
        assert torch.equal(plain, expected)
        assert torch.equal(model.generate(prompt, cache_implementation="static", **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, "mixed"])
def test_a_recorded_step_replays_a_thousand_times_while_rings_wrap(bits):
    model, plan = build(dtype=torch.bfloat16, bits=bits)
    apply_plan(model, plan, impl="triton")
    sequence, start, steps = tokens(2, 1600), 500, 1000
    eager, recorded = (MoACache(model.config, plan, max_length=1600) for _ in range(2))
    for cache in (eager, recorded):
        model(sequence[:, :start], past_key_values=cache)
    token = sequence[:, start : start + 1].clone()
    position = torch.full((2, 1), start, device="cuda")
    twin = recorded.copy()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and allocates outside of the recording
        for _ in range(3):
            model(token, position_ids=position, past_key_values=twin)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, position_ids=position, past_key_values=recorded).logits
    for step in range(start, start + steps):
        token.copy_(sequence[:, step : step + 1])
        position.fill_(step)
        graph.replay()
        expected = model(sequence[:, step : step + 1], position_ids=position, past_key_values=eager).logits
        assert torch.equal(logits, expected), step
    assert recorded.layers[0].lens.tolist() == [start + steps] * 2


def requested():
    """Bytes that tensors asked for; the allocator may hand out up to a MiB more for each."""
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, "mixed"])
@pytest.mark.parametrize("length", [100, 500, 1000, 2000, 4000, 8000])
def test_the_allocator_counts_what_the_plan_predicts(length, bits):
    model, plan = build(dtype=torch.bfloat16, bits=bits, num_hidden_layers=2)
    apply_plan(model, plan)
    batch, heads = 8, 4
    block = 2 * 64 * 2 * plan.block * heads * batch  # keys and values, width, bytes per number, tokens
    model(tokens(batch, 10), past_key_values=MoACache(model.config, plan))  # whatever is made once
    before, cache = requested(), MoACache(model.config, plan)
    for part in tokens(batch, length).split(1000, 1):
        model(part, past_key_values=cache, logits_to_keep=1)
    del part
    taken, predicted = requested() - before, plan.kv_bytes(length, batch=batch)
    assert predicted <= cache.nbytes <= predicted + block
    assert cache.nbytes <= taken <= cache.nbytes + 2**20  # and tables of a few numbers


@torch.no_grad()
def test_a_long_prefill_takes_no_more_than_its_chunks_beside_the_cache():
    model, plan = build(dtype=torch.bfloat16)
    apply_plan(model, plan)
    peaks = []
    for length in (6000, 12000):
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = model.generate(
            tokens(1, length), max_new_tokens=1, prefill_chunk_size=1000, return_dict_in_generate=True
        )
        peaks.append(torch.cuda.max_memory_allocated() - before - result.past_key_values.nbytes)
        del result
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_on_several_devices():
    accelerate = pytest.importorskip("accelerate")
    model, plan = build()
    prompt = tokens(2, 300)
    with applied(model, plan):
        expected = model.generate(prompt, max_new_tokens=30, do_sample=False)
    places = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    places |= {f"model.layers.{index}": index // 2 for index in range(4)}
    model = apply_plan(accelerate.dispatch_model(model, places), plan)
    assert torch.equal(model.generate(prompt, max_new_tokens=30, do_sample=False), expected)
