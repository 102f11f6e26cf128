"""Text longer than the model's context, against scores written out from distances."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from moa_search.errors import (
    BackendUnavailableError,
    ConfigError,
    MoAError,
    ModelUnsupportedError,
    UnsupportedInputError,
)
from moa_search.formats import ModelSignature, Plan
from moa_search.masks import head_masks
from moa_search.runtime import MoACache, applied, apply_plan
from moa_search.spans import DENSE, SpanRule

from .explicit import logits, tiny_model, tokens
from .test_coded import mixed_plan

CONTEXT = 64
LONG = 3 * CONTEXT
SINK, BLOCK = 4, 8
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # tables of rotary embeddings are float32
RULES = (SpanRule(12, 0), SpanRule(40, 0), SpanRule(CONTEXT, 0))
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def short_model(kind="Llama", rope="default", **changes):
    """Its keys are told apart by position: slow frequencies aren't near 1 alone."""
    changes = {"max_position_embeddings": CONTEXT, "rope_parameters": ROPES[rope], **changes}
    return tiny_model(kind, **changes)


def fixed_plan(model, rules=RULES):
    signature = ModelSignature.of(model.config)
    heads = signature.num_key_value_heads
    of = [[rules[(layer * heads + head) % len(rules)] for head in range(heads)] for layer in range(3)]
    return Plan.from_rules(of, signature, sink=SINK, block=BLOCK)


def by_distance(model, plan, context=CONTEXT):
    """A copy of a model that attends by distances: queries and keys turned to position 0, then by each pair's."""

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        length, group = query.shape[2], query.shape[1] // key.shape[1]
        at = torch.arange(length)
        frequency = model.model.rotary_emb.inv_freq.double()
        turns = torch.polar(torch.ones(length, len(frequency), dtype=torch.float64), at[:, None] * frequency)
        half = query.shape[-1] // 2
        q = torch.complex(query[..., :half], query[..., half:]) * turns.conj()
        k = torch.complex(key[..., :half], key[..., half:]) * turns.conj()
        distance = at[:, None] - at  # [query, key]
        sink = at < plan.sink
        distance = torch.where(sink & (at[:, None] >= context), context - 1 - at, distance)
        turned = torch.polar(torch.ones((), dtype=torch.float64), distance[..., None] * frequency)  # [query, key, pair]
        k = k.repeat_interleave(group, 1)
        scores = torch.einsum("bhqp,bhkp,qkp->bhqk", q, k.conj(), turned).real * scaling
        rules = plan.rules[module.layer_idx]
        masks = torch.from_numpy(head_masks(rules, group, length, sink=plan.sink, min_span=plan.min_span))
        scores = scores.masked_fill(~masks, float("-inf"))
        out = scores.softmax(-1) @ value.repeat_interleave(group, 1)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("by distance", attention)
    AttentionMaskInterface.register("by distance", eager_mask)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("by distance")
    return reference


@torch.no_grad()
def run(model, cache, sequence):
    return model(sequence, past_key_values=cache).logits


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("Llama", "default"),
        ("Llama", "linear"),
        ("Llama", "llama3"),
        ("Mistral", "default"),
        ("Qwen2", "default"),
        ("Qwen3", "default"),
    ],
)
def test_three_contexts_are_what_distances_say(kind, rope):
    changes = {"sliding_window": None} if kind == "Mistral" else {}
    model = short_model(kind, rope, **changes)
    plan = fixed_plan(model)
    sequence = tokens(2, LONG)
    expected = logits(by_distance(model, plan), sequence)
    apply_plan(model, plan, streaming=True)
    torch.testing.assert_close(logits(model, sequence), expected, **TOLERANCE)
    assert not torch.allclose(expected[:, 2 * CONTEXT :], plain(model, plan, sequence)[:, 2 * CONTEXT :], atol=1e-2)


def plain(model, plan, sequence):
    with applied(model, plan):
        return logits(model, sequence)


@pytest.fixture(scope="module")
def model():
    model = short_model()
    return apply_plan(model, fixed_plan(model), streaming=True)


@pytest.fixture(scope="module")
def reference():
    model = short_model()
    return by_distance(model, fixed_plan(model))


@pytest.fixture(scope="module")
def expected(reference):
    return logits(reference, tokens(1, LONG))


@pytest.mark.parametrize("chunks", [(LONG,), (50, 10, *[1] * 20, 62, 50), (100, 92)], ids=lambda c: f"{len(c)}")
def test_however_it_is_cut(model, expected, chunks):
    sequence = tokens(1, LONG)
    cache = MoACache(model.config, model._moa_applied.plan)
    found = torch.cat([run(model, cache, part) for part in sequence.split(chunks, 1)], 1)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_generation_goes_on_in_the_same_memory(model, reference):
    prompt = tokens(1, 40)
    result = model.generate(prompt, max_new_tokens=90, do_sample=False, return_dict_in_generate=True)
    picked = logits(reference, result.sequences)[:, 39:-1].argmax(-1)
    assert torch.equal(result.sequences[:, 40:], picked)
    cache = result.past_key_values
    before = cache.nbytes
    run(model, cache, tokens(1, 2 * LONG, seed=1))
    assert cache.nbytes == before


def test_padded_batches(model, reference):
    lens, length = (LONG, 90, 30), LONG
    sequence, real = tokens(3, length), torch.zeros(3, length, dtype=torch.int64)
    for sample, tokens_ in enumerate(lens):
        real[sample, length - tokens_ :] = 1
    position = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(sequence, attention_mask=real, position_ids=position).logits
    for sample, tokens_ in enumerate(lens):
        alone = logits(reference, sequence[sample : sample + 1, length - tokens_ :])
        torch.testing.assert_close(found[sample : sample + 1, length - tokens_ :], alone, **TOLERANCE)


def test_within_the_context_nothing_changes(model):
    sequence, plan = tokens(1, CONTEXT), model._moa_applied.plan
    with applied(model, plan):
        expected = logits(model, sequence)
    assert model._moa_applied.streaming is True, "and it is what it was"
    assert torch.equal(logits(model, sequence), expected)


def test_a_shorter_context_and_a_plan_anchored_at_it():
    model = short_model()
    plan = fixed_plan(model, (DENSE, SpanRule(0, 64))).anchored_at(48)
    expected = logits(by_distance(model, plan, context=48), tokens(1, LONG))
    apply_plan(model, plan, streaming=48)
    torch.testing.assert_close(logits(model, tokens(1, LONG)), expected, **TOLERANCE)


def with_rules(*rules):
    return lambda model: fixed_plan(model, rules)


WRONG = {
    "a dense head": (
        short_model,
        with_rules(SpanRule(9, 0), DENSE),
        True,
        {},
        ConfigError,
        "KV head 1 of layer 0 is dense",
    ),
    "a head that grows": (short_model, with_rules(SpanRule(0, 64)), True, {}, ConfigError, "grows with the context"),
    "a span beyond the context": (
        short_model,
        with_rules(SpanRule(65, 0)),
        True,
        {},
        ConfigError,
        "more than 64 tokens",
    ),
    "a span beyond a shorter one": (short_model, fixed_plan, 32, {}, ConfigError, r"plan\.anchored_at\(32\)"),
    "more than the model's context": (
        short_model,
        fixed_plan,
        65,
        {},
        ConfigError,
        "from 1 to the model's context, 64",
    ),
    "no context": (short_model, fixed_plan, 0, {}, ConfigError, "0 tokens; it must be from 1"),
    "fewer bits": (
        short_model,
        lambda model: mixed_plan(model).anchored_at(40),
        True,
        {},
        ConfigError,
        "fewer than 16",
    ),
    "part of each head": (lambda: tiny_model("Phi"), fixed_plan, True, {}, ModelUnsupportedError, "positions of phi"),
    "a table for every length": (
        lambda: tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}),
        fixed_plan,
        True,
        {},
        ModelUnsupportedError,
        "a dynamic rotary table",
    ),
    "kernels": (
        short_model,
        fixed_plan,
        True,
        {"impl": "cpu"},
        BackendUnavailableError,
        "streaming runs in torch only",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cant_be_streamed_is_refused_with_the_reason(case):
    make, plan, streaming, options, error, told = WRONG[case]
    model = make()
    with pytest.raises(error, match=told) as caught:
        apply_plan(model, plan(model), streaming=streaming, **options)
    assert isinstance(caught.value, MoAError)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, "_moa_applied")


def test_caches_of_fixed_size_are_refused_beyond_the_context(model):
    cache = MoACache(model.config, model._moa_applied.plan, max_length=LONG)
    run(model, cache, tokens(1, CONTEXT))
    with pytest.raises(UnsupportedInputError, match="streaming needs a cache that grows"):
        run(model, cache, tokens(1, 1))
