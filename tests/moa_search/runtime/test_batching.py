"""Caches of single requests joined into a batch's, and taken out of it again."""

from __future__ import annotations

import pytest
import torch

from moa_search.errors import UnsupportedInputError
from moa_search.runtime import MoACache, apply_plan

from .explicit import explicit, logits, tiny_model, tiny_plan, tokens
from .test_coded import mixed_plan

LENS = (7, 130, 55)
MORE = 50


@torch.no_grad()
def filled(model, ids, mask=None):
    return model(ids, attention_mask=mask, use_cache=True).past_key_values


def left_padded(prompts):
    """Ids and mask of a batch, as a tokenizer pads on the left."""
    longest = max(ids.shape[1] for ids in prompts)
    pad = [longest - ids.shape[1] for ids in prompts]
    ids = torch.cat([torch.nn.functional.pad(row, (n, 0)) for row, n in zip(prompts, pad, strict=True)])
    return ids, (torch.arange(longest) >= torch.tensor(pad)[:, None]).long()


@torch.no_grad()
def answers(model, caches, prompts, steps=MORE):
    """Greedy tokens of a batch and their logits."""
    ids, mask = left_padded(prompts)
    return model.generate(
        torch.cat([ids, torch.full((len(ids), 1), 5)], 1),
        attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1),
        past_key_values=caches,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


def compare(model, batch, prompts):
    """A batch's answers against each request alone, in whole passes of the reference too."""
    found = answers(model, batch, prompts)
    for row, prompt in enumerate(prompts):
        alone = answers(model, filled(model, prompt), [prompt])
        assert torch.equal(found.sequences[row, -MORE:], alone.sequences[0, -MORE:])
        got, want = (torch.stack(result.logits)[:, i] for result, i in ((found, row), (alone, 0)))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_merged_batch_answers_as_its_requests_do_alone(model):
    prompts = [tokens(1, n, seed=n) for n in LENS]
    singles = [filled(model, ids) for ids in prompts]
    batch = MoACache.merge(singles)
    compare(model, batch, prompts)
    reference = explicit(tiny_model(), model._moa_applied.plan)
    for single, ids in zip(singles, prompts, strict=True):  # they stayed as they were
        found = answers(model, single, [ids]).sequences
        assert torch.equal(found[:, -MORE:], logits(reference, found)[:, -MORE - 1 : -1].argmax(-1))


def test_caches_of_codes_are_merged_and_taken_apart():
    model = tiny_model()
    apply_plan(model, mixed_plan(model))
    prompts = [tokens(1, n, seed=n) for n in LENS]
    batch = MoACache.merge([filled(model, ids) for ids in prompts])
    one = batch.take(2)
    compare(model, batch, prompts)
    compare(model, one, prompts[2:])


def test_one_taken_out_goes_on_as_it_would_have_alone_in_the_memory_it_needs(model):
    prompts = [tokens(1, n, seed=n) for n in LENS]
    batch = MoACache.merge([filled(model, ids) for ids in prompts])
    for row, ids in enumerate(prompts):
        out, alone = batch.take(row), filled(model, ids)
        assert out.get_seq_length() == ids.shape[1]
        assert out.nbytes <= alone.nbytes * 1.4
        compare(model, out, [ids])
    compare(model, batch, prompts)  # and it stayed as it was
    compare(model, filled_again(batch, model, prompts), [prompts[2], prompts[0]])


def filled_again(batch, model, prompts):
    with pytest.raises(UnsupportedInputError, match="samples 0 to 2, not 3"):
        batch.take(0, 3)
    return MoACache.merge([filled(model, ids) for ids in prompts]).take(2, 0)


def test_requests_that_leave_and_join_while_a_batch_generates(model):
    """As a server would: one finishes, another comes, and the rest goes on."""
    prompts = [tokens(1, n, seed=n) for n in LENS]
    batch = MoACache.merge([filled(model, ids) for ids in prompts])
    first = answers(model, batch, prompts, steps=9).sequences
    # The newest token isn't stored yet; padding falls away.
    so_far = [row[-(n + 1 + 9) : -1][None] for n, row in zip(LENS, first, strict=True)]
    new = tokens(1, 80, seed=9)
    joined = MoACache.merge([batch.take(2), filled(model, new), batch.take(0)])
    compare(model, joined, [so_far[2], new, so_far[0]])


@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_padding_of_a_batch_stays_behind(where, model):
    ids, real = tokens(2, 60), torch.ones(2, 60, dtype=torch.int64)
    start = {"left": 0, "right": 40, "middle": 11}[where]
    real[1, start : start + 20] = 0
    position = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = model(ids, attention_mask=real, position_ids=position).past_key_values
    compare(model, cache.take(1), [ids[1:, real[1].bool()]])


def test_rollbacks_in_a_merged_batch(model):
    prompts = [tokens(1, n, seed=n) for n in LENS]
    singles = [filled(model, ids) for ids in prompts]
    singles[1].activate_past_recording(30)
    batch = MoACache.merge(singles)
    with pytest.raises(UnsupportedInputError, match="padding"):
        batch.crop(-8)  # more than the shortest has
    more = tokens(3, 4, seed=1)
    mask = torch.nn.functional.pad(left_padded(prompts)[1], (0, 4), value=1)
    with torch.no_grad():
        model(
            more, attention_mask=mask, position_ids=torch.tensor(LENS)[:, None] + torch.arange(4), past_key_values=batch
        )
    batch.crop(-4)
    compare(model, batch, prompts)


def test_memory_is_that_of_the_longest_request_for_each(model):
    singles = [filled(model, tokens(1, n)) for n in LENS]
    longest = max(cache.nbytes for cache in singles)
    assert longest <= MoACache.merge(singles).nbytes / len(LENS) <= longest * 1.1


class TestWrongInput:
    @pytest.mark.parametrize(
        ("caches", "told"),
        [
            (lambda model: [], "no caches to merge"),
            (lambda model: [filled(model, tokens(1, 9)), MoACache(model.config, tiny_plan(model))], "an empty cache"),
            (lambda model: [filled(model, tokens(1, 9)), other_plan()], "different plans"),
            (lambda model: [filled(model, tokens(1, 9)), narrow()], "torch.float64 on cpu and torch.bfloat16 on"),
        ],
    )
    def test_caches_that_dont_fit_together(self, caches, told, model):
        with pytest.raises(UnsupportedInputError, match=told):
            MoACache.merge(caches(model))

    def test_samples_that_arent_there(self, model):
        cache = filled(model, tokens(2, 9))
        for samples in ((), (2,), (-1,), (0, 5)):
            with pytest.raises(UnsupportedInputError, match="samples"):
                cache.take(*samples)


def other_plan():
    model = tiny_model()
    return filled(apply_plan(model, tiny_plan(model, shift=2)), tokens(1, 9))


def narrow():
    model = tiny_model(dtype=torch.bfloat16)
    return filled(apply_plan(model, tiny_plan(model)), tokens(1, 9))
