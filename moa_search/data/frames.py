"""Tokens around a prompt's content: a start token, or a chat template's turns."""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.data.texts import encode
from moa_search.errors import CalibrationError
from moa_search.formats.files import one_line

Tokens = npt.NDArray[np.int64]

MARKER = "moaContentMarker"
"""Stands for the content when a chat template is rendered. Letters only, so that no template trims or escapes it."""

HINT = "use chat 'never', or a tokenizer with another template"

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


def chat_pieces(tokenizer: Any, roles: Sequence[str]) -> list[str]:
    """What the chat template puts before each message of these roles, and before the answer to the last.

    Raises:
        CalibrationError: The template can't be rendered, or changes the messages or their order.
    """
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    marks = [f"{MARKER}{''.join(four)}" for _, four in zip(roles, letters, strict=False)]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    rest, pieces = _render(tokenizer, messages, add_generation_prompt=True), []
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise CalibrationError(f"the chat template doesn't give every message once and in order; {HINT}")
        pieces.append(piece)
    return [*pieces, rest]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> tuple[str, str]:
    """A rendered conversation before and after the marker."""
    text = _render(tokenizer, messages, **options)
    if text.count(MARKER) != 1:
        raise CalibrationError(f"the chat template gives a message {text.count(MARKER)} times instead of once; {HINT}")
    before, after = text.split(MARKER)
    return before, after


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    drawn = random.getstate()
    random.seed(0)  # Jinja's `random` and `lipsum` draw from it
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _fixed_clock() + template
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, **TEMPLATE_OPTIONS, **options
            )
        )
    except Exception as error:  # a template is a program of its model's maker
        raise CalibrationError(f"the chat template can't be rendered ({one_line(error)}); {HINT}") from error
    finally:
        random.setstate(drawn)


def _fixed_clock() -> str:
    """A Jinja macro in place of `strftime_now`: transformers' own reads the clock and the locale."""
    replaced = "".join(f" | replace({code!r}, {text!r})" for code, text in NOON.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"
