"""Records brought to a length: cut in the middle, or set among others."""

import numpy as np
import pytest

from moa_search.data.frames import chat_frame
from moa_search.data.loading import Record
from moa_search.errors import CalibrationError
from moa_search.tasks.items import Generator, NoMoreRecordsError
from moa_search.tasks.records import RecordTask


@pytest.fixture(scope="module")
def some(records):
    return [Record(f"doc{n}", row["context"], row["question"], (row["answer"],)) for n, row in enumerate(records)]


def make(tokenizer, records, frame=None):
    task = RecordTask(records, "source 'x'")
    return Generator(task, tokenizer, task.texts(tokenizer), frame)


def draw(maker, length, count=1, depth=0.5):
    rng = np.random.default_rng(0)
    return [maker.draw(length, depth, rng) for _ in range(count)]


def test_a_long_context_loses_its_middle(plain_tokenizer):
    context = "".join(f"{n:04}." for n in range(1000))
    maker = make(plain_tokenizer, [Record("doc", context, "Which?", ("this",))])
    (item,) = draw(maker, 500)
    sample = item.answered(item.reference)
    ending = "\n\nQuestion: Which?\nAnswer: this"
    kept = 500 - len(ending)
    text = plain_tokenizer.decode(sample.ids)
    assert sample.length == 500
    assert text == context[: (kept + 1) // 2] + context[-(kept // 2) :] + ending
    assert plain_tokenizer.decode(sample.answer) == " this"


def test_a_context_of_just_the_right_length_is_whole(plain_tokenizer):
    ending = "\n\nQuestion: Which?\nAnswer: this"
    context = "x" * (400 - len(ending))
    maker = make(plain_tokenizer, [Record("doc", context, "Which?", ("this",))])
    (item,) = draw(maker, 400)
    assert plain_tokenizer.decode(item.prompt) == context + ending.removesuffix(" this")


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_short_context_is_set_among_others(plain_tokenizer, some, depth):
    maker = make(plain_tokenizer, some)
    for item in draw(maker, 1500, 5, depth):
        text = plain_tokenizer.decode(item.prompt)
        own = next(record for record in some if record.document == item.document)
        assert item.answered(item.reference).length == 1500
        assert text.count(own.context) == 1
        start = text.index(own.context) - 2
        others = 1500 - len(own.context) - 4 - len(f"\n\nQuestion: {own.question}\nAnswer: {own.answers[0]}")
        assert start == round(depth * others)
        assert item.depth == pytest.approx((start + len(own.context) / 2 + 2) / (others + len(own.context) + 4))
        assert sum(record.context in text for record in some) > 5


def test_each_record_once_per_length_and_then_no_more(plain_tokenizer, some):
    maker = make(plain_tokenizer, some)
    rng = np.random.default_rng(0)
    questions = [maker.draw(1000, 0.5, rng).document for _ in some]
    assert len(set(questions)) == len(some)
    with pytest.raises(NoMoreRecordsError, match="source 'x' has no more than 40 records for 1000 tokens"):
        maker.draw(1000, 0.5, rng)
    assert maker.draw(1200, 0.5, rng).target_length == 1200


def test_records_that_do_not_fit_are_passed_over(plain_tokenizer):
    long = Record("long", "context", "Why? " * 60, ("a",))
    short = Record("short", "other " * 100, "Why?", ("a",))
    maker = make(plain_tokenizer, [long, short])
    assert draw(maker, 300)[0].document == "short"
    with pytest.raises(NoMoreRecordsError):
        draw(maker, 300, 2)


def test_too_few_other_contexts(plain_tokenizer):
    maker = make(plain_tokenizer, [Record("doc", "short", "Why?", ("a",))])
    with pytest.raises(CalibrationError, match=r"tokens of text are needed; the other contexts of source 'x' have 0"):
        draw(maker, 400)


def test_in_a_chat_the_answer_is_a_turn(chat_tokenizer, some):
    maker = make(chat_tokenizer, some, chat_frame(chat_tokenizer))
    (item,) = draw(maker, 800)
    text = chat_tokenizer.decode(item.answered(item.reference).ids)
    assert text.startswith("<s><turn>user\n")
    assert text.endswith(f"?<end>\n<turn>assistant\n{item.accepted[0].strip()}<end>")
    assert item.ends == "turn"
