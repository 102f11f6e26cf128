"""Held-out tasks: how an answer's tokens become a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.calibration import Sample, build_samples
from moa_search.errors import ConfigError
from moa_search.formats.files import nearest

__all__ = ["TASKS", "CopyTask", "PasskeyTask", "Task", "require_tasks"]

HELD_OUT_SEED = 20_000
"""Offset of the seed, so that equal seeds don't give evaluation and calibration the same draws."""


class Task(ABC):
    """One kind of item with its score. Override `score`.

    Items come from texts that calibration never uses.
    """

    name: str
    """Name on the command line, and of the generator that makes the items."""
    metric: str
    """What the score is."""

    def build(self, tokenizer: Any, *, length: int, count: int, seed: int) -> list[Sample]:
        """``count`` items of exactly ``length`` tokens, answer included; equal arguments, equal items."""
        return build_samples(
            tokenizer, length=length, count=count, seed=HELD_OUT_SEED + seed, split="test", tasks=(self.name,)
        )

    @abstractmethod
    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """Score of one item, 0 to 1.

        Args:
            correct: For each answer token, whether the model ranks it first given the answer so far.
        """


class PasskeyTask(Task):
    """Every token of the passkey right: what greedy decoding would print."""

    name = "passkey"
    metric = "exact match"

    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """See `Task.score`."""
        return float(correct.all())


class CopyTask(Task):
    """Share of the copied passage's tokens that are right."""

    name = "copy"
    metric = "token accuracy"

    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """See `Task.score`."""
        return float(correct.mean())


TASKS: dict[str, Task] = {task.name: task for task in (PasskeyTask(), CopyTask())}
"""Tasks by name."""


def require_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, each once.

    Raises:
        ConfigError: One is unknown, or there is none.
    """
    if not names:
        raise ConfigError(f"no task is named; choose from {', '.join(TASKS)}")
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"task {name!r} is unknown{nearest(name, TASKS)}; choose from {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(names)]
