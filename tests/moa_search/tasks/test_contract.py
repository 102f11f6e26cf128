"""What holds for every task, whichever it is: each test runs for all of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from moa_search.data import hash_samples
from moa_search.data.texts import documents
from moa_search.errors import CalibrationError, ConfigError
from moa_search.evaluation.scoring import score_item
from moa_search.tasks import SOURCE_TASKS, TASKS, TASKS_OVER, build_samples, parse_source, require_tasks

HALF = np.array([True, False, True, False])
LENGTH = 800
AT_DEPTHS = [name for name, task in TASKS.items() if task.at_depths]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What a user would bring, for each task that takes data."""
    folder = tmp_path_factory.mktemp("data")
    facts = [f"The {number}th stone is {'red' if number % 2 else 'blue'}. " * 12 for number in range(60)]
    rng = np.random.default_rng(0)
    lines = [" ".join(f"{word:05x}" for word in rng.integers(16**5, size=12)) for _ in range(500)]
    rows = [
        {"context": fact, "question": f"Which colour is stone {number}?", "answer": fact.split()[4][:-1]}
        for number, fact in enumerate(facts)
    ]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "book.txt").write_text("\n".join(lines))
    return {
        **dict.fromkeys(TASKS, folder / "book.txt"),
        "nll": folder / "records.jsonl",
        "ruler": "niah_single_1",
    }


@pytest.fixture(params=[*TASKS, *(f"{kind}:" for kind in TASKS_OVER)])
def typed(request, data):
    name = request.param
    return f"{name}{data[name[:-1]]}" if name.endswith(":") else name


@pytest.fixture
def task(typed):
    return require_tasks([typed])[0]


@pytest.fixture(params=SOURCE_TASKS)
def name_of_source(request):
    return request.param


def build(task, tiny_model, **changes):
    return task.held_out(tiny_model[1], **{"length": LENGTH, "count": 3, "seed": 0, **changes})


def test_is_found_once_and_called_without_folders(typed):
    (task,) = require_tasks([typed, typed])
    kind, colon, data = typed.partition(":")
    assert task.name == f"{kind}{colon}{Path(data).name}"


def test_scores_run_from_nothing_to_all_right(task):
    assert task.score(np.zeros(4, dtype=bool)) == 0
    assert 0 <= task.score(HALF) <= 1
    assert task.score(np.ones(4, dtype=bool)) == 1


def test_items_are_as_many_and_as_long_as_asked_for(task, tiny_model):
    items = build(task, tiny_model)
    assert len(items) == 3
    for item in items:
        assert item.task == task.name.partition(":")[0] or item.task in (task.name, "records")
        assert item.target_length == LENGTH
        if item.grade is None:
            assert item.length == LENGTH
        else:  # made of whole sentences
            assert LENGTH - 100 < len(item.prompt) + item.room <= LENGTH


def test_equal_arguments_give_equal_items(task, tiny_model):
    assert hash_samples(build(task, tiny_model)) == hash_samples(build(task, tiny_model))
    assert hash_samples(build(task, tiny_model)) != hash_samples(build(task, tiny_model, seed=1))


@pytest.mark.parametrize("way", ["forced", "generated"])
def test_readings_are_scores_with_losses_where_there_are_any(task, tiny_model, way):
    sample = build(task, tiny_model, count=1)[0]
    readings = score_item(tiny_model[0], task, sample, way)
    assert readings
    for reading in readings:
        assert 0 <= reading.score <= 1
        assert 0 <= reading.depth <= 1
        assert np.isfinite(reading.nll) == (task.answer_mode(way) == "forced")


def test_too_short_a_length_is_told(task, tiny_model):
    with pytest.raises(CalibrationError, match="20 tokens"):
        build(task, tiny_model, length=20)


@pytest.mark.parametrize("name", TASKS)
def test_items_are_held_out(name, tiny_model):
    items = build(TASKS[name], tiny_model)
    assert {item.document for item in items} <= {document for document, _ in documents("test")}


@pytest.mark.parametrize("name", ["passkey", "copy", "multikey"])
def test_calibration_with_the_same_seed_draws_otherwise(name, tiny_model):
    drawn = build_samples(tiny_model[1], length=LENGTH, count=3, seed=0, split="test", tasks=[name])
    assert hash_samples(drawn) != hash_samples(build(TASKS[name], tiny_model))


@pytest.mark.parametrize("name", AT_DEPTHS)
def test_depths_are_those_asked_for_in_turn(name, tiny_model):
    items = build(TASKS[name], tiny_model, count=2, depths=[0.0, 0.5, 1.0], length=1200)
    found = [item.depth for item in items]
    share = 0.5 if name == "question" else 1  # its facts stand in the first half
    assert found == pytest.approx([0, 0.5 * share, share] * 2, abs=0.06), (
        "a passage or an entry stands only where one begins"
    )


@pytest.mark.parametrize("name", AT_DEPTHS)
def test_the_sought_text_stands_where_the_depth_says(name, tiny_model):
    """Its answer is found in the prompt near that depth, once the question's own words are left out."""
    for item in build(TASKS[name], tiny_model, count=1, depths=[0.1, 0.9], length=1600):
        prompt, answer = item.prompt.tolist(), item.answer.tolist()
        wanted = answer[-5:] if name != "turns" else answer[1:6]  # the first turn's
        places = [at for at in range(len(prompt) - 4) if prompt[at : at + 5] == wanted]
        if name == "tracking":
            text = tiny_model[1].decode(item.prompt)
            places = [text.index("VAR ")]
        assert places
        assert min(abs(at / 1600 - item.depth) for at in places) < 0.25


def test_each_is_a_calibration_source_where_it_says_so(name_of_source, tiny_model):
    drawn = build_samples(tiny_model[1], length=LENGTH, count=3, seed=0, split="calibration", tasks=[name_of_source])
    assert {sample.task for sample in drawn} == {name_of_source}
    assert {sample.document for sample in drawn} <= {document for document, _ in documents("calibration")}
    assert parse_source(name_of_source).task == name_of_source


class TestNames:
    def test_each_once_and_in_order(self):
        assert [task.name for task in require_tasks(["copy", "passkey", "copy"])] == ["copy", "passkey"]

    def test_an_unknown_one_suggests_the_nearest(self):
        with pytest.raises(ConfigError, match=r"'coppy' is unknown \(did you mean 'copy'\?\); choose from passkey"):
            require_tasks(["passkey", "coppy"])

    def test_longbench_is_the_harness_s(self):
        with pytest.raises(ConfigError, match="moa-eval lm-eval --builtin true has LongBench's tasks"):
            require_tasks(["longbench:records.jsonl"])

    def test_none(self):
        with pytest.raises(ConfigError, match="no task is named; choose from passkey, copy"):
            require_tasks([])

    @pytest.mark.parametrize("name", ["nll", "nll:", "perplexity:"])
    def test_data_that_is_missing(self, name):
        with pytest.raises(ConfigError, match="lacks its data"):
            require_tasks([name])
