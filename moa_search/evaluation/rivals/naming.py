"""Rivals by the names that a user types: ``int4``, ``snapkv@0.25``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moa_search.errors import ConfigError
from moa_search.evaluation.rivals.worker import CACHES, COMPRESSORS
from moa_search.formats.files import nearest, one_line

CODED: Final = ("int8", "int4", "int4-plain")
"""Dense caches in fewer bits, run here; see `moa_search.evaluation.rivals.codes`."""

QUESTIONS: Final = ("unknown", "known")


@dataclass(frozen=True)
class Rival:
    """One way to do with a smaller cache.

    Attributes:
        typed: By the user, such as ``kvzip@0.25``.
        name: The method.
    """

    typed: str
    name: str

    @property
    def is_coded(self) -> bool:
        """Whether it runs here, rather than in an environment of its own."""
        return self.name in CODED

    @property
    def questions(self) -> tuple[str, ...]:
        """When the question can be known; a quantised cache is the same either way."""
        return QUESTIONS if self.name in COMPRESSORS else QUESTIONS[:1]

    def variant(self, question: str) -> str:
        """Its name in tables."""
        return self.typed if question == QUESTIONS[0] else f"{self.typed}, question {question}"


def parse_rivals(typed: Sequence[str]) -> list[Rival]:
    """The rivals of these names, each once.

    Raises:
        ConfigError: A name is unknown, or its share is missing, wrong or one too many.
    """
    return [_rival(text) for text in dict.fromkeys(typed)]


def _rival(typed: str) -> Rival:
    where, (name, at, share) = f"rival {one_line(typed)!r}", typed.partition("@")
    whole = (*CODED, *CACHES)
    if name not in (*whole, *COMPRESSORS):
        names = ", ".join((*whole, *(f"{known}@SHARE" for known in COMPRESSORS)))
        raise ConfigError(f"{where} is unknown{nearest(name, [*whole, *COMPRESSORS])}; choose from {names}")
    if name in whole:
        if at:
            raise ConfigError(f"{where}: it keeps all tokens; write {name}")
        return Rival(typed, name)
    try:
        kept = float(share)
    except ValueError:
        kept = 0.0
    if not 0 < kept < 1:
        raise ConfigError(f"{where}: give the share of tokens that it keeps, over 0 and below 1, such as {name}@0.25")
    return Rival(typed, name)
