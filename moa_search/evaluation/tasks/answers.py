"""Loss of the answers of any calibration source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.calibration import Sample, calibrate, parse_source
from moa_search.evaluation.tasks.base import HELD_OUT_SEED, Task

__all__ = ["AnswersTask"]


class AnswersTask(Task):
    """The data's own answers to held-out questions of a source; the score is the share of tokens ranked first.

    Args:
        source: As for ``moa-profile --sources``.

    Raises:
        ConfigError: ``source`` names none.
    """

    metric = "token accuracy"
    always_forced = True
    at_depths = False

    def __init__(self, source: str) -> None:
        parse_source(source)
        self._source = source
        self.name = f"nll:{source}"

    def build(
        self, tokenizer: Any, *, length: int, count: int, seed: int, depths: Sequence[float] = ()
    ) -> list[Sample]:
        """See `Task.build`."""
        drawn = calibrate(
            None,
            tokenizer,
            sources=[self._source],
            lengths=[length],
            samples=count,
            seed=HELD_OUT_SEED + seed,
            split="test",
            answers="dataset",
            chat="never",
        )
        return drawn.samples

    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """See `Task.score`."""
        return float(correct.mean())
