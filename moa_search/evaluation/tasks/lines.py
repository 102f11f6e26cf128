"""Retrieve the number in one of many lines (LongEval)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moa_search.calibration.facts import ANIMALS, CITIES, JOBS, NAMES, THINGS
from moa_search.calibration.prompts import Asking
from moa_search.evaluation.tasks.base import ExactMatchTask
from moa_search.evaluation.tasks.listing import ListGenerator

__all__ = ["LinesTask"]


class LineGenerator(ListGenerator):
    """Lines with a name and a number each (LongEval, lmsys.org/blog/2023-06-29-longchat)."""

    name = "lines"

    def entries(self, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        """See `ListGenerator.entries`."""
        pairs = [f"{first} {second}" for first in (*CITIES, *NAMES) for second in (*ANIMALS, *JOBS, *THINGS)]
        for key in rng.permutation(pairs).tolist():
            yield key, str(rng.integers(10_000, 100_000))

    def written(self, key: str, value: str) -> str:
        """See `ListGenerator.written`."""
        return f"\nLine {key}: the number is {value}."

    def asking(self, key: str, value: str) -> Asking:
        """See `ListGenerator.asking`."""
        return Asking(f"\n\nWhat is the number in line {key}?", f"\nLine {key}: the number is", (f" {value}",))


class LinesTask(ExactMatchTask):
    """The number in one of many lines."""

    name = "lines"
    generator = LineGenerator
