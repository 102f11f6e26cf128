"""Question-answer records of a data set, brought to any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moa_search.data.loading import Record
from moa_search.data.texts import Document, TextSource
from moa_search.tasks.base import TokenAccuracyTask
from moa_search.tasks.items import Asking, Generator, Item, NoMoreRecordsError, scattered


class RecordTask(TokenAccuracyTask):
    """Records in random order, each once per length.

    A context that is too long loses its middle, as in MoA; one that is too short is set among contexts of other
    records, so that any set of short questions becomes a long one.

    Args:
        records: Of one split.
        label: What they are called in errors.
    """

    name = "records"

    def __init__(self, records: Sequence[Record], label: str) -> None:
        self._records = records
        self._label = label
        self._waiting: dict[int, Iterator[int]] = {}

    def texts(self, tokenizer: Any) -> TextSource:
        """All contexts, as filler."""
        contexts: tuple[Document, ...] = tuple({record.document: record.context for record in self._records}.items())
        return TextSource(tokenizer, contexts, f"the other contexts of {self._label}", joint="\n\n")

    def draw(self, maker: Generator, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `DrawnTask.draw`; ``depth`` is where a short context starts among the others.

        Records whose question and answer leave less than half of ``length`` for their context are passed over.

        Raises:
            NoMoreRecordsError: Every record was drawn for this length, or passed over.
        """
        waiting = self._waiting.setdefault(length, iter(rng.permutation(len(self._records)).tolist()))
        for index in waiting:
            record = self._records[index]
            lead = ("", *(f" {answer}" for answer in record.answers))[1:]
            asking = Asking(f"\n\nQuestion: {record.question}", "\nAnswer:", lead, free=True)
            end, reference, room = maker.ending(asking)
            missing = length - len(maker.frame.before) - len(end) - room
            if 2 * missing < length:
                continue
            content, centre = self._content(maker, record, missing, depth, rng)
            return maker.item(content, end, reference, asking, depth=centre, document=record.document, length=length)
        raise NoMoreRecordsError(f"{self._label} has no more than {len(self._records)} records for {length} tokens")

    def _content(
        self, maker: Generator, record: Record, length: int, depth: float, rng: np.random.Generator
    ) -> tuple[np.ndarray[Any, np.dtype[np.int64]], float]:
        """``length`` tokens with the record's context, and the depth of its middle."""
        context = maker.encode(record.context)
        if len(context) >= length:
            head = (length + 1) // 2
            return np.concatenate([context[:head], context[len(context) - (length - head) :]]), 0.5
        context = np.concatenate([maker.encode("\n\n"), context, maker.encode("\n\n")])[:length]
        missing = length - len(context)
        _, others = maker.source.cut(missing, rng, without=record.document)
        at = round(depth * missing)
        return scattered(others, [(depth, context)]), (at + len(context) / 2) / length
