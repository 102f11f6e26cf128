"""Scores of free answers against accepted ones, 0 to 1: the measures that LongBench names (arXiv 2308.14508)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence

from moa_search.calibration.answers import normalised, shared_words

__all__ = ["TEXT_SCORES", "words_of"]

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]|[^\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]+")
"""Kana, ideographs and Hangul stand for themselves."""

TextScore = Callable[[str, str, Sequence[str]], float]
"""Told what was answered, one accepted answer and all classes."""


def words_of(text: str) -> list[str]:
    """Words without case, punctuation and articles; a language that writes none has its characters instead."""
    found: list[str] = []
    for word in normalised(text).split():
        found += WORD.findall(word)
    return found


def _f1(given: str, wanted: str, classes: Sequence[str]) -> float:
    return shared_words(words_of(given), words_of(wanted))


def _rouge_l(given: str, wanted: str, classes: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words."""
    mine, theirs = words_of(given), words_of(wanted)
    if not mine or not theirs:
        return 0.0
    row = [0] * (len(theirs) + 1)
    for word in mine:
        diagonal = 0
        for at, other in enumerate(theirs, 1):
            diagonal, row[at] = row[at], diagonal + 1 if word == other else max(row[at], row[at - 1])
    return 2 * row[-1] / (len(mine) + len(theirs))


def _classes(given: str, wanted: str, classes: Sequence[str]) -> float:
    """One over the classes that the answer names, where the right one is among them.

    A class whose name is part of the right one's doesn't count as named.
    """
    named = [name for name in classes if name in given and (name == wanted or name not in wanted)]
    return 1 / len(named) if wanted in named else 0.0


def _number(given: str, wanted: str, classes: Sequence[str]) -> float:
    """Share of the answer's numbers that are the right one's."""
    right, numbers = re.findall(r"\d+", wanted), re.findall(r"\d+", given)
    return numbers.count(right[0]) / len(numbers) if right and numbers else 0.0


def _code(given: str, wanted: str, classes: Sequence[str]) -> float:
    """Similarity of the first line that isn't a comment or a fence."""
    lines = [line for line in given.lstrip("\n").split("\n") if not re.search(r"`|#|//", line)]
    return difflib.SequenceMatcher(None, lines[0] if lines else "", wanted, autojunk=False).ratio()


TEXT_SCORES: dict[str, TextScore] = {
    "F1": _f1,
    "ROUGE-L": _rouge_l,
    "class named": _classes,
    "number named": _number,
    "edit similarity": _code,
}
"""By the name that tables show."""
