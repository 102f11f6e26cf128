"""Tasks by the names that a user types; some take data of the user's after a colon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from moa_search.data.loading import require_readable
from moa_search.errors import ConfigError
from moa_search.formats.files import nearest, one_line
from moa_search.tasks.answers import AnswersTask
from moa_search.tasks.base import AnswerMode, Task
from moa_search.tasks.registry import TASKS
from moa_search.tasks.ruler import RECIPES, ruler_task
from moa_search.tasks.sources import parse_source

ANSWER_MODES: tuple[AnswerMode, ...] = get_args(AnswerMode)

TASKS_OVER = {**dict.fromkeys(TASKS, "TEXTS"), "nll": "SOURCE", "ruler": "TASK"}
"""Tasks that take something after their name and a colon: data of the user's, or one of RULER's tasks."""


def require_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, each once.

    Data of the user's is looked at here, so that what can't be read is told before a model is loaded. A file or folder
    is called by its name alone in `Task.name`, unless another one has the same name.

    Raises:
        ConfigError: One is unknown, lacks its data, or that can't be read; or there is none.
        CalibrationError: None of a user's texts is held out.
    """
    if not names:
        raise ConfigError(f"no task is named; {_choices()}")
    each = [f"ruler:{task}" if name == "ruler" else name for name in names for task in _parts(name)]
    tasks = [_task(name) for name in dict.fromkeys(each)]
    _call_by_file_names(tasks)
    return list({task.name: task for task in tasks}.values())  # a file can be written in two ways


def _call_by_file_names(tasks: Sequence[Task]) -> None:
    paths = {task.data: Path(task.data).expanduser().absolute() for task in tasks if task.data}
    shared = Counter(path.name for path in set(paths.values()))
    for task in tasks:
        path = paths.get(task.data)
        if path is not None and path.exists() and shared[path.name] == 1:
            task.name = task.name.replace(task.data, path.name, 1)


def _parts(name: str) -> Sequence[str]:
    """What a name stands for: ``ruler`` for all of RULER's tasks."""
    return list(RECIPES) if name == "ruler" else [name]


def _task(name: str) -> Task:
    if name in TASKS:
        return TASKS[name]
    kind, _, data = name.partition(":")
    if kind not in TASKS_OVER:
        if kind == "longbench":
            raise ConfigError(
                f"task {one_line(name)!r} is unknown; moa-eval lm-eval --builtin true has LongBench's tasks"
            )
        raise ConfigError(f"task {one_line(name)!r} is unknown{nearest(kind, TASKS_OVER)}; {_choices()}")
    if not data:
        raise ConfigError(f"task {one_line(name)!r} lacks its data; write {kind}:{TASKS_OVER[kind]}")
    if kind == "ruler":
        return ruler_task(data)
    if kind == "nll":
        source = parse_source(data)
        require_readable(source, "test")
        return AnswersTask(source)
    return TASKS[kind].over(parse_source(name, tuple(TASKS)))


def _choices() -> str:
    return f"choose from {', '.join(TASKS)} (passkey:FILE and so on over texts of yours), nll:SOURCE, ruler:TASK"
