"""Having items answered, and drawing others for those answered wrongly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moa_search.data.samples import Sample
from moa_search.errors import CalibrationError
from moa_search.tasks.drawing import Drawing
from moa_search.tasks.items import Item

ROUNDS = 8
"""How often as many items as are needed are drawn before a source is given up."""

Tokens = npt.NDArray[np.int64]


class Answerer(Protocol):
    """Answers items."""

    @property
    def at_once(self) -> int:
        """Items that are answered in about the time of one."""

    def __call__(self, items: Sequence[Item]) -> list[Tokens | None]:
        """For each item its answer, or None where it was answered wrongly."""


class DataAnswers:
    """The data's own answers."""

    @property
    def at_once(self) -> int:
        """See `Answerer`."""
        return 1

    def __call__(self, items: Sequence[Item]) -> list[Tokens | None]:
        """See `Answerer`."""
        return [item.reference for item in items]


def collect(
    drawing: Drawing, answer: Answerer, report: Callable[[int], None]
) -> tuple[list[Sample], dict[str, dict[str, int]]]:
    """Samples of every length and source, rightly answered or saved before.

    Args:
        drawing: Where items come from.
        answer: Answers them.
        report: Told the tokens of newly kept samples.

    Returns:
        The samples by length, the sources taking turns; and for each source that was drawn from the items ``tried``
        and the items ``kept``.

    Raises:
        CalibrationError: A source has too few within `ROUNDS` rounds.
    """
    samples: list[Sample] = []
    answered = {name: {"tried": 0, "kept": 0} for name in drawing.drawn}
    for length, saved in drawing.saved.items():
        kept, tried = _collect(drawing, length, answer, report)
        for name in kept:
            answered[name]["tried"] += tried[name]
            answered[name]["kept"] += len(kept[name])
        for found in saved.values():
            report(length * len(found))
        queues = {name: iter(found) for name, found in {**kept, **saved}.items()}
        samples += [next(queues[name]) for name in drawing.turns]
    return samples, answered


def _collect(
    drawing: Drawing, length: int, answer: Answerer, report: Callable[[int], None]
) -> tuple[dict[str, list[Sample]], dict[str, int]]:
    """As many rightly answered samples of each source as a round has turns for it, and the number of items tried.

    The first right ones in the order of drawing are taken, so the result doesn't depend on how many are answered
    at once.
    """
    kept: dict[str, list[Sample]] = {name: [] for name in drawing.drawn}
    tried = dict.fromkeys(kept, 0)
    for number in range(ROUNDS):
        missing = {name: needed - len(kept[name]) for name, needed in drawing.drawn.items()}
        if not any(missing.values()):
            break
        for name, items in drawing.round(length, number).items():
            while items and missing[name]:
                size = -(-missing[name] // answer.at_once) * answer.at_once
                chunk, items = items[:size], items[size:]
                for item, given in zip(chunk, answer(chunk), strict=True):
                    if not missing[name]:
                        break
                    tried[name] += 1
                    if given is not None:
                        kept[name].append(item.answered(given, name))
                        missing[name] -= 1
                        report(length)
    for name, needed in drawing.drawn.items():
        if len(kept[name]) < needed:
            raise CalibrationError(_too_few(name, length, needed, len(kept[name]), tried[name]))
    return kept, tried


def _too_few(name: str, length: int, needed: int, kept: int, tried: int) -> str:
    if kept == tried:
        only = f"source {name!r} has only {tried} records for {length} tokens"
        return f"{only}, {needed} are needed; ask for fewer samples"
    return (
        f"source {name!r}: the dense model answered {kept} of {tried} items of {length} tokens rightly, {needed} are "
        "needed; take --answers dataset, other sources or fewer samples"
    )
