"""What else `generate` can do, under a plan: as under explicit masks without a cache."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessorList, pipeline
from transformers.generation.streamers import BaseStreamer

from moa_search.errors import UnsupportedInputError
from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, applied, apply_plan
from moa_search.spans import SpanRule

from .explicit import explicit, logits, tiny_model, tiny_plan, tokens

GREEDY = {"max_new_tokens": 40, "do_sample": False}
KINDS = {"Llama": {}, "Gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}}


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """A model under a plan, and its reference."""
    model = tiny_model(request.param, **KINDS[request.param])
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    return apply_plan(model, plan), reference


def assert_greedy(reference, sequence, start):
    """Each token from ``start`` on is the one that a whole forward pass of the reference picks."""
    assert torch.equal(sequence[:, start:], logits(reference, sequence)[:, start - 1 : -1].argmax(-1))


def test_a_cache_by_another_name_is_an_error(pair, monkeypatch):
    """As transformers 5.24 had it for those who knew 5.23: a dense cache under a plan, without a word."""
    monkeypatch.setattr("moa_search.runtime.hooks.cache_name", lambda: "memory")
    with pytest.raises(UnsupportedInputError, match="doesn't know; upgrade it, or take an older transformers"):
        pair[0].generate(tokens(1, 20), **GREEDY)


@pytest.mark.parametrize("plans", ["its own", "none"])
def test_an_assistant_drafts(pair, plans):
    model, reference = pair
    assistant = tiny_model(num_hidden_layers=1)
    if plans == "its own":
        apply_plan(assistant, tiny_plan(assistant, shift=2))
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assert_greedy(reference, model.generate(tokens(1, 90), assistant_model=assistant, **GREEDY), 90)


def test_the_first_layers_draft(pair):
    model, reference = pair
    for _ in range(2):
        assert_greedy(reference, model.generate(tokens(1, 90), assistant_early_exit=1, **GREEDY), 90)
    assert len(model.generate(tokens(1, 20), return_dict_in_generate=True, **GREEDY).past_key_values.layers) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [9, 11]]},
        {"guidance_scale": 1.5},
        {"num_beams": 3, "do_sample": True, "temperature": 2.0},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": 5},
        {"do_sample": True, "typical_p": 0.9, "min_p": 0.01, "temperature": 3.0, "num_return_sequences": 3},
        {"eos_token_id": [5, 17, 23, 42]},
        {"watermarking_config": {"bias": 4.0, "seeding_scheme": "selfhash", "context_width": 2}},
    ],
    ids=lambda options: "-".join(options),
)
def test_processors_and_modes(pair, options):
    model, reference = pair
    results = []
    for each, cached in ((model, True), (reference, False)):
        torch.manual_seed(3)
        results.append(each.generate(tokens(2, 50), **{"use_cache": cached, **GREEDY, **options}))
    assert torch.equal(*results)


def test_what_it_returns_beside_the_tokens(pair):
    model, reference = pair
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    found = model.generate(tokens(2, 50), **options)
    expected = reference.generate(tokens(2, 50), use_cache=False, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine[-1][:, -1], theirs[-1][:, -1])
    following = torch.cat([found.sequences, tokens(2, 15, seed=1)], 1)
    assert type(found.past_key_values) is MoACache
    real = torch.ones_like(following)  # or else transformers takes token 0 for padding
    again = model.generate(following, attention_mask=real, past_key_values=found.past_key_values, **GREEDY)
    assert_greedy(reference, again, 105)


def test_embeddings_in_place_of_tokens(pair):
    model, _ = pair
    embeddings = model.get_input_embeddings()(tokens(2, 60))
    assert torch.equal(
        model.generate(inputs_embeds=embeddings, **GREEDY), model.generate(tokens(2, 60), **GREEDY)[:, 60:]
    )


@torch.no_grad()
def test_a_loop_without_generate(pair):
    model, reference = pair
    sequence = tokens(2, 60)
    held = model(sequence, None).past_key_values
    assert type(held) is MoACache
    assert model(sequence, use_cache=False).past_key_values is None
    for turn in range(30):
        part = tokens(2, 1, seed=turn)
        sequence = torch.cat([sequence, part], 1)
        out = model(part, past_key_values=held)
        assert out.past_key_values is held
    torch.testing.assert_close(out.logits, logits(reference, sequence)[:, -1:])


def test_a_streamer_gets_every_token_in_turn(pair):
    model, _ = pair

    class Collected(BaseStreamer):
        def __init__(self):
            self.parts = []

        def put(self, value):
            self.parts.append(value.reshape(-1))

        def end(self):
            self.parts.append(torch.tensor([-1]))

    streamer = Collected()
    found = model.generate(tokens(1, 60), streamer=streamer, **GREEDY)
    assert len(streamer.parts) == 1 + 40 + 1
    assert torch.equal(torch.cat(streamer.parts), torch.cat([found[0], torch.tensor([-1])]))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_prompts_about_as_long_as_the_sink(pair, length):
    model, reference = pair
    assert_greedy(reference, model.generate(tokens(2, length), **GREEDY), length)


def test_no_prompt_at_all(pair):
    model, reference = pair
    found = model.generate(bos_token_id=1, **GREEDY)
    assert_greedy(reference, found, 1)


def test_a_batch_of_one_token_and_of_two_hundred(pair):
    model, reference = pair
    lengths = [200, 1, 3, 90, 17]
    prompt, real = tokens(5, 200), torch.zeros(5, 200, dtype=torch.int64)
    for sample, length in enumerate(lengths):
        real[sample, 200 - length :] = 1
    found = model.generate(prompt, attention_mask=real, **GREEDY)
    for sample, length in enumerate(lengths):
        assert_greedy(reference, found[sample : sample + 1, 200 - length :], length)


@pytest.mark.parametrize("implementation", ["dynamic", None])
def test_naming_the_default_cache_is_no_harm(pair, implementation):
    model, reference = pair
    found = model.generate(tokens(1, 60), cache_implementation=implementation, return_dict_in_generate=True, **GREEDY)
    assert type(found.past_key_values) is MoACache
    assert_greedy(reference, found.sequences, 60)


def test_a_generation_config_of_the_callers_stays_as_it_is(pair):
    model, reference = pair
    config = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=0)
    before = config.to_dict()
    for _ in range(2):
        assert_greedy(reference, model.generate(tokens(1, 60), generation_config=config), 60)
    assert config.to_dict() == before


@pytest.fixture(scope="module")
def writer(tiny_model_dir):
    """A tokenizer and its model under a plan."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir, pad_token="!", padding_side="left")
    model.generation_config.update(pad_token_id=tokenizer.pad_token_id, eos_token_id=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return tokenizer, apply_plan(model, tiny_plan(model))


def test_a_stop_string_ends_it(writer):
    tokenizer, model = writer
    prompt = tokenizer("Once upon a time, when heads were short,", return_tensors="pt")
    whole = model.generate(**prompt, **GREEDY)[0]
    new = [tokenizer.decode(token) for token in whole[prompt.input_ids.shape[1] :]]
    stop = next(text for text in new[5:] if text.isascii())
    stopped = model.generate(**prompt, stop_strings=[stop], tokenizer=tokenizer, **GREEDY)[0]
    assert torch.equal(stopped, whole[: prompt.input_ids.shape[1] + new.index(stop) + 1])
    assert len(stopped) < len(whole)


def test_a_pipeline(writer):
    tokenizer, model = writer
    texts = ["A head that looks far away and remembers the beginning", "b", "Quick brown foxes"]
    options = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
    batched = pipeline("text-generation", model=model, tokenizer=tokenizer)(texts, batch_size=3, **options)
    for text, [found] in zip(texts, batched, strict=True):
        prompt = tokenizer(text, return_tensors="pt")
        alone = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt.input_ids.shape[1] :]
        assert found["generated_text"] == tokenizer.decode(alone, skip_special_tokens=True)


@pytest.mark.slow
def test_a_session_grows_from_ten_tokens_to_eight_thousand():
    model = tiny_model(num_hidden_layers=2, max_position_embeddings=10_000)
    plan = tiny_plan(model)
    sequence = tokens(1, 10)
    cache = MoACache(model.config, plan)
    with applied(model, plan):
        for turn, more in enumerate((50, 300, 1500, 2000, 4100, 1)):
            start = sequence.shape[1]
            options = {"attention_mask": torch.ones_like(sequence), "max_new_tokens": 4, "do_sample": False}
            sequence = model.generate(sequence, past_key_values=cache, **options)
            whole = logits(model, sequence)  # without a cache, whose equality to explicit masks is shown elsewhere
            assert torch.equal(sequence[:, start:], whole[:, start - 1 : -1].argmax(-1))
            length = cache.get_seq_length()
            kept = plan.kv_bytes(length, bytes_per_element=8)
            assert kept <= cache.nbytes <= kept + 4 * plan.block * 2 * 16 * 8
            sequence = torch.cat([sequence, tokens(1, more, seed=turn + 1)], 1)
    assert cache.get_seq_length() > 7900


@pytest.mark.slow
def test_ten_thousand_tokens_in_one_go_keep_the_memory_flat_where_the_plan_is_flat():
    model = tiny_model(num_hidden_layers=1, max_position_embeddings=11_000)
    signature = ModelSignature.of(model.config)
    plan = Plan.from_rules([[SpanRule(12, 0), SpanRule(70, 0)]], signature, sink=4, block=8)
    reference = apply_plan(tiny_model(num_hidden_layers=1, max_position_embeddings=11_000), plan)
    cache, sizes = MoACache(model.config, plan), []

    def measure(ids, scores):
        sizes.append((ids.shape[1], cache.nbytes, cache.layers[0].keys.untyped_storage().nbytes()))
        return scores

    prompt = tokens(1, 5)
    with applied(model, plan):
        found = model.generate(
            prompt,
            past_key_values=cache,
            max_new_tokens=10_000,
            do_sample=False,
            logits_processor=LogitsProcessorList([measure]),
        )
    assert found.shape[1] == 10_005
    assert_greedy(reference, found, 5)
    settled = {tuple(rest) for length, *rest in sizes if length > 70 + plan.block}
    assert len(settled) == 1, "the rings have wrapped more than a hundred times"
    [(held, _)] = settled
    assert held == (12 + 70) * 2 * 16 * 8
