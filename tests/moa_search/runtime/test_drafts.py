"""Limits of a cache that a generation could meet half-way: met before the first token, or never."""

from __future__ import annotations

import pytest
import torch

from moa_search.errors import UnsupportedInputError
from moa_search.runtime import MoACache, apply_plan
from moa_search.runtime.layer import ROLLBACK_TOKENS

from .explicit import explicit, logits, tiny_model, tiny_plan, tokens


@pytest.fixture
def model():
    return tiny_model(max_position_embeddings=2048)


def repetitive(length):
    """A prompt whose end is also at its beginning, so that lookups find as much as they ask for."""
    return torch.cat([tokens(1, length), tokens(1, length)[:, :40]], 1)


def assert_greedy(reference, found, start):
    assert torch.equal(found[:, start:], logits(reference, found)[:, start - 1 : -1].argmax(-1))


@pytest.mark.parametrize("drafts", [ROLLBACK_TOKENS - 1, ROLLBACK_TOKENS, ROLLBACK_TOKENS + 1, 450])
def test_lookups_of_any_length_are_exact(model, drafts):
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    apply_plan(model, plan)
    prompt = repetitive(500)
    options = {"max_new_tokens": 30, "do_sample": False, "max_matching_ngram_size": 2}
    found = model.generate(prompt, prompt_lookup_num_tokens=drafts, **options)
    assert_greedy(reference, found, 540)


@pytest.mark.parametrize("planned_assistant", [False, True])
def test_an_assistants_long_drafts_are_exact(model, planned_assistant):
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    apply_plan(model, plan)
    assistant = tiny_model(num_hidden_layers=1, max_position_embeddings=2048)
    if planned_assistant:
        apply_plan(assistant, tiny_plan(assistant, shift=2))
    assistant.generation_config.num_assistant_tokens = 320
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    found = model.generate(
        tokens(1, 300),
        max_new_tokens=340,
        do_sample=False,
        assistant_model=assistant,
        stopping_criteria=[lambda sequence, _: torch.tensor([sequence.shape[1] > 303])],  # each round drafts for long
        bad_words_ids=[[0]],  # which an assistant would take for padding
    )
    assert_greedy(reference, found, 300)


def test_drafts_that_grow_past_the_room_are_exact(model):
    """A model that agrees with its own drafts gets two more each time."""
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    apply_plan(model, plan)
    model.generation_config.num_assistant_tokens = ROLLBACK_TOKENS - 2
    model.generation_config.num_assistant_tokens_schedule = "heuristic"
    model.generation_config.assistant_confidence_threshold = 0.0
    found = model.generate(tokens(1, 300), max_new_tokens=540, do_sample=False, assistant_early_exit=3)
    assert_greedy(reference, found, 300)


def test_a_cache_of_fixed_size_is_refused_before_the_first_token(model):
    plan = tiny_plan(model)
    apply_plan(model, plan)
    for options in (
        {"past_key_values": MoACache(model.config, plan, max_length=900)},
        {"cache_implementation": "static"},
    ):
        seen = []
        handle = model.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        with pytest.raises((UnsupportedInputError, ValueError), match=r"fixed size|[Ss]tatic"):
            model.generate(repetitive(100), max_new_tokens=50, prompt_lookup_num_tokens=10, **options)
        handle.remove()
        assert not seen


def test_a_crop_that_is_refused_says_how_much_room_it_needs(model):
    plan = tiny_plan(model)
    apply_plan(model, plan)
    cache = MoACache(model.config, plan)
    cache.activate_past_recording()
    with torch.no_grad():
        model(tokens(1, 900), past_key_values=cache)
        with pytest.raises(UnsupportedInputError, match=r"activate_past_recording\(400\)"):
            cache.crop(-400)
        again = MoACache(model.config, plan)
        again.activate_past_recording(400)
        model(tokens(1, 900), past_key_values=again)
        again.crop(-400)
        found = model(tokens(1, 900)[:, 500:510], past_key_values=again).logits
        expected = model(tokens(1, 510)).logits[:, 500:]
    torch.testing.assert_close(found, expected)
