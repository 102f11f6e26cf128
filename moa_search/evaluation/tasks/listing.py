"""Long lists of entries that look alike, of which one is asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np

from moa_search.calibration.prompts import Asking, Generator, Item
from moa_search.errors import CalibrationError

__all__ = ["ListGenerator"]


class ListGenerator(Generator):
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

    def draw(self, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `Generator.draw`."""
        entries, lines, used = [], [], 0
        room = length - len(self._frame.before)
        source = self.entries(rng)
        while used < room:
            try:
                entries.append(next(source))
            except StopIteration:
                raise CalibrationError(
                    f"{self.name} items can't be as long as {length} tokens: they have {len(entries)} entries at most"
                ) from None
            lines.append(self._encode(self.written(*entries[-1])))
            used += len(lines[-1])
        # The list is cut so that the question about whichever entry is asked for still fits.
        count = len(lines)
        while count:
            asked = round(depth * (count - 1))
            asking = self.asking(*entries[asked])
            end, reference, answer_room = self._ending(asking)
            missing = room - sum(map(len, lines[:count])) - len(end) - answer_room
            if missing >= 0:
                document, filler = self._source.cut(missing, rng)
                content = np.concatenate([filler, *lines[:count]])
                at = asked / max(count - 1, 1)
                return self._item(content, end, reference, asking, depth=at, document=document, length=length)
            count -= 1
        raise CalibrationError(f"{self.name} items can't be as short as {length} tokens")
