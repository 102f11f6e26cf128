"""Built-in calibration tasks: find a passkey, tell passkeys apart, copy a passage, answer a question.

Answers need text from far away. Samples have exactly the length asked for, and the supervised tokens are known by
construction.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.calibration.facts import NAMES, QuestionGenerator
from moa_search.calibration.prompts import Asking, Frame, Generator, Item
from moa_search.calibration.records import NoMoreRecordsError
from moa_search.calibration.samples import Sample
from moa_search.calibration.texts import Split, TextSource
from moa_search.errors import CalibrationError, ConfigError
from moa_search.formats.files import nearest

__all__ = [
    "GENERATORS",
    "CopyGenerator",
    "Generator",
    "MultikeyGenerator",
    "PasskeyGenerator",
    "build_samples",
    "draw_round",
    "take_turns",
]

Tokens = npt.NDArray[np.int64]


class PasskeyGenerator(Generator):
    """A five-digit passkey hidden in text (Mohtashami and Jaggi, 2023, arXiv 2305.16300)."""

    name = "passkey"

    def draw(self, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `Generator.draw`."""
        key = int(rng.integers(10_000, 100_000))
        needle = f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
        asking = Asking("\n\nWhat is the pass key?", " The pass key is", (f" {key}",))
        return self._hide([(depth, needle)], asking, length, rng)


class MultikeyGenerator(Generator):
    """Passkeys of several people at random depths; one of them is asked for (RULER's multi-key retrieval)."""

    name = "multikey"
    keys = 3

    def draw(self, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `Generator.draw`; ``depth`` is that of the key asked for."""
        names = rng.choice(NAMES, self.keys, replace=False).tolist()
        keys = (10_000 + rng.choice(90_000, self.keys, replace=False)).tolist()
        depths = [depth, *rng.random(self.keys - 1).tolist()]
        needles = [
            (at, f"\n\nThe pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.\n\n")
            for at, name, key in zip(depths, names, keys, strict=True)
        ]
        asked = f"the pass key of {names[0]}"
        asking = Asking(f"\n\nWhat is {asked}?", f" The{asked[3:]} is", (f" {keys[0]}",))
        return self._hide(needles, asking, length, rng)


class CopyGenerator(Generator):
    """The first tokens of an earlier passage are repeated; the answer is how it goes on (induction).

    A continuation, not a request: it never has a chat's turns around it.
    """

    name = "copy"
    cue_tokens = 8
    answer_tokens = 24
    attempts = 200

    def __init__(
        self, tokenizer: Any, source: TextSource, frame: Frame | None = None, free_room: int | None = None
    ) -> None:
        super().__init__(tokenizer, source, None, free_room)

    def draw(self, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `Generator.draw`."""
        passage_tokens = self.cue_tokens + self.answer_tokens
        separator = self._encode("\n\n")
        missing = self._missing(length, len(separator) + passage_tokens)
        document, filler = self._source.cut(missing, rng)
        last = len(filler) - passage_tokens
        for _ in range(self.attempts):
            at = round(depth * last)
            passage = filler[at : at + passage_tokens]
            if _occurrences(filler, passage[: self.cue_tokens]) == 1:
                return Item(
                    prompt=np.concatenate([self._frame.before, filler, separator, passage[: self.cue_tokens]]),
                    reference=passage[self.cue_tokens :],
                    accepted=(),
                    ends="reference",
                    exact=True,
                    task=self.name,
                    depth=at / max(last, 1),
                    document=document,
                    target_length=length,
                )
            depth = float(np.clip(depth + rng.normal(0, 0.02), 0, 1))
        raise CalibrationError(f"no passage of {document} near depth {depth:.2f} starts with a unique cue")


GENERATORS: dict[str, type[Generator]] = {
    kind.name: kind for kind in (PasskeyGenerator, CopyGenerator, MultikeyGenerator, QuestionGenerator)
}
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

    Plain text over the standard library's texts. The same arguments give the same samples.

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
    source = TextSource.library(tokenizer, split)
    makers = {task: GENERATORS[task](tokenizer, source) for task in tasks}
    turns = take_turns(tasks, count)
    drawn = {task: iter(items) for task, items in draw_round(makers, turns, length, seed).items()}
    return [item.answered(item.reference) for item in (next(drawn[task]) for task in turns)]


def take_turns(names: Sequence[str], count: int) -> list[str]:
    """Whose turn each of ``count`` samples is."""
    return [names[i % len(names)] for i in range(count)]


def draw_round(
    makers: Mapping[str, Generator],
    turns: Sequence[str],
    length: int,
    seed: int,
    number: int = 0,
    *,
    depths: Sequence[float] = (),
) -> dict[str, list[Item]]:
    """One item for every turn, depths uniform within each maker; fewer where a maker's records run out.

    Args:
        makers: Generators by name.
        turns: Names, in the order in which the items are drawn.
        length: Tokens per item.
        seed: At least 0.
        number: Of the round; equal arguments draw equal items.
        depths: Taken in turn within each maker instead.

    Returns:
        Each maker's items, in order.
    """
    rng = np.random.default_rng([seed, length, number] if number else [seed, length])
    places = {name: itertools.cycle(depths) if len(depths) else _stratified(turns.count(name), rng) for name in makers}
    drawn: dict[str, list[Item]] = {name: [] for name in makers}
    for name in turns:
        try:
            drawn[name].append(makers[name].draw(length, next(places[name]), rng))
        except NoMoreRecordsError:
            continue
    return drawn


def _stratified(count: int, rng: np.random.Generator) -> Iterator[float]:
    """One uniform draw from each of ``count`` equal slices of [0, 1), in random order."""
    return iter(rng.permutation((np.arange(count) + rng.random(count)) / max(count, 1)).tolist())


def _occurrences(text: Tokens, pattern: Tokens) -> int:
    views = np.lib.stride_tricks.sliding_window_view(text, len(pattern))
    return int((views == pattern).all(axis=1).sum())
