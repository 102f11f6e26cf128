"""What every task is: items of an exact length, and how a model's answers to them become scores."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from moa_search.data.loading import load_texts
from moa_search.data.samples import Sample
from moa_search.data.sources import SourceSpec
from moa_search.data.texts import Document, TextSource
from moa_search.tasks.items import Generator, Item
from moa_search.tasks.turns import draw_round

HELD_OUT_SEED = 20_000
"""Offset of the seed, so that equal seeds don't give evaluation and calibration the same draws."""

AnswerMode = Literal["forced", "generated"]
"""``forced``: each answer token is predicted given those before it; ``generated``: the model answers greedily."""


class Task(ABC):
    """One kind of item with its score. Override `held_out` and `score`; most tasks derive from `DrawnTask`.

    Attributes:
        name: On the command line and in tables, with the data after it where a user names some.
        data: File, pattern, folder or dataset id that a user names; empty for the project's own texts.
        metric: What the score is.
        always_forced: Whether answers are teacher-forced even where others are generated.
        at_depths: Whether items can be asked for at chosen depths.
        is_retrieval: Whether the score says how many items were answered rightly as a whole, so that the longest
            length at which most are is an effective context length.
        slices: Parts of an answer, by position, that are scored apart.
    """

    name: str
    data: str = ""
    metric: str
    always_forced: ClassVar[bool] = False
    at_depths: ClassVar[bool] = True
    is_retrieval: ClassVar[bool] = False
    slices: ClassVar[int] = 1

    @abstractmethod
    def held_out(
        self, tokenizer: Any, *, length: int, count: int, seed: int, depths: Sequence[float] = ()
    ) -> list[Sample]:
        """Items of ``length`` tokens, answer included, that calibration never uses; equal arguments, equal items.

        Args:
            tokenizer: A Hugging Face tokenizer.
            length: Tokens per item.
            count: Items, or items per depth where depths are given.
            seed: At least 0.
            depths: Where the sought text stands, 0 to 1; by default spread evenly. Left aside where a task has no
                such place.

        Raises:
            CalibrationError: ``length`` is too short or too long for the task.
            ConfigError: The task's data can't be used.
        """

    @abstractmethod
    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """Score of one item, or of one of its `slices`, 0 to 1.

        Args:
            correct: For each answer token, whether it is the one that the model gave or ranks first.
        """

    def metric_of(self, answers: AnswerMode) -> str:
        """What the score of answers that came about so is; see `answer_mode`."""
        return self.metric

    def places(self, depths: Sequence[float]) -> int:
        """At how many places the sought text is put where ``depths`` are asked for; each has a count of items."""
        return max(1, len(depths)) if self.at_depths else 1

    def answer_mode(self, answers: AnswerMode) -> AnswerMode:
        """How this task is answered where ``answers`` is asked for."""
        return "forced" if self.always_forced else answers


class DrawnTask(Task):
    """A task whose items are drawn one by one from a source of text. Override `draw` and `score`.

    Attributes:
        in_chat: Whether an item is a request, which a chat's turns may surround.
        is_source: Whether profiles can be calibrated on it.
    """

    in_chat: ClassVar[bool] = True
    is_source: ClassVar[bool] = True
    _texts: Sequence[Document] | None = None

    @property
    def kind(self) -> str:
        """Its name without a user's data, which its items have in calibration, too."""
        return type(self).name

    def over(self, source: SourceSpec) -> Self:
        """The same task in texts of a user's; their side that calibration never uses is read now.

        Raises:
            ConfigError: They can't be read.
            CalibrationError: None of them is held out.
        """
        other = copy.copy(self)
        other.name, other.data, other._texts = source.typed, source.data, load_texts(source, "test")
        return other

    @abstractmethod
    def draw(self, maker: Generator, length: int, depth: float, rng: np.random.Generator) -> Item:
        """One item of exactly ``length`` tokens, the room for its answer included.

        Args:
            maker: Has the texts and frames, and puts items together.
            length: Tokens.
            depth: Where the sought text stands, 0 (start) to 1 (end).
            rng: For everything else.

        Raises:
            CalibrationError: ``length`` is too short for the task.
        """

    def texts(self, tokenizer: Any) -> TextSource:
        """What held-out items are drawn from: a user's texts, else the standard library's."""
        if self._texts is None:
            return TextSource.library(tokenizer, "test")
        return TextSource(tokenizer, self._texts, f"the held-out texts of {self.name}", joint="\n\n")

    def held_out(
        self, tokenizer: Any, *, length: int, count: int, seed: int, depths: Sequence[float] = ()
    ) -> list[Sample]:
        """See `Task.held_out`."""
        maker = Generator(self, tokenizer, self.texts(tokenizer))
        turns = [self.kind] * (count * self.places(depths))
        depths = depths if self.at_depths else ()
        drawn = draw_round({self.kind: maker}, turns, length, HELD_OUT_SEED + seed, depths=depths)
        return [item.answered(item.reference) for item in drawn[self.kind]]


class ExactMatchTask(DrawnTask):
    """Every token of the answer right: what greedy decoding would print."""

    metric = "exact match"
    is_retrieval = True

    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """See `Task.score`."""
        return float(correct.all())


class TokenAccuracyTask(DrawnTask):
    """Share of the answer's tokens that are right, each in its place."""

    metric = "token accuracy"

    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """See `Task.score`."""
        return float(correct.mean())
