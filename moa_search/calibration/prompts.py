"""How a prompt is put together from tokens, so that its length and its answer are exact by construction."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moa_search.calibration.samples import Sample
from moa_search.calibration.texts import TextSource, encode
from moa_search.errors import CalibrationError
from moa_search.formats.files import one_line

__all__ = ["Asking", "Ending", "Frame", "Generator", "Item", "chat_frame", "plain_frame", "scattered"]

Tokens = npt.NDArray[np.int64]
Ending = Literal["reference", "line", "turn"]

MARKER = "moaContentMarker"
"""Stands for the content when a chat template is rendered. Letters only, so that no template trims or escapes it."""

TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024", "enable_thinking": False}
"""Templates that print today's date would give other samples tomorrow; thoughts would fill the room for answers."""

NOON = {
    **{
        "%c": "%a %b %d %T %Y",
        "%x": "%D",
        "%X": "%T",
        "%F": "%Y-%m-%d",
        "%D": "%m/%d/%y",
        "%T": "%R:%S",
        "%R": "%H:%M",
    },
    **{
        "%Y": "2024",
        "%y": "24",
        "%B": "July",
        "%b": "Jul",
        "%h": "Jul",
        "%m": "07",
        "%-m": "7",
        "%d": "26",
        "%-d": "26",
    },
    **{"%e": "26", "%j": "208", "%A": "Friday", "%a": "Fri", "%u": "5", "%w": "5", "%H": "12", "%-H": "12", "%I": "12"},
    **{"%-I": "12", "%M": "00", "%-M": "0", "%S": "00", "%-S": "0", "%f": "000000", "%p": "PM", "%Z": "", "%z": ""},
}
"""The same day's noon, in English, for templates that format the date by themselves; in the order of replacement."""


@dataclass(frozen=True, eq=False)
class Frame:
    """Tokens around a prompt's content: a start token in plain text, a user's turn in a chat.

    Attributes:
        before: Before the content.
        after: After the content, up to where the answer starts.
        end: After a whole answer.
        is_chat: Whether they come from a chat template.
    """

    before: Tokens
    after: Tokens
    end: Tokens
    is_chat: bool


def plain_frame(tokenizer: Any) -> Frame:
    """The tokenizer's start token, where it has one."""
    nothing = np.empty(0, np.int64)
    return Frame(np.asarray(tokenizer("")["input_ids"], dtype=np.int64), nothing, nothing, False)


def chat_frame(tokenizer: Any) -> Frame:
    """What the tokenizer's chat template puts around a user's content and an assistant's answer.

    Raises:
        CalibrationError: The template can't be rendered, or changes the content.
    """
    user = {"role": "user", "content": MARKER}
    before, after = _rendered(tokenizer, [user], add_generation_prompt=True)
    question = {"role": "user", "content": "question"}
    _, rest = _rendered(tokenizer, [question, {"role": "assistant", "content": MARKER}])
    ending = encode(tokenizer, rest)[:1]
    marks = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ending = ending[[int(token) in marks for token in ending]]
    return Frame(encode(tokenizer, before), encode(tokenizer, after), ending, True)


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> tuple[str, str]:
    """A rendered conversation before and after the marker."""
    hint = "use chat 'never', or a tokenizer with another template"
    drawn = random.getstate()
    random.seed(0)  # Jinja's `random` and `lipsum` draw from it
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _fixed_clock() + template
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **TEMPLATE_OPTIONS, **options
        )
    except Exception as error:  # a template is a program of its model's maker
        raise CalibrationError(f"the chat template can't be rendered ({one_line(error)}); {hint}") from error
    finally:
        random.setstate(drawn)
    if text.count(MARKER) != 1:
        raise CalibrationError(f"the chat template gives a message {text.count(MARKER)} times instead of once; {hint}")
    before, after = text.split(MARKER)
    return before, after


def _fixed_clock() -> str:
    """A Jinja macro in place of `strftime_now`: transformers' own reads the clock and the locale."""
    replaced = "".join(f" | replace({code!r}, {text!r})" for code, text in NOON.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


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
        task: Generator that made it.
        depth: Where the sought text stands, 0 to 1.
        document: Text it comes from.
        target_length: Tokens of the prompt and of the room for the answer.
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

    def answered(self, answer: Tokens, source: str = "") -> Sample:
        """The sample with this answer."""
        ids = np.concatenate([self.prompt, answer])
        return Sample(ids, len(answer), self.task, self.depth, self.document, self.target_length, source)


class Generator(ABC):
    """Makes items of one task. Override `draw`.

    Args:
        tokenizer: A Hugging Face tokenizer.
        source: Filler text.
        frame: Tokens around the content; by default plain text.
        free_room: Tokens kept for answers in the model's own words; by default as many as the data's answer has.
    """

    name: str
    """Name on the command line."""

    def __init__(
        self, tokenizer: Any, source: TextSource, frame: Frame | None = None, free_room: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._frame = plain_frame(tokenizer) if frame is None else frame
        self._free_room = free_room

    @abstractmethod
    def draw(self, length: int, depth: float, rng: np.random.Generator) -> Item:
        """One item of exactly ``length`` tokens, the room for its answer included.

        Args:
            length: Tokens.
            depth: Where the sought text stands, 0 (start) to 1 (end).
            rng: For everything else.

        Raises:
            CalibrationError: ``length`` is too short for the task.
        """

    def build(self, length: int, depth: float, rng: np.random.Generator) -> Sample:
        """One sample with the data's own answer; see `draw`."""
        item = self.draw(length, depth, rng)
        return item.answered(item.reference)

    def _encode(self, text: str) -> Tokens:
        return encode(self._tokenizer, text)

    def _ending(self, asking: Asking) -> tuple[Tokens, Tokens, int]:
        """The prompt's end, the reference and the tokens of room for the answer."""
        own_words = asking.free and self._frame.is_chat
        text = asking.answers[0] if asking.answers else ""
        if self._frame.is_chat:
            lead = self._encode("" if own_words else asking.lead.lstrip())
            end = np.concatenate([self._encode(asking.question), self._frame.after, lead])
        else:
            end = self._encode(asking.question + asking.lead)
        reference = self._encode(text.lstrip() if own_words else text)
        if own_words:
            reference = np.concatenate([reference, self._frame.end])
        room = self._free_room if asking.free and self._free_room is not None else len(reference)
        return end, reference, room

    def _hide(
        self, needles: Sequence[tuple[float, str]], asking: Asking, length: int, rng: np.random.Generator
    ) -> Item:
        """An item that hides texts at depths of the filler; the first needle is the sought one."""
        hidden = [(depth, self._encode(text)) for depth, text in needles]
        end, reference, room = self._ending(asking)
        fixed = sum(len(tokens) for _, tokens in hidden) + len(end) + room
        document, filler = self._source.cut(self._missing(length, fixed), rng)
        content = scattered(filler, hidden)
        return self._item(content, end, reference, asking, depth=needles[0][0], document=document, length=length)

    def _missing(self, length: int, fixed: int) -> int:
        """Tokens of filler that bring an item to ``length``, given how many its other parts have."""
        missing = length - len(self._frame.before) - fixed
        if missing < fixed:
            raise CalibrationError(f"{self.name} samples can't be as short as {length} tokens")
        return missing

    def _item(
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
        return Item(
            prompt=np.concatenate([self._frame.before, content, end]),
            reference=reference,
            accepted=asking.answers,
            ends=("turn" if self._frame.is_chat else "line") if asking.free else "reference",
            exact=False,
            task=self.name,
            depth=depth,
            document=document,
            target_length=length,
        )


def scattered(filler: Tokens, hidden: Sequence[tuple[float, Tokens]]) -> Tokens:
    """``filler`` with texts put in at their depths, 0 to 1."""
    parts, last = [], 0
    for depth, tokens in sorted(hidden, key=lambda entry: entry[0]):
        at = round(depth * len(filler))
        parts += [filler[last:at], tokens]
        last = at
    return np.concatenate([*parts, filler[last:]])
