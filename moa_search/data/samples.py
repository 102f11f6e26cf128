"""Token sequences with a supervised answer at their end: what profiling and evaluation run on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moa_search.formats.files import sha256_of


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt with its answer.

    Attributes:
        ids: Token ids of prompt and answer, ``[length]``.
        answer_tokens: How many of the last tokens are the answer.
        task: Generator that made it.
        depth: Where the sought text stands in the prompt, 0 (start) to 1 (end).
        document: Text the filler comes from.
        target_length: Tokens asked for; a model's own answer can be shorter than the room kept for it. By
            default the sample's own length.
        source: What a user typed for the source it comes from; empty for the built-in tasks over built-in text.
        supervised: Which of the answer's tokens count, ``[answer_tokens]``; None for all of them.
        question_tokens: How many of the prompt's last tokens ask the question, so that what is before them can be read
            without knowing it; 0 where nothing tells them apart.
        room: Tokens that a model may take for an answer of its own, where that is scored by ``grade``.
        grade: Scores an answer of the model's own, token ids ``[token]``, 0 to 1; None where it has to be the answer
            token by token.
    """

    ids: npt.NDArray[np.int64]
    answer_tokens: int
    task: str
    depth: float
    document: str
    target_length: int = 0
    source: str = ""
    supervised: npt.NDArray[np.bool_] | None = None
    question_tokens: int = 0
    room: int = 0
    grade: Callable[[npt.NDArray[np.int64]], float] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.target_length:
            object.__setattr__(self, "target_length", len(self.ids))
        assert 0 < self.answer_tokens <= len(self.ids) <= self.target_length
        assert 0 <= self.question_tokens <= len(self.ids) - self.answer_tokens
        assert self.supervised is None or (len(self.supervised) == self.answer_tokens and self.supervised.any())

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.ids)

    @property
    def generated_tokens(self) -> int:
        """How many tokens a model answers with, where it does so by itself."""
        return self.room if self.grade is not None else self.answer_tokens

    @property
    def counted(self) -> npt.NDArray[np.bool_]:
        """Which of the answer's tokens count, ``[answer_tokens]``."""
        return np.ones(self.answer_tokens, dtype=bool) if self.supervised is None else self.supervised

    @property
    def prompt(self) -> npt.NDArray[np.int64]:
        """Token ids before the answer."""
        return self.ids[: -self.answer_tokens]

    @property
    def answer(self) -> npt.NDArray[np.int64]:
        """Token ids of the answer."""
        return self.ids[-self.answer_tokens :]


def hash_samples(samples: Iterable[Sample]) -> str:
    """A hash over the tokens, answer lengths and supervised tokens of ``samples``, in order."""
    return sha256_of(*map(_content, samples))


def _content(sample: Sample) -> bytes:
    mask = b"" if sample.supervised is None else b" supervised" + np.packbits(sample.supervised).tobytes()
    return f"{sample.task} {sample.answer_tokens}".encode() + sample.ids.tobytes() + mask
