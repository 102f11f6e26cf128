"""Held-out tasks, by name; some take data of the user's after a colon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from moa_search.errors import ConfigError
from moa_search.evaluation.tasks.answers import AnswersTask
from moa_search.evaluation.tasks.base import Answers, Reading, Task
from moa_search.evaluation.tasks.copying import CopyTask
from moa_search.evaluation.tasks.lines import LinesTask
from moa_search.evaluation.tasks.longbench import LongBenchTask
from moa_search.evaluation.tasks.lookup import LookupTask
from moa_search.evaluation.tasks.multikey import MultikeyTask
from moa_search.evaluation.tasks.passkey import PasskeyTask
from moa_search.evaluation.tasks.perplexity import PerplexityTask
from moa_search.evaluation.tasks.tracking import TrackingTask
from moa_search.formats.files import nearest, one_line

__all__ = ["ANSWERS", "TASKS", "TASKS_OVER", "Answers", "Reading", "Task", "require_tasks"]

ANSWERS: tuple[Answers, ...] = get_args(Answers)
"""Ways to answer."""

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        PasskeyTask(),
        CopyTask(),
        MultikeyTask(),
        LinesTask(),
        LookupTask(),
        TrackingTask(),
        PerplexityTask(),
    )
}
"""Tasks over the standard library's texts, by name."""

TASKS_OVER: dict[str, Callable[[str], Task]] = {
    "nll": AnswersTask,
    "perplexity": PerplexityTask,
    "longbench": LongBenchTask,
}
"""Tasks over data of the user's, which follow the name and a colon."""


def require_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, each once.

    Raises:
        ConfigError: One is unknown, lacks its data, or there is none.
    """
    if not names:
        raise ConfigError(f"no task is named; {_choices()}")
    return [_task(name) for name in dict.fromkeys(names)]


def _task(name: str) -> Task:
    if name in TASKS:
        return TASKS[name]
    kind, _, data = name.partition(":")
    if kind in TASKS_OVER and data:
        return TASKS_OVER[kind](data)
    if kind in TASKS_OVER:
        raise ConfigError(f"task {name!r} lacks its data; name a file after the colon, as in {kind}:FILE")
    raise ConfigError(f"task {one_line(name)!r} is unknown{nearest(name, [*TASKS, *TASKS_OVER])}; {_choices()}")


def _choices() -> str:
    return f"choose from {', '.join(TASKS)}, {', '.join(f'{kind}:DATA' for kind in TASKS_OVER)}"
