"""Long lists of entries that look alike, of which one is asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np

from moa_search.errors import CalibrationError
from moa_search.tasks.base import ExactMatchTask
from moa_search.tasks.facts import ANIMALS, CITIES, JOBS, NAMES, THINGS
from moa_search.tasks.items import Asking, Generator, Item


class ListTask(ExactMatchTask):
    """As many entries as there is room for, after a little text that brings the item to its length.

    Override `entries`, `written` and `asking`.
    """

    @abstractmethod
    def entries(self, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        """Keys that differ, with their values."""

    @abstractmethod
    def written(self, key: str, value: str) -> str:
        """One entry, with its line break."""

    @abstractmethod
    def asking(self, key: str, value: str) -> Asking:
        """The question for a key, and its answer."""

    def draw(self, maker: Generator, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `DrawnTask.draw`."""
        entries, lines, used = [], [], 0
        room = length - len(maker.frame.before)
        source = self.entries(rng)
        while used < room:
            try:
                entries.append(next(source))
            except StopIteration:
                raise CalibrationError(
                    f"{self.name} items can't be as long as {length} tokens: they have {len(entries)} entries at most"
                ) from None
            lines.append(maker.encode(self.written(*entries[-1])))
            used += len(lines[-1])
        # The list is cut so that the question about whichever entry is asked for still fits.
        count = len(lines)
        while count:
            asked = round(depth * (count - 1))
            asking = self.asking(*entries[asked])
            end, reference, answer_room = maker.ending(asking)
            missing = room - sum(map(len, lines[:count])) - len(end) - answer_room
            if missing >= 0:
                document, filler = maker.source.cut(missing, rng)
                content = np.concatenate([filler, *lines[:count]])
                at = asked / max(count - 1, 1)
                return maker.item(content, end, reference, asking, depth=at, document=document, length=length)
            count -= 1
        raise CalibrationError(f"{self.name} items can't be as short as {length} tokens")


class LinesTask(ListTask):
    """Lines with a name and a number each (LongEval, lmsys.org/blog/2023-06-29-longchat)."""

    name = "lines"

    def entries(self, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        """See `ListTask.entries`."""
        pairs = [f"{first} {second}" for first in (*CITIES, *NAMES) for second in (*ANIMALS, *JOBS, *THINGS)]
        for key in rng.permutation(pairs).tolist():
            yield key, str(rng.integers(10_000, 100_000))

    def written(self, key: str, value: str) -> str:
        """See `ListTask.written`."""
        return f"\nLine {key}: the number is {value}."

    def asking(self, key: str, value: str) -> Asking:
        """See `ListTask.asking`."""
        return Asking(f"\n\nWhat is the number in line {key}?", f"\nLine {key}: the number is", (f" {value}",))


class LookupTask(ListTask):
    """Pairs of random keys and values, as JSON writes them (Lost in the Middle, arXiv 2307.03172)."""

    name = "lookup"

    def entries(self, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        """See `ListTask.entries`."""
        seen: set[str] = set()
        while True:
            key, value = (f"{number:08x}" for number in rng.integers(2**32, size=2).tolist())
            if key not in seen:
                seen.add(key)
                yield key, value

    def written(self, key: str, value: str) -> str:
        """See `ListTask.written`."""
        return f'\n"{key}": "{value}",'

    def asking(self, key: str, value: str) -> Asking:
        """See `ListTask.asking`."""
        return Asking(f'\n\nWhat is the value of the key "{key}"?', f'\n"{key}": "', (value,))
