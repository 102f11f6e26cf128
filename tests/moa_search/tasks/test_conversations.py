"""Conversations brought to a length, with the last or all answers supervised."""

import json
import random

import numpy as np
import pytest
import torch

from moa_search.calibration import calibrate
from moa_search.data import hash_samples, load_samples, save_samples
from moa_search.data.conversations import Conversation
from moa_search.data.frames import chat_frame
from moa_search.errors import CalibrationError, ConfigError
from moa_search.evaluation.scoring import score_answer
from moa_search.profiling.measure import answer_loss
from moa_search.tasks.conversations import ConversationTask
from moa_search.tasks.items import Generator, NoMoreRecordsError

WORDS = ["river", "stone", "lamp", "garden", "winter", "market", "bread", "candle"]


def said(*seed, words=12):
    return " ".join(random.Random(str(seed)).choices(WORDS, k=words))


def conversation(n, exchanges=2, system=True, words=12):
    messages = [("system", "Be kind.")] if system else []
    for turn in range(exchanges):
        messages.append(("user", f"ask {n}.{turn} {said(n, turn)}"))
        messages.append(("assistant", f"tell {n}.{turn} {said(turn, n, words=words)}"))
    return Conversation(f"doc{n}", tuple(messages[:-1]), messages[-1][1])


SOME = [conversation(n) for n in range(30)]


def make(tokenizer, conversations=SOME, *, chat=True, **options):
    task = ConversationTask(conversations, "source 'x'", **options)
    return Generator(task, tokenizer, task.texts(tokenizer), chat_frame(tokenizer) if chat else None)


def draw(maker, length):
    item = maker.draw(length, 0.5, np.random.default_rng(0))
    return item, item.answered(item.reference)


def own_of(item):
    return next(one for one in SOME if one.document == item.document)


@pytest.mark.parametrize("every_turn", [False, True])
@pytest.mark.parametrize("length", [700, 1501])
def test_in_a_chat_the_turns_are_the_template_s(chat_tokenizer, length, every_turn):
    item, sample = draw(make(chat_tokenizer, every_turn=every_turn), length)
    own = own_of(item)
    text = chat_tokenizer.decode(sample.ids)
    assert sample.length == length
    assert text.startswith("<s><turn>system\nBe kind.<end>\n<turn>user\n")
    assert text.endswith(
        f"{own.messages[1][1]}<end>\n<turn>assistant\n{own.messages[2][1]}<end>\n<turn>user\n{own.messages[3][1]}<end>\n"
        f"<turn>assistant\n{own.answer}<end>"
    )
    assert text.count("<turn>") == 5
    counted = sample.answer if sample.supervised is None else sample.answer[sample.supervised]
    answers = f"{own.messages[2][1]}<end>{own.answer}<end>" if every_turn else f"{own.answer}<end>"
    assert chat_tokenizer.decode(counted) == answers
    before = text.split(own.messages[1][1])[0]
    assert round(item.depth * length) == len(chat_tokenizer(before, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("every_turn", [False, True])
def test_in_plain_text_the_speakers_are_named(chat_tokenizer, every_turn):
    item, sample = draw(make(chat_tokenizer, chat=False, every_turn=every_turn), 900)
    own = own_of(item)
    text = chat_tokenizer.decode(sample.ids)
    assert sample.length == 900
    assert text.startswith("<s>System: Be kind.\n\nUser: ")
    first, told, second = (text for _, text in own.messages[1:])
    assert text.endswith(f"{first}\n\nAssistant: {told}\n\nUser: {second}\n\nAssistant: {own.answer}")
    counted = sample.answer if sample.supervised is None else sample.answer[sample.supervised]
    answers = f" {own.messages[2][1]} {own.answer}" if every_turn else f" {own.answer}"
    assert chat_tokenizer.decode(counted) == answers


def test_one_that_is_too_long_loses_its_oldest_exchanges(chat_tokenizer):
    long = conversation(0, exchanges=12)
    maker, rng = make(chat_tokenizer, [long, *SOME[1:]]), np.random.default_rng(0)
    item = next(item for item in (maker.draw(900, 0.5, rng) for _ in SOME) if item.document == "doc0")
    sample = item.answered(item.reference)
    text = chat_tokenizer.decode(sample.ids)
    assert sample.length == 900
    assert "Be kind." in text
    assert "ask 0.0" not in text
    assert text.count("<turn>user") < 12
    assert text.endswith(f"{long.messages[-1][1]}<end>\n<turn>assistant\n{long.answer}<end>")


def test_a_request_that_is_too_long_loses_its_middle(chat_tokenizer):
    request = "start " + "x" * 3000 + " finish"
    maker = make(chat_tokenizer, [Conversation("doc", (("user", request),), "yes")])
    text = chat_tokenizer.decode(draw(maker, 500)[1].ids)
    assert text.startswith("<s><turn>user\nstart xx")
    assert text.endswith("xx finish<end>\n<turn>assistant\nyes<end>")
    assert len(text.encode()) > 500


def test_each_once_and_long_answers_are_passed_over(chat_tokenizer):
    maker = make(chat_tokenizer, [*SOME[:3], Conversation("long", (("user", "why"),), "because " * 100)])
    rng = np.random.default_rng(0)
    assert {maker.draw(600, 0.5, rng).document for _ in range(3)} == {"doc0", "doc1", "doc2"}
    with pytest.raises(NoMoreRecordsError, match="source 'x' has no more than 4 conversations for 600 tokens"):
        maker.draw(600, 0.5, rng)


def test_a_template_that_takes_no_system_prompt_is_named(with_template):
    refusing = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = "{% for m in messages %}" + refusing + "{{ m.content }}{% endfor %}"
    with pytest.raises(CalibrationError, match=r"can't be rendered \(no system\); use chat 'never'"):
        draw(make(with_template(template)), 700)


def test_a_template_that_drops_earlier_turns_is_named(with_template):
    with pytest.raises(CalibrationError, match="doesn't give every message once and in order"):
        draw(make(with_template("{{ messages[-1].content }}")), 700)


@pytest.fixture
def file(tmp_path):
    said = [(*one.messages, ("assistant", one.answer)) for one in SOME]
    rows = [{"messages": [{"role": role, "content": text} for role, text in messages]} for messages in said]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "chats.jsonl")


def test_the_model_s_own_answer_is_right_whatever_it_says(chat_tokenizer, scripted, file):
    model = scripted(chat_tokenizer, lambda prompt: "As I see it.<end>")
    made = calibrate(model, chat_tokenizer, sources=[file], lengths=[900], samples=3, max_answer_tokens=40)
    for sample in made.samples:
        assert chat_tokenizer.decode(sample.answer) == "As I see it.<end>"
        assert len(sample.prompt) == 860
    with pytest.raises(ConfigError, match="turns=all supervises the data's own answers; take --answers dataset"):
        calibrate(model, chat_tokenizer, sources=[f"{file}?turns=all"], lengths=[900], samples=3)


def test_supervised_tokens_alone_make_the_loss_and_the_score(tiny_model, file):
    model, tokenizer = tiny_model
    (sample,) = calibrate(
        None, tokenizer, sources=[f"{file}?turns=all"], lengths=[800], samples=1, answers="dataset"
    ).samples
    with torch.no_grad():
        logits = model(torch.from_numpy(sample.ids)[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(sample.ids[1:]), reduction="none")
    wanted = losses[-sample.answer_tokens :][torch.from_numpy(sample.supervised)]
    assert 0 < len(wanted) < sample.answer_tokens
    assert answer_loss(model, sample).item() == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert score_answer(model, sample).nll == pytest.approx(wanted.mean().item(), rel=1e-5)


def test_what_is_supervised_is_saved_and_hashed(plain_tokenizer, file, tmp_path):
    options = {"lengths": [800], "samples": 3, "answers": "dataset"}
    every = calibrate(None, plain_tokenizer, sources=[f"{file}?turns=all"], **options).samples
    last = calibrate(None, plain_tokenizer, sources=[file], **options).samples
    assert [s.ids.tolist() for s in every] == [s.ids.tolist() for s in last]
    assert hash_samples(every) != hash_samples(last)
    save_samples([*every, *last], tmp_path / "saved", plain_tokenizer, split="calibration")
    read = load_samples(tmp_path / "saved", plain_tokenizer).samples
    assert hash_samples(read) == hash_samples([*every, *last])
    assert [s.supervised is None for s in read] == [False] * 3 + [True] * 3
    assert read[0].supervised.tolist() == every[0].supervised.tolist()
