"""Look up the value of one of many keys."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moa_search.calibration.prompts import Asking
from moa_search.evaluation.tasks.base import ExactMatchTask
from moa_search.evaluation.tasks.listing import ListGenerator

__all__ = ["LookupTask"]


class LookupGenerator(ListGenerator):
    """Pairs of random keys and values, as JSON writes them (Lost in the Middle, arXiv 2307.03172)."""

    name = "lookup"

    def entries(self, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        """See `ListGenerator.entries`."""
        seen: set[str] = set()
        while True:
            key, value = (f"{number:08x}" for number in rng.integers(2**32, size=2).tolist())
            if key not in seen:
                seen.add(key)
                yield key, value

    def written(self, key: str, value: str) -> str:
        """See `ListGenerator.written`."""
        return f'\n"{key}": "{value}",'

    def asking(self, key: str, value: str) -> Asking:
        """See `ListGenerator.asking`."""
        return Asking(f'\n\nWhat is the value of the key "{key}"?', f'\n"{key}": "', (value,))


class LookupTask(ExactMatchTask):
    """The value of one of many keys."""

    name = "lookup"
    generator = LookupGenerator
