"""Next-token loss of long documents, by position."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.calibration import Sample, parse_source
from moa_search.calibration.loading import load_texts
from moa_search.calibration.prompts import plain_frame
from moa_search.calibration.texts import TextSource
from moa_search.errors import CalibrationError
from moa_search.evaluation.scoring import score_answer
from moa_search.evaluation.tasks.base import HELD_OUT_SEED, Answers, Reading, Task

__all__ = ["PerplexityTask"]


class PerplexityTask(Task):
    """Every token of a long document given those before it, in slices of its length.

    Perplexity is ``exp(nll)``; the score is the share of tokens ranked first.

    Args:
        data: Texts as a calibration source names them, such as ``books/*.txt``; by default the standard library's.

    Raises:
        ConfigError: ``data`` can't name any.
    """

    metric = "token accuracy"
    always_forced = True
    at_depths = False
    slices = 8
    least_per_slice = 8

    def __init__(self, data: str = "") -> None:
        self.name = f"perplexity:{data}" if data else "perplexity"
        # What a source is like whose texts are filler is what a document is like here.
        self._spec = dataclasses.replace(parse_source(f"copy:{data}"), typed=self.name) if data else None

    def build(
        self, tokenizer: Any, *, length: int, count: int, seed: int, depths: Sequence[float] = ()
    ) -> list[Sample]:
        """See `Task.build`; a document starts anywhere in a text and may go on in the next."""
        before = plain_frame(tokenizer).before
        if length < self.slices * self.least_per_slice:
            raise CalibrationError(f"{self.name} items can't be as short as {length} tokens")
        source = TextSource.library(tokenizer, "test")
        if self._spec is not None:
            texts = load_texts(self._spec, "test")
            source = TextSource(tokenizer, texts, f"the held-out texts of {self.name}", joint="\n\n")
        rng = np.random.default_rng([HELD_OUT_SEED + seed, length])
        items = []
        for _ in range(count):
            document, text = source.cut(length - len(before), rng)
            items.append(Sample(np.concatenate([before, text]), length - 1, self.name, 0.5, document))
        return items

    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """See `Task.score`."""
        return float(correct.mean())

    def measure(self, model: Any, tokenizer: Any, sample: Sample, answers: Answers) -> list[Reading]:
        """See `Task.measure`; one reading for each slice, its depth that of the slice's middle."""
        answer = score_answer(model, sample)
        parts = zip(
            np.array_split(answer.losses, self.slices), np.array_split(answer.correct, self.slices), strict=True
        )
        return [
            Reading((number + 0.5) / self.slices, float(losses.mean()), self.score(correct))
            for number, (losses, correct) in enumerate(parts)
        ]
