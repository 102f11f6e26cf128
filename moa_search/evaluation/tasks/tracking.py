"""Follow a value through variables that are assigned to each other."""

from __future__ import annotations

import numpy as np

from moa_search.calibration.prompts import Asking, Generator, Item
from moa_search.evaluation.tasks.base import TokenAccuracyTask

__all__ = ["TrackingTask"]

LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
LETTERS_PER_NAME = 5


class TrackingGenerator(Generator):
    """A number is given to a variable, and that one to the next, with text between; all of them are asked for.

    RULER's variable tracking (arXiv 2404.06654) with one chain of `hops` assignments after the first.
    """

    name = "tracking"
    hops = 4

    def draw(self, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `Generator.draw`; ``depth`` is that of the first assignment, the others follow it anywhere."""
        names = _distinct_names(self.hops + 1, rng)
        value = int(rng.integers(10_000, 100_000))
        depths = [depth, *sorted(rng.uniform(depth, 1, self.hops).tolist())]
        given = [str(value), *(f"VAR {name}" for name in names)]
        needles = [
            (at, f"\n\nVAR {name} = {source}\n\n") for at, name, source in zip(depths, names, given, strict=False)
        ]
        asking = Asking(
            f"\n\nWhich variables have the value {value}?",
            f" These {len(names)} variables have the value {value}:",
            (f" {' '.join(names)}",),
        )
        return self._hide(needles, asking, length, rng)


class TrackingTask(TokenAccuracyTask):
    """The names of all variables that hold a number, in the order of their assignments."""

    name = "tracking"
    generator = TrackingGenerator


def _distinct_names(count: int, rng: np.random.Generator) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choice(LETTERS, LETTERS_PER_NAME))
        if name not in names:
            names.append(name)
    return names
