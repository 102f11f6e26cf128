"""All tasks over the standard library's texts, by name."""

from __future__ import annotations

from moa_search.tasks.base import DrawnTask
from moa_search.tasks.conversing import TurnsTask
from moa_search.tasks.copying import CopyTask
from moa_search.tasks.lists import LinesTask, LookupTask
from moa_search.tasks.needles import MultikeyTask, PasskeyTask, QuestionTask, TrackingTask
from moa_search.tasks.perplexity import PerplexityTask

TASKS: dict[str, DrawnTask] = {
    task.name: task
    for task in (
        PasskeyTask(),
        CopyTask(),
        MultikeyTask(),
        QuestionTask(),
        LinesTask(),
        LookupTask(),
        TrackingTask(),
        TurnsTask(),
        PerplexityTask(),
    )
}
"""Each draws calibration samples and held-out items, and scores answers to them."""

SOURCE_TASKS: dict[str, DrawnTask] = {name: task for name, task in TASKS.items() if task.is_source}
"""Those that profiles can be calibrated on."""
