"""Several questions, one after the other, about one document."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moa_search.errors import CalibrationError
from moa_search.tasks.base import ExactMatchTask
from moa_search.tasks.facts import NAMES
from moa_search.tasks.items import Asking, Generator, Item

Tokens = npt.NDArray[np.int64]


class TurnsTask(ExactMatchTask):
    """Passkeys of four people in one document; each is asked for in a turn of its own, on the cache of those before.

    What is compressed when the document ends has to serve all four questions. Earlier answers are given as they should
    have been, so each turn is scored by itself; an item has a reading for each.
    """

    name = "turns"
    always_forced = True
    in_chat = False
    is_source = False
    is_retrieval = False
    slices = 4

    def draw(self, maker: Generator, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `DrawnTask.draw`; ``depth`` is that of the first key asked for, the others are anywhere."""
        names = rng.choice(NAMES, self.slices, replace=False).tolist()
        keys = self._keys(maker, rng)
        depths = [depth, *rng.random(self.slices - 1).tolist()]
        hidden = [
            (at, f"\n\nThe pass key of {name} is {key}. Remember it.\n\n")
            for at, name, key in zip(depths, names, keys, strict=True)
        ]
        asked = [
            Asking(f"\n\nWhat is the pass key of {name}?", f" The pass key of {name} is", (f" {key}",))
            for name, key in zip(names, keys, strict=True)
        ]
        parts = [part for asking in asked[1:] for part in maker.ending(asking)[:2]]  # question, answer, ...
        first = length - sum(map(len, parts))  # tokens up to the first answer, it included
        try:
            item = maker.hide(hidden, asked[0], first, rng)
        except CalibrationError as error:
            raise CalibrationError(str(error).replace(f"{first} tokens", f"{length} tokens")) from None
        marks = [np.full(len(part), number % 2 == 0) for number, part in enumerate([item.reference, *parts])]
        return Item(
            prompt=item.prompt,
            reference=np.concatenate([item.reference, *parts]),
            accepted=(),
            ends="reference",
            exact=False,
            task=self.kind,
            depth=depth,
            document=item.document,
            target_length=length,
            supervised=np.concatenate(marks),
            question_tokens=item.question_tokens,
        )

    def _keys(self, maker: Generator, rng: np.random.Generator) -> list[int]:
        """Keys that differ, of equally many tokens: a reading is a fourth of the answers."""
        while True:
            keys: list[int] = (10_000 + rng.choice(90_000, self.slices, replace=False)).tolist()
            if len({len(maker.encode(f" {key}")) for key in keys}) == 1:
                return keys
