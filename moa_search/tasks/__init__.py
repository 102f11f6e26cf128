"""Tasks: how an item is drawn, and how an answer to it is scored. Calibration and evaluation draw from them alike."""

from moa_search.tasks.base import AnswerMode, DrawnTask, Task
from moa_search.tasks.choosing import ANSWER_MODES, TASKS_OVER, require_tasks
from moa_search.tasks.drawing import build_samples
from moa_search.tasks.registry import SOURCE_TASKS, TASKS
from moa_search.tasks.sources import parse_source

__all__ = [
    "ANSWER_MODES",
    "SOURCE_TASKS",
    "TASKS",
    "TASKS_OVER",
    "AnswerMode",
    "DrawnTask",
    "Task",
    "build_samples",
    "parse_source",
    "require_tasks",
]
