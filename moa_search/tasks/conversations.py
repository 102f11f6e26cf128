"""Conversations of a data set, brought to any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.data.conversations import Conversation, Message
from moa_search.data.frames import chat_pieces
from moa_search.data.texts import TextSource
from moa_search.tasks.base import TokenAccuracyTask
from moa_search.tasks.items import Generator, Item, NoMoreRecordsError

Tokens = npt.NDArray[np.int64]


class ConversationTask(TokenAccuracyTask):
    """Conversations in random order, each once per length.

    One that is too long loses its oldest exchanges, and a single request that is too long its middle; one that is too
    short has other conversations in front of its first request. An answer in the model's own words is right whatever it
    says: requests of this kind have no one right answer.

    Args:
        conversations: Of one split.
        label: What they are called in errors.
        every_turn: Whether all answers are supervised, rather than the last one.
    """

    name = "conversation"

    def __init__(self, conversations: Sequence[Conversation], label: str, *, every_turn: bool = False) -> None:
        self._conversations = conversations
        self._label = label
        self._every_turn = every_turn
        self._waiting: dict[int, Iterator[int]] = {}
        self._pieces: dict[tuple[str, ...], list[Tokens]] = {}

    def texts(self, tokenizer: Any) -> TextSource:
        """All conversations, as filler."""
        texts = [(conversation.document, conversation.text) for conversation in self._conversations]
        return TextSource(tokenizer, texts, f"the other conversations of {self._label}", joint="\n\n")

    def draw(self, maker: Generator, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `DrawnTask.draw`; ``depth`` is left aside.

        Conversations whose last answer leaves less than half of ``length`` for the rest are passed over.

        Raises:
            NoMoreRecordsError: Every conversation was drawn for this length, or passed over.
        """
        count = len(self._conversations)
        for index in self._waiting.setdefault(length, iter(rng.permutation(count).tolist())):
            item = self._drawn(maker, self._conversations[index], length, rng)
            if item is not None:
                return item
        raise NoMoreRecordsError(f"{self._label} has no more than {count} conversations for {length} tokens")

    def _drawn(
        self, maker: Generator, conversation: Conversation, length: int, rng: np.random.Generator
    ) -> Item | None:
        answer = self._answer(maker, conversation.answer)
        room = maker.room(answer)
        messages = list(conversation.messages)
        while True:
            pieces, texts = self._around(maker, messages), [self._said(maker, message) for message in messages]
            first = next(number for number, (role, _) in enumerate(messages) if role == "user")
            missing = length - room - sum(map(len, pieces)) - sum(map(len, texts)) + len(texts[first])
            if missing >= len(texts[first]) or first == len(messages) - 1:
                break
            del messages[first : first + 2]
        if 2 * (length - room) < length or missing < 1:
            return None
        texts[first], before = self._request(maker, texts[first], missing, conversation.document, rng)
        return self._item(maker, pieces, messages, texts, answer, conversation, length, start=(first, before))

    def _request(
        self, maker: Generator, text: Tokens, length: int, document: str, rng: np.random.Generator
    ) -> tuple[Tokens, int]:
        """A request brought to ``length`` tokens, and how many stand before its own."""
        if len(text) >= length:
            head = (length + 1) // 2
            return np.concatenate([text[:head], text[len(text) - (length - head) :]]), 0
        gap = maker.encode("\n\n")[: length - len(text)]
        before = length - len(text) - len(gap)
        _, filler = maker.source.cut(before, rng, without=document)
        return np.concatenate([filler, gap, text]), before + len(gap)

    def _item(
        self,
        maker: Generator,
        pieces: Sequence[Tokens],
        messages: Sequence[Message],
        texts: Sequence[Tokens],
        answer: Tokens,
        conversation: Conversation,
        length: int,
        *,
        start: tuple[int, int],
    ) -> Item:
        first, before = start
        # piece, text, piece, text, ..., piece: the last piece ends where the answer starts
        parts = [part for pair in zip(pieces, texts, strict=False) for part in pair] + [pieces[-1]]
        marks = [np.zeros(len(part), dtype=bool) for part in parts]
        if self._every_turn:
            for number, (role, _) in enumerate(messages):
                if role == "assistant":
                    marks[2 * number + 1][:] = True
                    ends = len(maker.frame.end) and parts[2 * number + 2][:1].tolist() == maker.frame.end.tolist()
                    marks[2 * number + 2][:1] |= bool(ends)
        ids, supervised = np.concatenate([*parts, answer]), np.concatenate([*marks, np.ones(len(answer), dtype=bool)])
        asked = int(supervised.argmax()) if self._every_turn else len(ids) - len(answer)
        own = sum(map(len, parts[: 2 * first + 1])) + before
        return Item(
            prompt=ids[:asked],
            reference=ids[asked:],
            accepted=(),
            ends="turn" if maker.frame.is_chat else "line",
            exact=False,
            task=self.name,
            depth=own / length,
            document=conversation.document,
            target_length=length,
            supervised=supervised[asked:] if self._every_turn else None,
        )

    def _around(self, maker: Generator, messages: Sequence[Message]) -> list[Tokens]:
        """Tokens before each message, and before the answer."""
        roles = tuple(role for role, _ in messages)
        if roles not in self._pieces:
            if maker.frame.is_chat:
                pieces = [maker.encode(piece) for piece in chat_pieces(maker.tokenizer, roles)]
            else:
                names = [f"\n\n{role.capitalize()}:{' ' * (role != 'assistant')}" for role in (*roles, "assistant")]
                pieces = [maker.encode(name.lstrip() if not number else name) for number, name in enumerate(names)]
                pieces[0] = np.concatenate([maker.frame.before, pieces[0]])
            self._pieces[roles] = pieces
        return self._pieces[roles]

    def _said(self, maker: Generator, message: Message) -> Tokens:
        role, text = message
        return maker.encode(f" {text}" if role == "assistant" and not maker.frame.is_chat else text)

    def _answer(self, maker: Generator, text: str) -> Tokens:
        if not text:
            return np.empty(0, np.int64)
        return np.concatenate([self._said(maker, ("assistant", text)), maker.frame.end])
