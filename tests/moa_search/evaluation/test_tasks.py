"""Held-out tasks."""

import numpy as np
import pytest

from moa_search.calibration import GENERATORS, build_samples, hash_samples
from moa_search.calibration.texts import documents
from moa_search.errors import ConfigError
from moa_search.evaluation import TASKS
from moa_search.evaluation.tasks import require_tasks

HALF = np.array([True, False, True, False])


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
class TestEveryTask:
    """What holds for any task; a new one is tested by joining `TASKS`."""

    def test_has_a_generator(self, task):
        assert task.name in GENERATORS
        assert TASKS[task.name] is task

    def test_scores_run_from_nothing_to_all_right(self, task):
        assert task.score(np.zeros(4, dtype=bool)) == 0
        assert 0 <= task.score(HALF) <= 1
        assert task.score(np.ones(4, dtype=bool)) == 1

    def test_items_are_held_out(self, task, tiny_model):
        items = task.build(tiny_model[1], length=400, count=4, seed=0)
        assert {item.document for item in items} <= {name for name, _ in documents("test")}
        assert all(item.length == 400 and item.task == task.name for item in items)

    def test_equal_arguments_give_equal_items(self, task, tiny_model):
        def build(seed):
            return hash_samples(task.build(tiny_model[1], length=400, count=3, seed=seed))

        assert build(0) == build(0) != build(1)

    def test_calibration_with_the_same_seed_draws_otherwise(self, task, tiny_model):
        tokenizer = tiny_model[1]
        drawn = build_samples(tokenizer, length=400, count=3, seed=0, split="test", tasks=[task.name])
        assert hash_samples(drawn) != hash_samples(task.build(tokenizer, length=400, count=3, seed=0))


def test_a_passkey_counts_only_as_a_whole():
    assert TASKS["passkey"].score(HALF) == 0


def test_a_copy_counts_by_token():
    assert TASKS["copy"].score(HALF) == 0.5


def test_tasks_by_name_each_once():
    assert [task.name for task in require_tasks(["copy", "passkey", "copy"])] == ["copy", "passkey"]


def test_unknown_task_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"'coppy' is unknown \(did you mean 'copy'\?\)"):
        require_tasks(["passkey", "coppy"])


def test_no_task():
    with pytest.raises(ConfigError, match="no task is named; choose from passkey, copy"):
        require_tasks([])
