"""Loss of the answers of any calibration source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.data.frames import plain_frame
from moa_search.data.samples import Sample
from moa_search.data.sources import SourceSpec
from moa_search.tasks.base import HELD_OUT_SEED, Task
from moa_search.tasks.collecting import DataAnswers, collect
from moa_search.tasks.drawing import Drawing


class AnswersTask(Task):
    """The data's own answers to held-out questions of a source; the score is the share of tokens ranked first.

    Args:
        source: As for ``moa-profile --sources``.
    """

    metric = "token accuracy"
    always_forced = True
    at_depths = False

    def __init__(self, source: SourceSpec) -> None:
        self._source = source
        self.name, self.data = f"nll:{source.typed}", source.data

    def held_out(
        self, tokenizer: Any, *, length: int, count: int, seed: int, depths: Sequence[float] = ()
    ) -> list[Sample]:
        """See `Task.held_out`."""
        drawing = Drawing(
            tokenizer,
            [self._source],
            lengths=[length],
            count=count,
            seed=HELD_OUT_SEED + seed,
            split="test",
            frame=plain_frame(tokenizer),
            free_room=None,
        )
        return collect(drawing, DataAnswers(), lambda tokens: None)[0]

    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """See `Task.score`."""
        return float(correct.mean())
