"""Built-in calibration tasks: find a passkey, copy a passage. Answers need text from far away.

Samples have exactly the length asked for, and the supervised tokens are known by construction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.calibration.samples import Sample
from moa_search.calibration.texts import Split, TextSource
from moa_search.errors import CalibrationError, ConfigError
from moa_search.formats.files import nearest

__all__ = ["GENERATORS", "CopyGenerator", "Generator", "PasskeyGenerator", "build_samples"]

Tokens = npt.NDArray[np.int64]


class Generator(ABC):
    """Makes samples of one task. Override `build`.

    Args:
        tokenizer: A Hugging Face tokenizer.
        source: Filler text.
    """

    name: str
    """Name on the command line."""

    def __init__(self, tokenizer: Any, source: TextSource) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._start = self._encode("", special=True)

    @abstractmethod
    def build(self, length: int, depth: float, rng: np.random.Generator) -> Sample:
        """One sample of exactly ``length`` tokens whose sought text stands at ``depth`` (0 start, 1 end).

        Raises:
            CalibrationError: ``length`` is too short for the task.
        """

    def _encode(self, text: str, *, special: bool = False) -> Tokens:
        ids = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    def _filler(self, length: int, fixed: Sequence[Tokens], rng: np.random.Generator) -> tuple[str, Tokens]:
        """Filler that brings the sample to ``length``, given its other parts."""
        missing = length - len(self._start) - sum(map(len, fixed))
        if missing < sum(map(len, fixed)):
            raise CalibrationError(f"{self.name} samples can't be as short as {length} tokens")
        return self._source.cut(missing, rng)


class PasskeyGenerator(Generator):
    """A five-digit passkey hidden in text (Mohtashami and Jaggi, 2023, arXiv 2305.16300)."""

    name = "passkey"

    def build(self, length: int, depth: float, rng: np.random.Generator) -> Sample:
        """See `Generator.build`."""
        key = int(rng.integers(10_000, 100_000))
        needle = self._encode(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
        question = self._encode("\n\nWhat is the pass key? The pass key is")
        answer = self._encode(f" {key}")
        document, filler = self._filler(length, (needle, question, answer), rng)
        at = round(depth * len(filler))
        ids = np.concatenate([self._start, filler[:at], needle, filler[at:], question, answer])
        return Sample(ids, len(answer), self.name, depth, document)


class CopyGenerator(Generator):
    """The first tokens of an earlier passage are repeated; the answer is how it goes on (induction)."""

    name = "copy"
    cue_tokens = 8
    answer_tokens = 24
    attempts = 200

    def build(self, length: int, depth: float, rng: np.random.Generator) -> Sample:
        """See `Generator.build`."""
        passage_tokens = self.cue_tokens + self.answer_tokens
        separator = self._encode("\n\n")
        document, filler = self._filler(length, (separator, np.empty(passage_tokens, np.int64)), rng)
        last = len(filler) - passage_tokens
        for _ in range(self.attempts):
            at = round(depth * last)
            passage = filler[at : at + passage_tokens]
            if _occurrences(filler, passage[: self.cue_tokens]) == 1:
                ids = np.concatenate([self._start, filler, separator, passage])
                return Sample(ids, self.answer_tokens, self.name, at / max(last, 1), document)
            depth = float(np.clip(depth + rng.normal(0, 0.02), 0, 1))
        raise CalibrationError(f"no passage of {document} near depth {depth:.2f} starts with a unique cue")


GENERATORS: dict[str, type[Generator]] = {kind.name: kind for kind in (PasskeyGenerator, CopyGenerator)}
"""Built-in tasks by name."""


def build_samples(
    tokenizer: Any,
    *,
    length: int,
    count: int,
    seed: int,
    split: Split,
    tasks: Sequence[str] = ("passkey", "copy"),
) -> list[Sample]:
    """``count`` samples of exactly ``length`` tokens, the tasks taking turns, depths uniform within each task.

    The same arguments give the same samples.

    Raises:
        ConfigError: A task is unknown, there is none, or the seed is negative.
        CalibrationError: ``length`` is too short or too long for the texts.
    """
    if not tasks:
        raise ConfigError(f"no task is named; choose from {', '.join(GENERATORS)}")
    for task in tasks:
        if task not in GENERATORS:
            raise ConfigError(
                f"task {task!r} is unknown{nearest(task, GENERATORS)}; choose from {', '.join(GENERATORS)}"
            )
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be at least 0")
    source = TextSource(tokenizer, split)
    rng = np.random.default_rng([seed, length])
    turns = [tasks[i % len(tasks)] for i in range(count)]
    depths = {task: _stratified(turns.count(task), rng) for task in tasks}
    makers = {task: GENERATORS[task](tokenizer, source) for task in tasks}
    return [makers[task].build(length, next(depths[task]), rng) for task in turns]


def _stratified(count: int, rng: np.random.Generator) -> Iterator[float]:
    """One uniform draw from each of ``count`` equal slices of [0, 1), in random order."""
    return iter(rng.permutation((np.arange(count) + rng.random(count)) / max(count, 1)).tolist())


def _occurrences(text: Tokens, pattern: Tokens) -> int:
    views = np.lib.stride_tricks.sliding_window_view(text, len(pattern))
    return int((views == pattern).all(axis=1).sum())
