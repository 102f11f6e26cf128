"""Samples as a model sees them: their length, their answer and where it is found."""

import re

import numpy as np
import pytest

from moa_search.data import SPLITS, hash_samples
from moa_search.data.texts import TextSource, documents
from moa_search.errors import CalibrationError, ConfigError
from moa_search.tasks import SOURCE_TASKS, build_samples
from moa_search.tasks.copying import CopyTask
from moa_search.tasks.items import Generator
from moa_search.tasks.needles import MultikeyTask, PasskeyTask


def build(tokenizer, **changes):
    return build_samples(tokenizer, **{"length": 700, "count": 6, "seed": 0, "split": "validation", **changes})


def sample_of(task, tokenizer, source, length, depth):
    item = Generator(task, tokenizer, source).draw(length, depth, np.random.default_rng(0))
    return item.answered(item.reference)


def places(ids, pattern):
    """Where ``pattern`` starts in ``ids``."""
    return [at for at in range(len(ids) - len(pattern) + 1) if (ids[at : at + len(pattern)] == pattern).all()]


@pytest.mark.parametrize("task", SOURCE_TASKS)
@pytest.mark.parametrize("length", [800, 913, 1024])
def test_exactly_the_length_asked_for(tokenizer, task, length):
    for sample in build(tokenizer, length=length, tasks=[task]):
        assert sample.length == len(sample.ids) == length
        assert sample.ids.dtype == np.int64
        assert sample.task == task
        assert sample.ids.tolist() == [*sample.prompt, *sample.answer]
        assert len(sample.answer) == sample.answer_tokens > 0


def test_a_start_token_stands_first_and_nowhere_else(tokenizer):
    start = tokenizer("")["input_ids"]
    for sample in build(tokenizer):
        assert sample.ids[: len(start)].tolist() == start
        assert not set(start) & set(sample.ids[len(start) :].tolist())


class TestPasskey:
    def test_the_key_is_hidden_once_and_asked_for_at_the_end(self, tokenizer):
        for sample in build(tokenizer, tasks=["passkey"]):
            prompt, answer = tokenizer.decode(sample.prompt), tokenizer.decode(sample.answer)
            key = int(answer)
            assert 10_000 <= key <= 99_999
            assert answer == f" {key}"
            assert prompt.endswith("\n\nWhat is the pass key? The pass key is")
            needle = f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
            assert prompt.count(needle) == 1
            assert prompt.count(str(key)) == 2  # both in the needle

    @pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
    def test_the_needle_stands_at_the_depth_asked_for(self, plain_tokenizer, depth):
        source = TextSource.library(plain_tokenizer, "test")
        sample = sample_of(PasskeyTask(), plain_tokenizer, source, 2000, depth)
        before, after = plain_tokenizer.decode(sample.prompt).split("\n\nThe pass key is")[:2]
        needle = "\n\nThe pass key is 12345. Remember it. 12345 is the pass key.\n\n"
        question_and_answer = "\n\nWhat is the pass key? The pass key is 12345"
        filler = 2000 - len(needle) - len(question_and_answer)
        assert len(before.encode()) == pytest.approx(depth * filler, abs=1)
        assert sample.depth == depth
        assert str(int(plain_tokenizer.decode(sample.answer))) in after

    def test_keys_differ_between_samples(self, plain_tokenizer):
        answers = {tuple(sample.answer) for sample in build(plain_tokenizer, tasks=["passkey"], count=8)}
        assert len(answers) == 8


class TestMultikey:
    def test_three_keys_are_told_apart_by_name(self, plain_tokenizer):
        for sample in build(plain_tokenizer, tasks=["multikey"], length=1000):
            prompt, answer = plain_tokenizer.decode(sample.prompt), plain_tokenizer.decode(sample.answer)
            told = dict(
                re.findall(
                    r"\n\nThe pass key of (\w+) is (\d{5})\. Remember it\. \2 is the pass key of \1\.\n\n", prompt
                )
            )
            assert len(told) == len(set(told.values())) == MultikeyTask.keys == 3
            (name,) = re.findall(r"\n\nWhat is the pass key of (\w+)\? The pass key of \1 is$", prompt)
            assert answer == f" {told[name]}"

    def test_the_depth_is_that_of_the_key_asked_for(self, plain_tokenizer):
        for sample in build(plain_tokenizer, tasks=["multikey"], length=3000):
            prompt, answer = plain_tokenizer.decode(sample.prompt), plain_tokenizer.decode(sample.answer)
            assert prompt.index(answer) / len(prompt) == pytest.approx(sample.depth, abs=0.1)


class TestQuestion:
    def test_the_fact_is_told_once_in_the_first_half_and_answers_the_question(self, plain_tokenizer):
        for sample in build(plain_tokenizer, tasks=["question"], length=1000, count=12):
            prompt, answer = plain_tokenizer.decode(sample.prompt), plain_tokenizer.decode(sample.answer)
            lead = prompt.rpartition("\nAnswer: ")[2]
            assert prompt.count(f"\n\n{lead}{answer}.\n\n") == 1
            assert prompt.index(lead) < 0.55 * len(prompt)
            assert sample.depth < 0.5
            assert re.search(r"\n\nQuestion: (Where|When|What|Who) [^\n]*\?\nAnswer: ", prompt)

    def test_facts_hardly_ever_repeat(self, plain_tokenizer):
        samples = build(plain_tokenizer, tasks=["question"], length=1000, count=40)
        asked = [plain_tokenizer.decode(sample.ids).rpartition("Question: ")[2] for sample in samples]
        assert len(set(asked)) >= 38
        assert len({question.split()[0] for question in asked}) == 4


class TestCopy:
    def test_the_answer_continues_the_only_earlier_place_of_the_cue(self, tokenizer):
        for sample in build(tokenizer, tasks=["copy"], count=10):
            cue = sample.prompt[-CopyTask.cue_tokens :]
            first, again = places(sample.prompt, cue)
            assert again == len(sample.prompt) - len(cue)
            assert sample.ids[first + len(cue) :][: sample.answer_tokens].tolist() == sample.answer.tolist()

    @pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
    def test_the_passage_stands_at_the_depth_asked_for(self, plain_tokenizer, depth):
        source = Made(lambda length: np.random.default_rng(0).integers(0, 200, length))
        sample = sample_of(CopyTask(), plain_tokenizer, source, 1000, depth)
        passage = CopyTask.cue_tokens + CopyTask.answer_tokens
        last = 1000 - len("\n\n") - 2 * passage
        assert places(sample.prompt, sample.prompt[-CopyTask.cue_tokens :])[0] == round(depth * last)
        assert sample.depth == pytest.approx(depth, abs=1 / last)

    def test_where_a_cue_is_not_unique_a_place_nearby_is_taken(self, plain_tokenizer):
        source = Made(lambda length: np.maximum(np.arange(length) - 400, 0) % 250)  # zeros up to 400
        sample = sample_of(CopyTask(), plain_tokenizer, source, 700, 0.6)
        (at, _) = places(sample.prompt, sample.prompt[-CopyTask.cue_tokens :])
        assert at > 392
        assert sample.depth == pytest.approx(at / (700 - 2 - 2 * 32), abs=1e-9)

    def test_a_text_without_a_unique_cue_is_refused(self, plain_tokenizer):
        source = Made(lambda length: np.zeros(length, dtype=np.int64))
        with pytest.raises(CalibrationError, match=r"no passage of made near depth [\d.]+ starts with a unique cue"):
            sample_of(CopyTask(), plain_tokenizer, source, 500, 0.5)


class Made:
    """A text source that gives what it is told to."""

    def __init__(self, tokens):
        self.tokens = tokens

    def cut(self, length, rng, without=None):
        return "made", self.tokens(length)


def test_tasks_take_turns_and_depths_are_spread_evenly(plain_tokenizer):
    samples = build(plain_tokenizer, count=10, length=1500)
    assert [sample.task for sample in samples] == ["passkey", "copy"] * 5
    depths = sorted(sample.depth for sample in samples if sample.task == "passkey")
    assert [int(depth * 5) for depth in depths] == [0, 1, 2, 3, 4]


def test_equal_arguments_give_equal_samples(plain_tokenizer):
    one, two = build(plain_tokenizer), build(plain_tokenizer)
    assert hash_samples(one) == hash_samples(two)
    assert [(s.depth, s.document) for s in one] == [(s.depth, s.document) for s in two]


@pytest.mark.parametrize("change", [{"seed": 1}, {"length": 701}, {"split": "test"}, {"tasks": ["copy"]}])
def test_other_arguments_give_other_samples(plain_tokenizer, change):
    assert hash_samples(build(plain_tokenizer)) != hash_samples(build(plain_tokenizer, **change))


@pytest.mark.parametrize("split", SPLITS)
def test_filler_comes_from_the_split(plain_tokenizer, split):
    texts = dict(documents(split))
    for sample in build(plain_tokenizer, split=split, tasks=["copy"], length=300):
        beginning = plain_tokenizer.decode(sample.ids[:60], clean_up_tokenization_spaces=False).strip("\ufffd")
        assert beginning in texts[sample.document]


def test_no_samples(plain_tokenizer):
    assert build(plain_tokenizer, count=0) == []


@pytest.mark.parametrize("task", SOURCE_TASKS)
def test_too_short(tokenizer, task):
    with pytest.raises(CalibrationError, match=f"{task} items can't be as short as 30 tokens"):
        build(tokenizer, tasks=[task], length=30)


def test_too_long(plain_tokenizer):
    size = sum(len(text.encode()) for _, text in documents("validation"))
    with pytest.raises(CalibrationError, match=f"validation texts have {size}"):
        build(plain_tokenizer, length=2 * size, count=1)


def test_unknown_task_suggests_the_nearest(plain_tokenizer):
    with pytest.raises(
        ConfigError, match=r"'pasky' is unknown \(did you mean 'passkey'\?\); choose from passkey, copy"
    ):
        build(plain_tokenizer, tasks=["copy", "pasky"])


def test_no_task(plain_tokenizer):
    with pytest.raises(ConfigError, match="no task is named"):
        build(plain_tokenizer, tasks=[])


def test_negative_seed(plain_tokenizer):
    with pytest.raises(ConfigError, match="seed is -1"):
        build(plain_tokenizer, seed=-1)
