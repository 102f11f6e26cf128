"""Greedy answers and their judging."""

import dataclasses

import numpy as np
import pytest

from moa_search.calibration.answers import answering, greedy_answer, right_part, stop_tokens
from moa_search.data.frames import chat_frame, plain_frame
from moa_search.modeling.loading import load_model
from moa_search.tasks.items import Item

NOTHING = np.empty(0, np.int64)


def ids(tokenizer, text):
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


def item(tokenizer, accepted=(), *, ends="line", exact=False, reference="", room=40):
    prompt = ids(tokenizer, "A question?")
    return Item(prompt, ids(tokenizer, reference), accepted, ends, exact, "records", 0.5, "", len(prompt) + room)


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        (" Paris", ("Paris",), True),
        ("It is in paris, the city.", (" Paris",), True),
        ("In The  United Nations!", ("united nations",), True),
        ("Parisian", ("Paris",), False),
        (" 812345", (" 12345",), False),
        ("it is 12345.", (" 12345",), True),
        ("London", ("Paris", "London"), True),
        ("London", ("Paris",), False),
        ("在北京市", ("北京",), True),
        ("a + b", ("+",), True),
        ("a - b", ("+",), False),
        ("anything", (), True),
        (" \n", (), False),
        ("the red bird flew over our old house", ("a red bird flew over the green house",), True),
        ("some bird", ("a red bird flew over the green house",), False),
        ("red bird house", ("bird house",), True),
        ("house of a bird", ("bird house",), False),
    ],
)
def test_right_answers(plain_tokenizer, answer, accepted, right):
    tokens = ids(plain_tokenizer, answer)
    found = right_part(plain_tokenizer, item(plain_tokenizer, accepted), tokens)
    assert (found is not None) == right
    assert found is None or found.tolist() == tokens.tolist()


def test_other_words_are_no_answer_where_the_answer_has_a_fixed_length(plain_tokenizer):
    asked = item(plain_tokenizer, ("a red bird flew over the green house",), ends="reference")
    assert right_part(plain_tokenizer, asked, ids(plain_tokenizer, "the red bird flew over our old house")) is None


@pytest.mark.parametrize(("answer", "right"), [("abcdefgh", 8), ("abcdefxx", 6), ("abcdxxxx", 4), ("abcxefgh", None)])
def test_a_copy_counts_as_far_as_it_is_right(plain_tokenizer, answer, right):
    asked = item(plain_tokenizer, exact=True, reference="abcdefgh")
    found = right_part(plain_tokenizer, asked, ids(plain_tokenizer, answer))
    assert (None if found is None else len(found)) == right


@pytest.mark.parametrize(
    ("ends", "says", "answer"),
    [
        ("line", " Paris\nQuestion:", " Paris"),
        ("line", "\n Paris\nQuestion:", "\n Paris"),
        ("line", " Paris<end> more", " Paris"),
        ("turn", "It is\nParis.<end>more", "It is\nParis.<end>"),
        ("turn", "x" * 60, "x" * 40),
        ("reference", "1\n2<end>" + "x" * 60, "1\n2<end>" + "x" * 36),
    ],
)
def test_where_an_answer_ends(chat_tokenizer, scripted, ends, says, answer):
    model = scripted(chat_tokenizer, lambda prompt: says)
    stops = stop_tokens(model, chat_tokenizer, chat_frame(chat_tokenizer))
    with answering(model):
        given = greedy_answer(model, chat_tokenizer, item(chat_tokenizer, ends=ends), stops)
    assert chat_tokenizer.decode(given) == answer


def test_every_end_that_model_tokenizer_and_template_know(chat_tokenizer, scripted):
    model = scripted(chat_tokenizer, lambda prompt: "")
    end = chat_tokenizer.convert_tokens_to_ids("<end>")
    assert stop_tokens(model, chat_tokenizer, plain_frame(chat_tokenizer)) == [end]
    model.generation_config = dataclasses.make_dataclass("Config", ["eos_token_id"])([7, end])
    assert stop_tokens(model, chat_tokenizer, chat_frame(chat_tokenizer)) == [7, end]


def test_a_real_model_answers_greedily_and_stays_as_it_was(tiny_model_dir):
    model, tokenizer = load_model(str(tiny_model_dir), dtype="float32", device="cpu")
    model.generation_config.temperature = 0.3
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 9.0
    model.train()
    before = model.generation_config
    asked = item(tokenizer, ends="reference", room=6)
    with answering(model):
        answer = greedy_answer(model, tokenizer, asked, [])
        whole = np.concatenate([asked.prompt, answer])
        import torch

        logits = model(torch.from_numpy(whole)[None]).logits[0]
    assert logits[len(asked.prompt) - 1 : -1].argmax(-1).tolist() == answer.tolist()
    assert len(answer) == 6
    assert model.training
    assert model.generation_config is before


def test_an_error_while_answering_leaves_the_model_as_it_was(plain_tokenizer, scripted):
    def fail(prompt):
        raise KeyboardInterrupt

    model = scripted(plain_tokenizer, fail)
    before = model.generation_config
    with pytest.raises(KeyboardInterrupt), answering(model):
        greedy_answer(model, plain_tokenizer, item(plain_tokenizer), [])
    assert model.training
    assert model.generation_config is before


def test_where_the_reference_is_greedy_one_forward_pass_tells(tiny_model_dir, monkeypatch):
    model, tokenizer = load_model(str(tiny_model_dir), dtype="float32", device="cpu")
    asked = item(tokenizer, ends="reference", room=6)
    with answering(model):
        greedy = greedy_answer(model, tokenizer, asked, [])
    known = dataclasses.replace(asked, reference=greedy)
    astray = dataclasses.replace(asked, reference=np.where(np.arange(6) == 4, greedy + 1, greedy), exact=True)
    monkeypatch.setattr(type(model), "generate", lambda *args, **kwargs: pytest.fail("tokens were generated"))
    with answering(model):
        assert greedy_answer(model, tokenizer, known, []).tolist() == greedy.tolist()
        assert greedy_answer(model, tokenizer, astray, []).tolist() == greedy[:4].tolist()
    with answering(model), pytest.raises(pytest.fail.Exception):
        greedy_answer(model, tokenizer, dataclasses.replace(astray, exact=False), [])
