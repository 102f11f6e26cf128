"""RULER's tasks: made by its recipe, read from files, scored by its string match."""

import copy
import json
import re

import numpy as np
import pytest

from moa_search.data.texts import documents
from moa_search.errors import CalibrationError, ConfigError
from moa_search.tasks import require_tasks
from moa_search.tasks.ruler import RECIPES
from moa_search.tasks.ruler.recipes import Texts, fitted
from moa_search.tasks.ruler.records import RulerRecord, read_records, string_match, written

LENGTH = 3000


@pytest.fixture(scope="module")
def texts():
    return Texts(documents("test"))


def letters(record):
    return len(record.context + record.question + record.answer_prefix)


def made(name, texts, seed=0, length=LENGTH):
    return fitted(RECIPES[name], texts, length, [seed], letters)


def test_the_thirteen_are_there():
    assert len(RECIPES) == 13
    assert [task.name for task in require_tasks(["ruler"])] == [f"ruler:{name}" for name in RECIPES]


@pytest.mark.parametrize("name", RECIPES)
def test_a_record_fills_its_length_and_changes_with_the_seed(name, texts):
    record = made(name, texts)
    assert 0.7 * LENGTH < letters(record) <= LENGTH
    assert record == made(name, texts)
    assert record.context != made(name, texts, seed=1).context
    assert record.question + record.answer_prefix
    longer = made(name, texts, length=3 * LENGTH)
    assert letters(longer) > LENGTH
    if name not in ("cwe", "fwe"):
        assert longer.answer == record.answer, "the same question in more text"


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("cwe", "fwe")])
def test_the_answer_stands_in_the_context_and_not_in_the_question(name, texts):
    for seed in range(3):
        record = made(name, texts, seed)
        for text in record.answer:
            assert text in record.context
            assert text not in record.question + record.answer_prefix


@pytest.mark.parametrize(
    ("name", "asked", "answers", "hidden"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 1, 1, 4),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_needles_are_as_many_as_ruler_has(name, asked, answers, hidden, texts):
    record = made(name, texts)
    needles = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", record.context)
    assert len(needles) == hidden
    assert len(record.answer) == answers
    keys = {key for key, value in needles if value in record.answer}
    assert len(keys) == asked
    assert all(key in record.question and key in record.answer_prefix for key in keys)


def test_a_haystack_of_needles_has_one_value_for_the_key_asked_for(texts):
    record = made("niah_multikey_3", texts)
    needles = dict(re.findall(r"special magic uuids for (\S+) is: (\S+)\.", record.context))
    assert len(needles) > 10
    (key,) = [key for key in needles if key in record.question]
    assert record.answer == (needles[key],)


def test_a_chain_can_be_followed_in_order(texts):
    record = made("vt", texts)
    example, asked = record.context.split("\n\nMemorize")
    known = {re.search(r"the value (\d+)", record.question)[1]}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", asked):
        assert source in known
        known.add(name)
    assert set(record.answer) < known
    assert len(record.answer) == 5
    assert not known & set(re.findall(r"\w+", example)), "the worked example has a chain of its own"


@pytest.mark.parametrize("name", ["vt", "cwe"])
@pytest.mark.parametrize("length", [LENGTH, 10_000])
def test_a_worked_example_shows_how_to_answer(name, length, texts):
    record = made(name, texts, length=length)
    example = record.context[: record.context.rindex(record.context[:20])]
    assert example.count(record.answer_prefix.split(":")[0]) == 1
    question, shown = example.rstrip().split("Question: ")
    answer = shown.rpartition(":")[2]
    form = r"( [A-Z]{3}){5}" if name == "vt" else " " + " ".join(rf"{number}\. (\w+)" for number in range(1, 11))
    match = re.fullmatch(form, answer)
    assert match, answer
    if name == "vt":
        assert re.findall(r"VAR (\w+) =", question) == answer.split()
    else:
        words = re.findall(r"\d+\. (\w+)", question)
        assert {words.count(word) for word in match.groups()} == {3 if length < 4096 else 10}
        assert {words.count(word) for word in set(words) - set(match.groups())} == {1 if length < 4096 else 3}
    assert re.fullmatch(form.replace("{3}", "{5}"), written(record)), "the reference has the form of the example"


@pytest.mark.parametrize(("name", "count"), [("cwe", 10), ("fwe", 3)])
def test_the_words_asked_for_stand_most_often(name, count, texts):
    for length in (LENGTH, 10_000):
        record = made(name, texts, length=length)
        if name == "fwe":
            words = record.context.partition(" coded words. ")[2].split()
            assert words.count("...") > len(words) / 2
        else:
            words = re.findall(r"\d+\. (\w+)", record.context.rpartition("Below")[2])
        words = [word for word in words if word != "..."]
        counts = {word: words.count(word) for word in set(words)}
        least = min(counts[word] for word in record.answer)
        assert len(record.answer) == count
        assert all(times < least for word, times in counts.items() if word not in record.answer)


def test_two_hops_take_two_documents(texts):
    record = made("qa_2", texts)
    thing = re.search(r"the old (\w+) live", record.question)[1]
    name = re.search(rf"The owner of the old {thing} is (\w+)\.", record.context)[1]
    assert f"{name} lives in the city of {record.answer[0]}." in record.context


def test_items_have_room_for_the_longest_answer(tiny_model):
    for task in require_tasks(["ruler:vt", "ruler:cwe"]):
        (sample,) = task.held_out(tiny_model[1], length=LENGTH, count=1, seed=0)
        assert len(sample.prompt) + max(sample.room, sample.answer_tokens) <= LENGTH
        assert tiny_model[1].decode(sample.prompt[-sample.question_tokens :]).startswith("Question:")
        assert task.metric_of("generated") == "string match"


def test_no_two_tasks_or_items_ask_for_the_same_numbers(tiny_model):
    tasks = require_tasks(
        ["ruler:niah_single_1", "ruler:niah_single_2", "ruler:niah_multikey_2", "ruler:niah_multiquery"]
    )
    drawn = [sample for task in tasks for sample in task.held_out(tiny_model[1], length=LENGTH, count=2, seed=0)]
    asked = [text for sample in drawn for text in tiny_model[1].decode(sample.answer).strip().split(", ")]
    assert len(asked) == len(set(asked)) == 2 * (3 + 4)


def test_answers_are_scored_by_the_texts_they_hold(tiny_model):
    tokenizer = tiny_model[1]
    (sample,) = require_tasks(["ruler:niah_multivalue"])[0].held_out(tokenizer, length=LENGTH, count=1, seed=0)
    values = tokenizer.decode(sample.answer).strip().split(", ")
    given = np.array(tokenizer(f" it is {values[2]} and {values[0]}, I think")["input_ids"])
    assert sample.grade(given) == 0.5
    assert sample.grade(sample.answer) == 1


def test_what_follows_the_end_of_an_answer_is_none_of_it(tiny_model):
    tokenizer = copy.deepcopy(tiny_model[1])
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    (sample,) = require_tasks(["ruler:qa_1"])[0].held_out(tokenizer, length=LENGTH, count=1, seed=0)
    ended = np.array([*tokenizer(" no")["input_ids"], tokenizer.eos_token_id])
    assert sample.grade(np.concatenate([ended, sample.answer])) == 0
    assert sample.grade(np.concatenate([sample.answer, ended])) == 1


@pytest.mark.parametrize(
    ("task", "given", "score"),
    [("vt", "ABC and x", 0.5), ("vt", "abc DEF", 1), ("qa_1", "def!", 1), ("qa_2", "none", 0)],
)
def test_string_match_is_ruler_s(task, given, score):
    assert string_match(task, ["abc", "DEF"], given) == score


ROWS = [
    RulerRecord("The sky is red.\n", "Which colour?", " It is", ("red",), 8, "qa_1").row(),
    RulerRecord("VAR A = 1\n", "Which?", " They are", ("A", "B"), 8, "vt").row(),
]


class TestFiles:
    @pytest.fixture
    def write(self, tmp_path):
        def written(rows, name="ruler.jsonl"):
            path = tmp_path / name
            path.write_text("\n".join(map(json.dumps, rows)))
            return path

        return written

    def test_parquet_and_json_lines_are_read_alike(self, write, tmp_path):
        import pandas as pd

        pd.DataFrame(ROWS).to_parquet(tmp_path / "ruler.parquet")
        assert read_records(write(ROWS)) == read_records(tmp_path / "ruler.parquet")
        assert [record.row() for record in read_records(tmp_path / "ruler.parquet")] == ROWS

    def test_records_of_one_task_become_items(self, write, tiny_model):
        (task,) = require_tasks([f"ruler:{write(ROWS)}?task=vt"])
        (sample,) = task.held_out(tiny_model[1], length=200, count=1, seed=0)
        assert tiny_model[1].decode(sample.ids) == "VAR A = 1\nWhich? They are A B"
        assert sample.grade(np.array(tiny_model[1](" b, a")["input_ids"])) == 1
        with pytest.raises(ConfigError, match="has 1 records of at most 200 tokens, 2 are needed"):
            task.held_out(tiny_model[1], length=200, count=2, seed=0)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"answer": None}, "line 1: answer must be a list of texts"),
            ({"answer": []}, "answer must be a list of texts"),
            ({"max_new_tokens": 0}, "max_new_tokens must be a positive number"),
            ({"context": None}, "must be texts"),
        ],
    )
    def test_rows_that_are_none_are_told(self, write, change, words):
        with pytest.raises(ConfigError, match=words):
            read_records(write([{**ROWS[0], **change}]))

    def test_other_files_are_told(self, write):
        with pytest.raises(ConfigError, match=r"column answer_prefix is missing; RULER's files have context"):
            read_records(write([{"context": "a", "question": "b"}]))
        with pytest.raises(ConfigError, match=r"are read from \.jsonl"):
            read_records(write(ROWS, "ruler.txt"))

    @pytest.mark.parametrize(
        ("name", "words"), [("ruler:vtt", r"did you mean 'vt'"), ("ruler:no.jsonl", "no such file")]
    )
    def test_names_that_are_neither(self, name, words):
        with pytest.raises(ConfigError, match=words):
            require_tasks([name])


def test_too_short_a_length_is_told(tiny_model):
    with pytest.raises(CalibrationError, match="ruler:cwe items can't be as short as 300 tokens"):
        require_tasks(["ruler:cwe"])[0].held_out(tiny_model[1], length=300, count=1, seed=0)
