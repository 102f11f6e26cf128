from __future__ import annotations

import copy
import random

import pytest
import torch

from moa_search.errors import UnsupportedInputError
from moa_search.runtime import MoACache, applied, apply_plan
from moa_search.runtime.layer import EMPTY, ROLLBACK_TOKENS, MoACacheLayer
from moa_search.runtime.rules import LayerRules
from moa_search.spans import SpanRule

from .explicit import RULES, explicit, greedy, logits, tiny_model, tiny_plan, tokens


@pytest.fixture(scope="module")
def llama(plan):
    return apply_plan(tiny_model(), plan)


@pytest.fixture(scope="module")
def reference(plan):
    return explicit(tiny_model(), plan)


@torch.no_grad()
def run(model, cache, sequence, real=None):
    """Logits of one more chunk."""
    position = None
    if real is not None:
        position = (real.cumsum(1) - 1).clamp(min=0)[:, -sequence.shape[1] :]
    return model(sequence, attention_mask=real, position_ids=position, past_key_values=cache).logits


def cropped(cache, removed):
    """Whether a rollback was granted."""
    try:
        cache.crop(-removed)
    except UnsupportedInputError:
        return False
    return True


def assert_greedy(reference, sequence, start):
    """Each token from ``start`` on is the one that a whole forward pass of the reference picks."""
    assert torch.equal(sequence[:, start:], logits(reference, sequence)[:, start - 1 : -1].argmax(-1))


def test_greedy_generation_equals_repeated_whole_passes_token_for_token(llama, reference):
    prompt = tokens(1, 70)
    found = llama.generate(prompt, max_new_tokens=70, do_sample=False)
    assert torch.equal(found, greedy(reference, prompt, 70))


def test_rings_wrap_several_times(llama, reference):
    found = llama.generate(tokens(2, 3), max_new_tokens=300, do_sample=False)
    assert_greedy(reference, found, 3)


@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_a_padded_batch_equals_each_sample_alone(llama, where):
    batch, length = 3, 90
    prompt, real = tokens(batch, length), torch.ones(batch, length, dtype=torch.int64)
    for sample, padding in enumerate((0, 25, 70)):
        start = {"left": 0, "right": length - padding, "middle": 7}[where]
        real[sample, start : start + padding] = 0
    cache = MoACache(llama.config, llama._moa_applied.plan)
    following = tokens(batch, 40, seed=1)
    found = [run(llama, cache, prompt, real)]
    found += [
        run(llama, cache, following[:, i : i + 1], torch.nn.functional.pad(real, (0, i + 1), value=1))
        for i in range(40)
    ]
    assert cache.get_seq_length() == length + 40
    for sample in range(batch):
        kept = torch.cat([real[sample].bool(), torch.ones(40, dtype=torch.bool)])
        alone = torch.cat([prompt[sample], following[sample]])[kept][None]
        own = MoACache(llama.config, llama._moa_applied.plan)
        expected = torch.cat([run(llama, own, part) for part in alone.split([alone.shape[1] - 40] + [1] * 40, 1)], 1)
        torch.testing.assert_close(torch.cat(found, 1)[sample, kept], expected[0])


def test_left_padded_generation_equals_each_sample_alone(llama, reference):
    prompt, real = tokens(3, 80), torch.ones(3, 80, dtype=torch.int64)
    for sample, padding in enumerate((0, 10, 60)):
        real[sample, :padding] = 0
    found = llama.generate(prompt, attention_mask=real, max_new_tokens=60, do_sample=False)
    for sample, padding in enumerate((0, 10, 60)):
        assert_greedy(reference, found[sample : sample + 1, padding:], 80 - padding)


def test_padding_inside_later_chunks_is_not_stored(llama):
    plan = llama._moa_applied.plan
    first, second = tokens(2, 50), tokens(2, 30, seed=1)
    real = torch.ones(2, 80, dtype=torch.int64)
    real[0, 60:75] = 0
    real[1, :9] = 0
    cache = MoACache(llama.config, plan)
    run(llama, cache, first, real[:, :50])
    found = run(llama, cache, second, real)
    for sample in range(2):
        kept = real[sample].bool()
        alone = torch.cat([first, second], 1)[sample, kept][None]
        torch.testing.assert_close(found[sample, kept[50:]][-5:], logits(llama, alone)[0, -5:])
    assert cache.layers[0].lens.tolist() == [65, 71]


@pytest.mark.parametrize("seed", range(3))
def test_scattered_padding_in_many_chunks_equals_each_sample_alone(llama, reference, seed):
    sizes = [3, 200, 1, 40, 1, 1, 30]
    sequence = tokens(3, sum(sizes), seed)
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(3, len(sizes), generator=generator).repeat_interleave(torch.tensor(sizes), dim=1)
    real = (torch.rand(sequence.shape, generator=generator) < shares + 0.3).long()
    real[0, 1:3] = 0
    real[1, 203:245] = 0
    cache = MoACache(llama.config, llama._moa_applied.plan)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = zip(sequence.split(sizes, 1), ends, strict=True)
    found = torch.cat([run(llama, cache, part, real[:, :end]) for part, end in parts], 1)
    for sample, mask, mine in zip(sequence, real.bool(), found, strict=True):
        torch.testing.assert_close(mine[mask], logits(reference, sample[mask][None])[0])


@pytest.mark.parametrize("seed", range(5))
def test_prefill_in_any_chunks_equals_one_go(llama, reference, seed):
    generator = random.Random(seed)
    sequence = tokens(2, 260)
    cuts = sorted(generator.sample(range(1, 260), generator.choice([1, 3, 20, 100])))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, 260], strict=True)]
    cache = MoACache(llama.config, llama._moa_applied.plan)
    found = torch.cat([run(llama, cache, part) for part in sequence.split(sizes, 1)], 1)
    torch.testing.assert_close(found, logits(reference, sequence))


def test_turns_on_a_kept_cache_equal_a_whole_run(llama, reference):
    cache = MoACache(llama.config, llama._moa_applied.plan)
    sequence = tokens(1, 40)
    for turn in range(3):
        start = sequence.shape[1]
        sequence = llama.generate(sequence, max_new_tokens=25, do_sample=False, past_key_values=cache)
        assert_greedy(reference, sequence, start)
        sequence = torch.cat([sequence, tokens(1, 20, seed=turn + 1)], 1)


def test_a_prefix_cache_serves_several_continuations(llama, reference):
    prefix = tokens(1, 100)
    cache = MoACache(llama.config, llama._moa_applied.plan)
    run(llama, cache, prefix)
    for seed in (1, 2):
        sequence = torch.cat([prefix, tokens(1, 30, seed=seed)], 1)
        found = llama.generate(sequence, max_new_tokens=20, do_sample=False, past_key_values=copy.deepcopy(cache))
        assert_greedy(reference, found, 130)


@pytest.mark.parametrize("mode", [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beam_search_equals_that_under_explicit_masks(llama, reference, mode):
    prompt = tokens(2, 60)
    found = llama.generate(prompt, max_new_tokens=30, do_sample=False, **mode)
    expected = reference.generate(prompt, max_new_tokens=30, do_sample=False, use_cache=False, **mode)
    assert torch.equal(found, expected)


def test_sampled_sequences_equal_those_under_explicit_masks(llama, reference):
    prompt = tokens(2, 60)
    options = {"max_new_tokens": 20, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(1)
    found = llama.generate(prompt, **options)
    torch.manual_seed(1)
    assert torch.equal(found, reference.generate(prompt, use_cache=False, **options))


def test_generation_without_a_cache_is_the_same(llama, reference):
    found = llama.generate(tokens(1, 80), max_new_tokens=10, do_sample=False, use_cache=False)
    assert_greedy(reference, found, 80)


def test_chunked_prefill_of_generate_is_the_same(llama, reference):
    found = llama.generate(tokens(1, 100), max_new_tokens=10, do_sample=False, prefill_chunk_size=33)
    assert_greedy(reference, found, 100)


@pytest.mark.parametrize("drafts", [3, 40])
def test_assisted_decoding_rolls_back_and_stays_exact(llama, reference, drafts):
    assistant = tiny_model(num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = drafts
    assistant.generation_config.assistant_confidence_threshold = 0.0
    found = llama.generate(tokens(1, 90), max_new_tokens=60, do_sample=False, assistant_model=assistant)
    assert_greedy(reference, found, 90)


def test_prompt_lookup_decoding_stays_exact(llama, reference):
    prompt = tokens(1, 30).repeat(1, 3)
    found = llama.generate(prompt, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=10)
    assert_greedy(reference, found, 90)


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("length", [6, 20, 100, 203])
def test_crop_is_exact_or_refused(llama, reference, length, recording):
    plan = llama._moa_applied.plan
    sequence, other = tokens(1, length), tokens(1, 60, seed=1)
    allowed = 0
    for removed in range(1, length + 1):
        cache = MoACache(llama.config, plan)
        if recording:
            cache.activate_past_recording()
        run(llama, cache, sequence[:, : length // 2])
        run(llama, cache, sequence[:, length // 2 :])
        if not cropped(cache, removed):
            assert [layer.get_seq_length() for layer in cache.layers] == [length] * 3
            break
        allowed = removed
        assert cache.get_seq_length() == length - removed
        if removed % 7 == 1 or removed == length:
            whole = torch.cat([sequence[:, : length - removed], other], 1)
            found = [run(llama, cache, part) for part in other.split([1, 39, 20], 1)]
            expected = logits(reference, whole)[:, length - removed :]
            torch.testing.assert_close(torch.cat(found, 1), expected)
    if recording or length < 12:
        assert allowed == min(length, ROLLBACK_TOKENS)
    elif length > 100:
        assert allowed < length


def test_crop_refuses_exactly_when_a_needed_key_is_gone():
    rules = LayerRules((SpanRule(12, 0),), sink=4, block=8)  # a ring of eight
    for stored in range(30):
        for removed in range(1, stored):
            layer = MoACacheLayer(rules)
            states = torch.arange(stored, dtype=torch.float64).view(1, 1, -1, 1)
            layer.update(states, states)
            layer.commit(states, states, None)
            left = stored - removed
            held = {int(p) for p in layer.positions()[0] if p != EMPTY}
            needed = {p for p in range(left) if p < 4 or p > left - 8}
            if needed <= held:
                layer.crop(-removed)
                now = layer.positions()[0]
                assert {int(p) for p in now if p != EMPTY} == {p for p in held if p < left}
                assert torch.equal(layer.keys[0, now != EMPTY, 0], now[now != EMPTY].double())
            else:
                with pytest.raises(UnsupportedInputError, match="overwritten"):
                    layer.crop(-removed)


def test_crop_takes_a_length_to_keep_and_refuses_padding(llama):
    cache = MoACache(llama.config, llama._moa_applied.plan)
    cache.activate_past_recording()
    real = torch.ones(2, 20, dtype=torch.int64)
    real[1, 15:] = 0
    run(llama, cache, tokens(2, 20), real)
    with pytest.raises(UnsupportedInputError, match="padding"):
        cache.crop(-1)
    cache.crop(0)
    cache.crop(25)
    run(llama, cache, tokens(2, 3), torch.nn.functional.pad(real, (0, 3), value=1))
    cache.crop(torch.tensor(-1))
    cache.crop(20)
    assert cache.layers[0].lens.tolist() == [20, 15]
    cache.crop(-20)
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0


def test_slots_hold_the_positions_they_say_through_growth_and_rollback():
    rules = LayerRules(RULES, sink=4, block=8)
    generator = random.Random(0)
    for _ in range(30):
        layer, length = MoACacheLayer(rules), 0
        for _ in range(20):
            count = generator.choice([1, 1, 1, 5, 40])
            states = torch.arange(length, length + count, dtype=torch.float64)
            states = states.view(1, 1, -1, 1).expand(1, len(RULES), -1, 1)
            layer.update(states, states)
            layer.commit(states, states, None)
            length += count
            if generator.random() < 0.3:
                removed = generator.randrange(1, 6)
                if cropped(layer, removed):
                    length = max(length - removed, 0)
            if length == 0:
                continue
            positions = layer.positions()[0]
            for head, slots in enumerate(layer.slots(only_sink=False)):
                mine = positions[slots]
                held = mine[mine != EMPTY]
                assert len(set(held.tolist())) == len(held)
                assert torch.equal(layer.keys[0, slots, 0][mine != EMPTY], held.double()), head
                oldest = int(rules.head_spans.oldest_key(torch.tensor(length))[head])
                assert {*range(min(4, length)), *range(max(oldest, 0), length)} <= set(held.tolist())


def test_unused_slots_are_never_read(llama, reference):
    sequence = tokens(2, 150)
    cache = MoACache(llama.config, llama._moa_applied.plan)
    found = []
    for part in sequence.split([3, 20, 1, 76, *[1] * 50], 1):
        found.append(run(llama, cache, part))
        for layer in cache.layers:
            empty = layer.positions() == EMPTY
            for states in (layer.keys, layer.values):
                states[empty.expand(states.shape[:2])] = torch.nan
    torch.testing.assert_close(torch.cat(found, 1), logits(reference, sequence))


def test_samples_can_be_reordered_repeated_and_selected(llama, reference):
    prompt, following = tokens(3, 60), tokens(4, 40, seed=1)
    cache = MoACache(llama.config, llama._moa_applied.plan)
    run(llama, cache, prompt)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 3, 4]))
    found = run(llama, cache, following)
    whole = torch.cat([prompt[[2, 2, 0, 1]], following], 1)
    torch.testing.assert_close(found, logits(reference, whole)[:, 60:])


def test_reset_frees_the_memory_and_starts_over(llama, reference):
    cache = MoACache(llama.config, llama._moa_applied.plan)
    cache.reset()
    run(llama, cache, tokens(2, 60))
    assert cache.nbytes > 0
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)
    sequence = tokens(1, 70, seed=1)
    torch.testing.assert_close(run(llama, cache, sequence), logits(reference, sequence))


def test_native_sliding_windows_bound_the_cache():
    model = tiny_model("Mistral", sliding_window=24)
    plan = tiny_plan(model)
    cache = MoACache(model.config, plan)
    with applied(model, plan):
        run(model, cache, tokens(1, 200))
    assert max(slots.stop - slots.start for slots in cache.layers[1].slots(only_sink=False)) == 4 + 24


def test_the_cache_holds_no_gradient(llama):
    cache = MoACache(llama.config, llama._moa_applied.plan)
    loss = llama(tokens(1, 40), past_key_values=cache).logits.sum()
    assert loss.requires_grad
    assert not cache.layers[0].keys.requires_grad
    llama(tokens(1, 5), past_key_values=cache).logits.sum().backward()
