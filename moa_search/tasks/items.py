"""How an item is put together from tokens, so that its length and its answer are exact by construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from moa_search.data.frames import Frame, plain_frame
from moa_search.data.samples import Sample
from moa_search.data.texts import TextSource, encode
from moa_search.errors import CalibrationError

if TYPE_CHECKING:
    from moa_search.tasks.base import DrawnTask

Tokens = npt.NDArray[np.int64]
Ending = Literal["reference", "line", "turn"]


@dataclass(frozen=True)
class Asking:
    """A question and its answer.

    Attributes:
        question: Follows the content.
        lead: The answer's first words, which are given; left out where a chat is answered freely.
        answers: Accepted answers, the first of them the data's own; may be empty where the model answers.
        free: Answered in the model's own words, rather than with as many tokens as the data's answer has.
    """

    question: str
    lead: str
    answers: tuple[str, ...]
    free: bool = False


@dataclass(frozen=True, eq=False)
class Item:
    """A prompt that still has to be answered.

    Attributes:
        prompt: Token ids up to the answer.
        reference: Token ids of the data's own answer; empty where there is none.
        accepted: Texts of which an answer has to hold one; empty where any answer will do.
        ends: How an answer ends: after as many tokens as the ``reference`` has, with its ``line``, with its ``turn``.
        exact: Whether an answer is compared with the reference token by token, rather than as text.
        task: Name of its task.
        depth: Where the sought text stands, 0 to 1.
        document: Text it comes from.
        target_length: Tokens of the prompt and of the room for the answer.
        supervised: Which tokens of the ``reference`` count, ``[reference]``; None for all of them.
        question_tokens: How many of the prompt's last tokens ask the question; 0 where nothing tells them apart.
    """

    prompt: Tokens
    reference: Tokens
    accepted: tuple[str, ...]
    ends: Ending
    exact: bool
    task: str
    depth: float
    document: str
    target_length: int
    supervised: npt.NDArray[np.bool_] | None = None
    question_tokens: int = 0

    def answered(self, answer: Tokens, source: str = "") -> Sample:
        """The sample with this answer."""
        ids = np.concatenate([self.prompt, answer])
        return Sample(
            ids,
            len(answer),
            self.task,
            self.depth,
            self.document,
            self.target_length,
            source,
            self.supervised,
            self.question_tokens,
        )


class NoMoreRecordsError(CalibrationError):
    """Every record of the split has been drawn for this length."""


class Generator:
    """Draws a task's items over given texts, within given frames, and has the parts that tasks put together.

    Attributes:
        task: What is drawn.
        tokenizer: A Hugging Face tokenizer.
        source: Filler text.
        frame: Tokens around the content.

    Args:
        task: See above.
        tokenizer: See above.
        source: See above.
        frame: By default plain text; left aside by tasks that are no request.
        free_room: Tokens kept for answers in the model's own words; by default as many as the data's answer has.
    """

    def __init__(
        self,
        task: DrawnTask,
        tokenizer: Any,
        source: TextSource,
        frame: Frame | None = None,
        free_room: int | None = None,
    ) -> None:
        self.task = task
        self.source = source
        self.frame = plain_frame(tokenizer) if frame is None or not task.in_chat else frame
        self.tokenizer = tokenizer
        self._free_room = free_room

    def draw(self, length: int, depth: float, rng: np.random.Generator) -> Item:
        """One item; see `DrawnTask.draw`."""
        return self.task.draw(self, length, depth, rng)

    def encode(self, text: str) -> Tokens:
        """Token ids of a text alone, ``[tokens]``."""
        return encode(self.tokenizer, text)

    def room(self, reference: Tokens) -> int:
        """Tokens kept for an answer in the model's own words."""
        return len(reference) if self._free_room is None else self._free_room

    def ending(self, asking: Asking) -> tuple[Tokens, Tokens, int]:
        """The prompt's end, the reference and the tokens of room for the answer."""
        own_words = asking.free and self.frame.is_chat
        text = asking.answers[0] if asking.answers else ""
        if self.frame.is_chat:
            lead = self.encode("" if own_words else asking.lead.lstrip())
            end = np.concatenate([self.encode(asking.question), self.frame.after, lead])
        else:
            end = self.encode(asking.question + asking.lead)
        reference = self.encode(text.lstrip() if own_words else text)
        if own_words:
            reference = np.concatenate([reference, self.frame.end])
        room = self.room(reference) if asking.free else len(reference)
        return end, reference, room

    def hide(self, needles: Sequence[tuple[float, str]], asking: Asking, length: int, rng: np.random.Generator) -> Item:
        """An item that hides texts at depths of the filler; the first needle is the sought one."""
        hidden = [(depth, self.encode(text)) for depth, text in needles]
        end, reference, room = self.ending(asking)
        fixed = sum(len(tokens) for _, tokens in hidden) + len(end) + room
        document, filler = self.source.cut(self.missing(length, fixed), rng)
        content = scattered(filler, hidden)
        return self.item(content, end, reference, asking, depth=needles[0][0], document=document, length=length)

    def missing(self, length: int, fixed: int) -> int:
        """Tokens of filler that bring an item to ``length``, given how many its other parts have."""
        missing = length - len(self.frame.before) - fixed
        if missing < fixed:
            least = length - missing + fixed
            raise CalibrationError(
                f"{self.task.name} items can't be as short as {length} tokens: this one needs {least}"
            )
        return missing

    def item(
        self,
        content: Tokens,
        end: Tokens,
        reference: Tokens,
        asking: Asking,
        *,
        depth: float,
        document: str,
        length: int,
    ) -> Item:
        """The item of these parts; see `Item`."""
        return Item(
            prompt=np.concatenate([self.frame.before, content, end]),
            reference=reference,
            accepted=asking.answers,
            ends=("turn" if self.frame.is_chat else "line") if asking.free else "reference",
            exact=False,
            task=self.task.kind,
            depth=depth,
            document=document,
            target_length=length,
            question_tokens=len(end),
        )


def scattered(filler: Tokens, hidden: Sequence[tuple[float, Tokens]]) -> Tokens:
    """``filler`` with texts put in at their depths, 0 to 1."""
    parts, last = [], 0
    for depth, tokens in sorted(hidden, key=lambda entry: entry[0]):
        at = round(depth * len(filler))
        parts += [filler[last:at], tokens]
        last = at
    return np.concatenate([*parts, filler[last:]])
