"""Texts and records out of files and data sets, one side of them at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from moa_search.data.conversations import Conversation, messages_of, with_request_last
from moa_search.data.finding import Found, find
from moa_search.data.sources import ROLES, SourceSpec
from moa_search.data.texts import Document, Split, documents, of_split, squeezed
from moa_search.errors import CalibrationError, ConfigError
from moa_search.formats.files import nearest, one_line

SECTION_CHARACTERS = 4_000
"""A text file is cut at line ends into sections of about this size, so that one book has all three splits."""


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


def load_texts(spec: SourceSpec, split: Split) -> tuple[Document, ...]:
    """The texts of one split that a built-in task hides things in.

    Raises:
        ConfigError: The data can't be read, or lacks the column.
        CalibrationError: None of it belongs to the split.
    """
    if not spec.data:
        return documents(split)
    found = find(spec)
    texts: list[Document] = []
    for number, text in enumerate(found.texts):
        texts += [(f"{spec.data}#{number}.{part}", section) for part, section in enumerate(_sections(text))]
    if found.parts:
        column = _column(spec, found, "text")
        texts += [
            (f"{spec.data}#{number}", _text(value, spec, column, place))
            for number, (place, (value,)) in enumerate(_rows(found, [column]))
        ]
    return _side(texts, spec, split)


def load_records(spec: SourceSpec, split: Split, *, answers: bool) -> tuple[Record, ...] | tuple[Conversation, ...]:
    """The records of one split: questions about contexts, or conversations.

    A context's side is that of all its questions. Rows with an empty context or question are left out, and so are those
    with an empty answer, or conversations with an empty message.

    Args:
        spec: The source.
        split: Which side.
        answers: Whether the data has to have answers.

    Raises:
        ConfigError: The data can't be read, or lacks a column.
        CalibrationError: None of it belongs to the split.
    """
    data = find(spec)
    if data.texts:
        raise ConfigError(f"source {spec.typed!r}: text files hold no questions; passkey:{spec.data} hides one")
    of_conversations = _conversation_columns(spec, data)
    if of_conversations:
        return _conversations(spec, data, of_conversations, split, answers=answers)
    if spec.turns != "last":
        raise ConfigError(f"source {spec.typed!r}: turns={spec.turns} is for conversations; its rows are questions")
    columns = [_column(spec, data, role) for role in ("context", "question")]
    answer = _column(spec, data, "answer", needed=answers or "answer" in spec.columns)
    wanted = [*columns, *([answer] if answer else [])]
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"source {spec.typed!r}: context, question and answer are not three columns: {wanted}")
    found: list[Record] = []
    names: dict[str, str] = {}
    for number, (place, cells) in enumerate(_rows(data, wanted)):
        context, question = (_text(cell, spec, name, place) for cell, name in zip(cells, columns, strict=False))
        accepted = _answers(cells[2], spec, answer, place) if answer else ()
        if context.strip() and question.strip() and (accepted or not answer):
            name = names.setdefault(squeezed(context), f"{spec.data}#{number}")
            found.append(Record(name, context, question.strip(), accepted))
    mine = dict(_side([(record.document, record.context) for record in found], spec, split))
    return tuple(record for record in found if record.document in mine)


def require_readable(spec: SourceSpec, split: Split) -> None:
    """Check what can be checked of a source before a model is loaded; saved samples need its tokenizer.

    Raises:
        ConfigError: The data can't be read, lacks a column, or has no answers.
        CalibrationError: None of it belongs to the split.
    """
    if spec.task == "records":
        load_records(spec, split, answers=True)
    elif spec.task != "samples":
        load_texts(spec, split)


def _conversation_columns(spec: SourceSpec, data: Found) -> list[str]:
    """The column of messages, or those of prompts and completions; none where rows are questions about contexts."""
    named = set(spec.columns)
    if not named & {"messages", "prompt", "completion"} and (
        named & {"context", "question", "answer"}
        or all(_column(spec, data, role, needed=False) for role in ("context", "question"))
    ):
        return []
    if "messages" in named or not named:
        messages = _column(spec, data, "messages", needed="messages" in named)
        if messages:
            return [messages]
    prompt, completion = (_column(spec, data, role, needed=bool(named)) for role in ("prompt", "completion"))
    return [prompt, completion] if prompt and completion else []


def _conversations(
    spec: SourceSpec, data: Found, columns: Sequence[str], split: Split, *, answers: bool
) -> tuple[Conversation, ...]:
    found: dict[str, Conversation] = {}
    for number, (place, cells) in enumerate(_rows(data, columns)):
        roles = ("user", "assistant") if len(columns) == 2 else ("",)
        try:
            messages = [m for cell, role in zip(cells, roles, strict=True) for m in messages_of(cell, role)]
            parts = with_request_last(messages, answered=answers)
        except ValueError as error:
            raise ConfigError(f"source {spec.typed!r}: {place}: column {columns[0]!r}: {error}") from None
        for _, text in messages:
            _text(text, spec, columns[0], place)
        if parts is not None:
            name = f"{spec.data}#{number}"
            found[name] = Conversation(name, *parts)
    mine = dict(_side([(name, conversation.text) for name, conversation in found.items()], spec, split))
    return tuple(conversation for name, conversation in found.items() if name in mine)


def _side(texts: list[Document], spec: SourceSpec, split: Split) -> tuple[Document, ...]:
    """Those of one split, each text once; its content decides its side."""
    unique = {squeezed(text): (name, text) for name, text in reversed(texts) if text.strip()}
    mine = of_split(list(reversed(unique.values())), split, key=lambda name, text: squeezed(text))
    if not mine:
        raise CalibrationError(
            f"source {spec.typed!r} has {len(unique)} documents, none of them for {split}; give more of them "
            f"(a text file counts as one for each {SECTION_CHARACTERS} characters)"
        )
    return mine


def _rows(found: Found, columns: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """The place of each row, for errors, and its cells of these columns."""
    for rows, start, stop in found.parts:
        values = [rows.column(name) if name in rows.columns else [None] * stop for name in columns]
        for index in range(start, stop):
            yield rows.place(index), [cells[index] for cells in values]


def _column(spec: SourceSpec, found: Found, role: str, *, needed: bool = True) -> str:
    """The column for a role: the one the user named, else the first default there is, else nothing."""
    asked = spec.columns.get(role)
    names = ROLES[role] if asked is None else (asked,)
    there = list(dict.fromkeys(name for rows, _, _ in found.parts for name in rows.columns))
    column = next((name for name in names if name in there), "")
    if not column and needed:
        near = nearest(asked, there) if asked else ""
        raise ConfigError(
            f"source {spec.typed!r} has no column {' or '.join(names)}{near}; it has {one_line(', '.join(there))}; "
            f"name one with {role}="
        )
    return column


def _text(value: Any, spec: SourceSpec, column: str, place: str) -> str:
    """A cell as text; a list's parts stand on lines of their own.

    Raises:
        ConfigError: It is neither text, a number, a truth value nor a list of those.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        return "\n".join(_text(part, spec, column, place) for part in value)
    text = _written(value)
    if text is None:
        kind = f"{value} as a number" if isinstance(value, float) else f"{type(value).__name__} values, not text"
        raise ConfigError(f"source {spec.typed!r}: {place}: column {column!r} holds {kind}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"source {spec.typed!r}: {place}: column {column!r} holds half a surrogate pair") from None
    return text


def _written(value: Any) -> str | None:
    """A value as a file would write it; None where that isn't certain."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return f"{value:f}" if isinstance(value, Decimal) and value.is_finite() else None


def _answers(value: Any, spec: SourceSpec, column: str, place: str) -> tuple[str, ...]:
    """Accepted answers in a cell: a text, a list of texts, or SQuAD's ``{"text": [...]}``."""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    parts = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for text in (_text(part, spec, column, place).strip() for part in parts) if text))


def _sections(text: str) -> list[str]:
    """``text`` cut at line ends into parts of about `SECTION_CHARACTERS`."""
    sections: list[list[str]] = [[]]
    size = 0
    for line in text.splitlines(keepends=True):
        if size >= SECTION_CHARACTERS:
            sections.append([])
            size = 0
        sections[-1].append(line)
        size += len(line)
    return ["".join(lines) for lines in sections]
