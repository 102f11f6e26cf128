"""What every task is: items of an exact length, and how a model's answers to them become scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from moa_search.calibration import Sample, hash_samples
from moa_search.calibration.generators import draw_round
from moa_search.calibration.prompts import Generator
from moa_search.calibration.texts import TextSource
from moa_search.evaluation.scoring import generate_answer, score_answer

__all__ = ["Answers", "ExactMatchTask", "GeneratedTask", "Reading", "Task", "TokenAccuracyTask"]

HELD_OUT_SEED = 20_000
"""Offset of the seed, so that equal seeds don't give evaluation and calibration the same draws."""

Answers = Literal["forced", "generated"]
"""``forced``: each answer token is predicted given those before it; ``generated``: the model answers greedily."""


@dataclass(frozen=True)
class Reading:
    """What one item, or one part of it, says.

    Attributes:
        depth: Where in the item, 0 (start) to 1 (end).
        nll: Mean negative log-likelihood in nats per answer token; not a number where the answer was generated.
        score: 0 to 1.
    """

    depth: float
    nll: float
    score: float


class Task(ABC):
    """One kind of item with its score. Override `build` and `score`.

    Items come from texts that calibration never uses.

    Attributes:
        name: On the command line, with the data after it where a user names some.
        metric: What the score is.
        always_forced: Whether answers are teacher-forced even where others are generated.
        at_depths: Whether items can be asked for at chosen depths.
        is_retrieval: Whether the score says how many items were answered rightly as a whole, so that the longest
            length at which most are is an effective context length.
    """

    name: str
    metric: str
    always_forced: ClassVar[bool] = False
    at_depths: ClassVar[bool] = True
    is_retrieval: ClassVar[bool] = False

    @abstractmethod
    def build(
        self, tokenizer: Any, *, length: int, count: int, seed: int, depths: Sequence[float] = ()
    ) -> list[Sample]:
        """Items of ``length`` tokens, answer included; equal arguments, equal items.

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
        """Score of one item, 0 to 1.

        Args:
            correct: For each answer token, whether it is the one that the model gave or ranks first.
        """

    def places(self, depths: Sequence[float]) -> int:
        """At how many places the sought text is put where ``depths`` are asked for; each has a count of items."""
        return max(1, len(depths)) if self.at_depths else 1

    def way(self, answers: Answers) -> Answers:
        """How this task is answered where ``answers`` is asked for."""
        return "forced" if self.always_forced else answers

    def metric_of(self, answers: Answers) -> str:
        """What the score is where answers came about in this way."""
        return self.metric

    def identity(self, samples: Sequence[Sample]) -> str:
        """A hash over items of this task and what they are scored by."""
        return hash_samples(samples)

    def measure(self, model: Any, tokenizer: Any, sample: Sample, answers: Answers) -> list[Reading]:
        """Answer one item.

        Args:
            model: A causal language model, under a plan or not.
            tokenizer: Its tokenizer.
            sample: Made by `build`.
            answers: How; see `Answers`.
        """
        answer = (score_answer if self.way(answers) == "forced" else generate_answer)(model, sample)
        return [Reading(sample.depth, answer.nll, self.score(answer.correct))]


class GeneratedTask(Task):
    """Items of a `Generator` over the standard library's held-out texts."""

    generator: ClassVar[type[Generator]]

    def build(
        self, tokenizer: Any, *, length: int, count: int, seed: int, depths: Sequence[float] = ()
    ) -> list[Sample]:
        """See `Task.build`."""
        maker = self.generator(tokenizer, TextSource.library(tokenizer, "test"))
        turns = [self.name] * (count * self.places(depths))
        drawn = draw_round({self.name: maker}, turns, length, HELD_OUT_SEED + seed, depths=depths)
        return [item.answered(item.reference) for item in drawn[self.name]]


class ExactMatchTask(GeneratedTask):
    """Every token of the answer right: what greedy decoding would print."""

    metric = "exact match"
    is_retrieval = True

    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """See `Task.score`."""
        return float(correct.all())


class TokenAccuracyTask(GeneratedTask):
    """Share of the answer's tokens that are right, each in its place."""

    metric = "token accuracy"

    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """See `Task.score`."""
        return float(correct.mean())
