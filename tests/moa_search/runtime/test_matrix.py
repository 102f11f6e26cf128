"""Every architecture that can run under a plan, by what people do with it, against explicit masks without a cache."""

from __future__ import annotations

import copy
import random
from functools import cache

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, apply_plan
from moa_search.spans import DENSE, SpanRule
from tests.moa_search.architectures import ARCHITECTURES, HYBRIDS, MORE_ARCHITECTURES, SMALL, make_model

from .explicit import explicit, key_transforms, logits

ALL = [*ARCHITECTURES, *MORE_ARCHITECTURES, *HYBRIDS]
ATTENTION_ONLY = [*ARCHITECTURES, *MORE_ARCHITECTURES]
OWN_STATE = {"recurrent_gemma"}
"""Models that keep states outside any cache, so that padding, beams and turns go wrong without a plan, too."""
SINGLE_PRECISION_INSIDE = {"minimax_m2"}
"""Models that compute something in single precision whatever they are given."""
NEW = 14
BITS = (16, 8, 4, 3, 2)


SAMPLE = ("llama", "gemma2", "gpt_oss", "qwen2 with sliding layers", "gpt_neox", "falcon_h1")
"""What the CPU library runs, too, where not all is asked for (``--all-impls``): groups of one and more, soft caps, sink
logits, sliding windows, a hybrid."""


def each(architectures):
    """Each architecture on the torch path in double precision, by the CPU library in single precision, and coded.

    Coded: heads store keys and values in fewer than 16 bits, each in its own.
    """
    cases = list(architectures)
    for name in architectures:
        marks = () if name in SAMPLE else pytest.mark.all_impls
        cases.append(pytest.param(f"{name} by cpu", marks=marks))
        cases.append(pytest.param(f"{name} coded", marks=marks))
    return pytest.mark.parametrize("architecture", cases)


def random_plan(model, seed, *, coded=False):
    """Other rules, and if ``coded`` bits, for every head; in each layer at least one that is not dense."""
    signature = ModelSignature.of(model.config)
    draw = random.Random(seed)
    rules = [
        [
            draw.choice([SpanRule(draw.randrange(30), 0), SpanRule(draw.randrange(-20, 9), draw.randrange(180)), DENSE])
            for _ in range(signature.num_key_value_heads)
        ]
        for _ in range(signature.num_hidden_layers)
    ]
    for layer in rules:
        layer[draw.randrange(len(layer))] = SpanRule(draw.randrange(20), 0)
    sizes = {"sink": draw.randrange(1, 6), "block": draw.randrange(5, 10)}
    if not coded:
        return Plan.from_rules(rules, signature, **sizes)
    tiers = [[(draw.choice(BITS), draw.choice(BITS)) for _ in heads] for heads in rules]
    tiers[0][0] = (2, 3)
    return Plan.from_rules(rules, signature, tiers=tiers, transforms=key_transforms(signature), **sizes)


def bare(architecture):
    """Its name without how it runs."""
    return architecture.removesuffix(" by cpu").removesuffix(" coded")


@cache
def prepared(architecture):
    """A model under a plan, the plan, and the reference, in double precision."""
    by_cpu, coded = architecture.endswith(" by cpu"), architecture.endswith(" coded")
    name = bare(architecture)
    model = make_model(name)
    model.generation_config.eos_token_id = None
    plan = random_plan(model, name, coded=coded)
    reference = explicit(model, plan)
    if by_cpu:
        model.float()
    return apply_plan(model, plan, impl="cpu" if by_cpu else "torch"), plan, reference


def prompts(batch, length, seed=0):
    return torch.randint(3, SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def in_chunks(model, sequence, held):
    """Logits of a sequence, a forward pass per chunk."""
    return torch.cat([forward(model, part, past_key_values=held) for part in sequence.split([1, 33, 1, 20, 15], 1)], 1)


@torch.no_grad()
def forward(model, part, **options):
    return model(part, **options).logits


def assert_close(architecture, found, expected):
    """Equal but for rounding."""
    loose = {"rtol": 1.3e-6, "atol": 1e-5} if bare(architecture) in SINGLE_PRECISION_INSIDE else {}
    if architecture.endswith(" by cpu"):
        found, expected = found.double(), expected.double()
        loose = {"rtol": 1e-6, "atol": 4 * error_of_single_precision(architecture)}
    torch.testing.assert_close(found, expected, **loose)


@cache
def error_of_single_precision(architecture):
    """Largest error of a logit that plain attention makes where the whole model computes in single precision."""
    _, _, reference = prepared(architecture)
    sequence = prompts(2, 70)
    single = copy.deepcopy(reference).float()
    return (logits(single, sequence).double() - logits(reference, sequence)).abs().max().item()


def assert_follows(reference, sequence, start):
    """Each token from ``start`` on is the one that a whole forward pass of the reference picks."""
    assert torch.equal(sequence[:, start:], logits(reference, sequence)[:, start - 1 : -1].argmax(-1))


@each(ALL)
def test_a_forward_pass(architecture):
    model, _, reference = prepared(architecture)
    prompt = prompts(2, 61)
    expected = logits(reference, prompt)
    assert_close(architecture, logits(model, prompt), expected)
    if architecture != bare(architecture):
        return
    own = make_model(architecture)
    own.set_attn_implementation("eager")
    dense = logits(own, prompt)
    assert (dense - expected)[:, -1].abs().max() > 0.05, "the plan changes the output"
    without = explicit(own, Plan.uniform(DENSE, ModelSignature.of(own.config)))
    # So the reference is right about all but the spans; transformers computes its softmax in single precision.
    torch.testing.assert_close(logits(without, prompt), dense, rtol=1e-4, atol=1e-4)


@each(ALL)
def test_greedy_decoding_of_a_left_padded_batch(architecture):
    model, _, reference = prepared(architecture)
    prompt, real = prompts(2, 47), torch.ones(2, 47, dtype=torch.int64)
    real[1, :13] = 0
    prompt[1, :13] = 0
    found = model.generate(prompt, attention_mask=real, max_new_tokens=NEW, do_sample=False)
    assert_follows(reference, found[:1], 47)
    if bare(architecture) not in OWN_STATE:
        assert_follows(reference, found[1:, 13:], 47 - 13)


@each([name for name in ALL if name != "falcon_h1"])
def test_a_cache_of_fixed_size(architecture):
    model, _, reference = prepared(architecture)
    found = model.generate(prompts(2, 40), max_new_tokens=NEW, do_sample=False, cache_implementation="static")
    assert_follows(reference, found, 40)


@each(ATTENTION_ONLY)
def test_right_and_inner_padding(architecture):
    model, plan, reference = prepared(architecture)
    sequence, real = prompts(2, 60), torch.ones(2, 60, dtype=torch.int64)
    real[0, 40:55] = 0
    real[1, 7:20] = 0
    position = (real.cumsum(1) - 1).clamp(min=0)
    held, found = MoACache(model.config, plan), []
    for first, last in ((0, 55), (55, 56), (56, 60)):
        options = {"attention_mask": real[:, :last], "position_ids": position[:, first:last]}
        found.append(forward(model, sequence[:, first:last], past_key_values=held, **options))
    for sample, mask, mine in zip(sequence, real.bool(), torch.cat(found, 1), strict=True):
        assert_close(architecture, mine[mask], logits(reference, sample[mask][None])[0])


@each(ALL)
def test_sampling_with_a_seed(architecture):
    model, _, reference = prepared(architecture)
    options = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 2, "temperature": 2.0, "top_k": 20}
    torch.manual_seed(1)
    found = model.generate(prompts(1, 40), **options)
    torch.manual_seed(1)
    assert torch.equal(found, reference.generate(prompts(1, 40), use_cache=False, **options))
    assert not torch.equal(found[0], found[1])


@each([name for name in ALL if name not in OWN_STATE])
def test_beam_search(architecture):
    model, _, reference = prepared(architecture)
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3}
    expected = reference.generate(prompts(2, 40), use_cache=False, **options)
    assert torch.equal(model.generate(prompts(2, 40), **options), expected)


@each(ATTENTION_ONLY)
def test_prefill_in_chunks(architecture):
    model, plan, reference = prepared(architecture)
    sequence = prompts(2, 70)
    found = in_chunks(model, sequence, MoACache(model.config, plan))
    assert_close(architecture, found, logits(reference, sequence))


@each([name for name in HYBRIDS if name not in OWN_STATE])
def test_prefill_of_hybrids_in_chunks(architecture):
    """Equals that with transformers' own cache: some linear attention depends on the chunks, without a plan, too."""
    model, plan, _ = prepared(architecture)
    sequence = prompts(2, 70)
    held, stock = MoACache(model.config, plan), DynamicCache(config=model.config)
    assert_close(architecture, in_chunks(model, sequence, held), in_chunks(model, sequence, stock))
    assert 0 < held.nbytes < sum(layer.keys.nbytes * 2 for layer in stock.layers if isinstance(layer, DynamicLayer))


@each([name for name in ALL if name not in OWN_STATE])
def test_turns_on_a_kept_cache(architecture):
    model, plan, reference = prepared(architecture)
    sequence, held = prompts(1, 30), MoACache(model.config, plan)
    for turn in range(2):
        start = sequence.shape[1]
        options = {"attention_mask": torch.ones_like(sequence), "max_new_tokens": NEW, "do_sample": False}
        sequence = model.generate(sequence, past_key_values=held, **options)
        assert_follows(reference, sequence, start)
        sequence = torch.cat([sequence, prompts(1, 15, seed=turn + 1)], 1)
