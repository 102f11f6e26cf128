"""Question-answer records of a data set, brought to any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moa_search.calibration.prompts import Asking, Frame, Generator, Item, scattered
from moa_search.calibration.texts import Document, TextSource
from moa_search.errors import CalibrationError

__all__ = ["NoMoreRecordsError", "Record", "RecordGenerator"]


class NoMoreRecordsError(CalibrationError):
    """Every record of the split has been drawn for this length."""


@dataclass(frozen=True)
class Record:
    """One question about a context.

    Attributes:
        document: Name of the context.
        context: What the question is about.
        question: The question.
        answers: Accepted answers, the first one supervised; empty where the data has none.
    """

    document: str
    context: str
    question: str
    answers: tuple[str, ...]


class RecordGenerator(Generator):
    """Records in random order, each once per length.

    A context that is too long loses its middle, as in MoA; one that is too short is set among contexts of other
    records, so that any set of short questions becomes a long one.

    Args:
        tokenizer: A Hugging Face tokenizer.
        records: Of one split.
        label: What they are called in errors.
        frame: Tokens around the content; by default plain text.
        free_room: Tokens kept for answers in the model's own words; by default as many as the data's answer has.
    """

    name = "records"

    def __init__(
        self,
        tokenizer: Any,
        records: Sequence[Record],
        label: str,
        frame: Frame | None = None,
        free_room: int | None = None,
    ) -> None:
        contexts: tuple[Document, ...] = tuple({record.document: record.context for record in records}.items())
        source = TextSource(tokenizer, contexts, f"the other contexts of {label}", joint="\n\n")
        super().__init__(tokenizer, source, frame, free_room)
        self._records = records
        self._label = label
        self._waiting: dict[int, Iterator[int]] = {}

    def draw(self, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `Generator.draw`; ``depth`` is where a short context starts among the others.

        Records whose question and answer leave less than half of ``length`` for their context are passed over.

        Raises:
            NoMoreRecordsError: Every record was drawn for this length, or passed over.
        """
        waiting = self._waiting.setdefault(length, iter(rng.permutation(len(self._records)).tolist()))
        for index in waiting:
            record = self._records[index]
            lead = ("", *(f" {answer}" for answer in record.answers))[1:]
            asking = Asking(f"\n\nQuestion: {record.question}", "\nAnswer:", lead, free=True)
            end, reference, room = self._ending(asking)
            missing = length - len(self._frame.before) - len(end) - room
            if 2 * missing < length:
                continue
            content, centre = self._content(record, missing, depth, rng)
            return self._item(content, end, reference, asking, depth=centre, document=record.document, length=length)
        raise NoMoreRecordsError(f"{self._label} has no more than {len(self._records)} records for {length} tokens")

    def _content(
        self, record: Record, length: int, depth: float, rng: np.random.Generator
    ) -> tuple[np.ndarray[Any, np.dtype[np.int64]], float]:
        """``length`` tokens with the record's context, and the depth of its middle."""
        context = self._encode(record.context)
        if len(context) >= length:
            head = (length + 1) // 2
            return np.concatenate([context[:head], context[len(context) - (length - head) :]]), 0.5
        context = np.concatenate([self._encode("\n\n"), context, self._encode("\n\n")])[:length]
        missing = length - len(context)
        _, others = self._source.cut(missing, rng, without=record.document)
        at = round(depth * missing)
        return scattered(others, [(depth, context)]), (at + len(context) / 2) / length
