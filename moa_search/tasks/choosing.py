"""Tasks by the names that a user types; some take data of the user's after a colon."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

from moa_search.errors import ConfigError
from moa_search.formats.files import nearest, one_line
from moa_search.tasks.answers import AnswersTask
from moa_search.tasks.base import AnswerMode, Task
from moa_search.tasks.perplexity import PerplexityTask
from moa_search.tasks.registry import TASKS
from moa_search.tasks.ruler import RECIPES, ruler_task
from moa_search.tasks.sources import parse_source

ANSWER_MODES: tuple[AnswerMode, ...] = get_args(AnswerMode)

TASKS_OVER = {"nll": "SOURCE", "perplexity": "TEXTS", "ruler": "TASK"}
"""Tasks that take something after their name and a colon: data of the user's, or one of RULER's tasks."""


def require_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, each once.

    Raises:
        ConfigError: One is unknown, lacks its data, or there is none.
    """
    if not names:
        raise ConfigError(f"no task is named; {_choices()}")
    each = [f"ruler:{task}" if name == "ruler" else name for name in names for task in _parts(name)]
    return [_task(name) for name in dict.fromkeys(each)]


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
        raise ConfigError(f"task {one_line(name)!r} is unknown{nearest(name, [*TASKS, *TASKS_OVER])}; {_choices()}")
    if not data:
        raise ConfigError(f"task {name!r} lacks its data; write {kind}:{TASKS_OVER[kind]}")
    if kind == "ruler":
        return ruler_task(data)
    if kind == "nll":
        return AnswersTask(parse_source(data))
    # A source whose texts are filler is one whose texts are documents here.
    return PerplexityTask(dataclasses.replace(parse_source(f"copy:{data}"), typed=name))


def _choices() -> str:
    return f"choose from {', '.join(TASKS)}, {', '.join(f'{kind}:{data}' for kind, data in TASKS_OVER.items())}"
