"""Conversations as people store them: OpenAI's and ShareGPT's messages, prompts with completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = tuple[str, str]
"""Role, one of ``system``, ``user`` and ``assistant``, and text."""

ROLE_OF = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant"),
}


@dataclass(frozen=True)
class Conversation:
    """A request with what came before it, and its answer.

    Attributes:
        document: Its name.
        messages: From a system prompt, where there is one, on: requests and answers in turn, a request last.
        answer: The answer to the last request; empty where the data has none.
    """

    document: str
    messages: tuple[Message, ...]
    answer: str

    @property
    def text(self) -> str:
        """What was said, but for the system prompt, which many conversations share."""
        said = [text for role, text in self.messages if role != "system"]
        return "\n\n".join([*said, self.answer])


def messages_of(value: Any, default_role: str = "") -> list[Message]:
    """The messages in a cell.

    Args:
        value: A list of messages with ``role`` and ``content`` or ``from`` and ``value``, or a text.
        default_role: Of a text; without one, a text is no conversation.

    Raises:
        ValueError: It is none, or holds something else than text; the message says what and where.
    """
    if value is None:
        return []
    if isinstance(value, str) and default_role:
        return [(default_role, value)]
    if not isinstance(value, list):
        raise ValueError(f"is no list of messages but {type(value).__name__}")
    return [_message(entry, number) for number, entry in enumerate(value, 1)]


def _message(entry: Any, number: int) -> Message:
    if not isinstance(entry, dict):
        raise ValueError(f"message {number} is no object with role and content")
    named = entry.get("role") or entry.get("from")
    role = ROLE_OF.get(str(named).lower())
    if role is None:
        raise ValueError(f"message {number} has the role {named!r}; known are {', '.join(ROLE_OF)}")
    if entry.get("tool_calls") or entry.get("function_call"):
        raise ValueError(f"message {number} calls tools; only texts can be used")
    content = entry.get("content") if entry.get("content") is not None else entry.get("value")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "\n".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise ValueError(f"message {number} holds something else than text")
    return role, content


def with_request_last(messages: Sequence[Message], *, answered: bool) -> tuple[tuple[Message, ...], str] | None:
    """A conversation up to its last request, and that one's answer; None where it has no such part, or an empty text.

    What is answered before anything was asked is left out, and so is an empty system prompt.

    Args:
        messages: The messages.
        answered: Whether the last request has to be one that has an answer.

    Raises:
        ValueError: Requests and answers don't take turns.
    """
    system = [message for message in messages[:1] if message[0] == "system" and message[1].strip()]
    said = list(messages[1:] if messages and messages[0][0] == "system" else messages)
    while said and said[0][0] == "assistant":
        del said[0]
    for number, (role, _) in enumerate(said):
        if role != ("user", "assistant")[number % 2]:
            raise ValueError("requests and answers don't take turns")
    if answered and len(said) % 2:
        del said[-1]
    if not said or not all(text.strip() for _, text in said):
        return None
    answer = said.pop()[1].strip() if said[-1][0] == "assistant" else ""
    return (*system, *said), answer
