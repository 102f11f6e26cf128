"""Having items answered, and drawing others for those answered wrongly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moa_search.calibration.answers import answering, greedy_answer, right_part, stop_tokens
from moa_search.calibration.drawing import Drawing
from moa_search.calibration.prompts import Frame, Item
from moa_search.calibration.samples import Sample
from moa_search.errors import CalibrationError
from moa_search.parallel import Workers

__all__ = ["ROUNDS", "Answerer", "DataAnswers", "ModelAnswers", "collect"]

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


@dataclass
class ModelAnswers:
    """The dense model's greedy answers, where they are right.

    Attributes:
        model: A causal language model; left as it was.
        tokenizer: Its tokenizer.
        frame: Tokens around the prompts.
        workers: Processes that share the items, each with its own copy of the model.
    """

    model: Any
    tokenizer: Any
    frame: Frame
    workers: Workers

    @property
    def at_once(self) -> int:
        """See `Answerer`."""
        return self.workers.count

    def __call__(self, items: Sequence[Item]) -> list[Tokens | None]:
        """See `Answerer`."""
        parts = self.workers.everywhere(self.workers.together(lambda: self._answered(self.workers.own(items))))
        return [parts[i % self.workers.count][i // self.workers.count] for i in range(len(items))]

    def _answered(self, items: Sequence[Item]) -> list[Tokens | None]:
        import torch

        stops = stop_tokens(self.model, self.tokenizer, self.frame)
        right: list[Tokens | None] = []
        with answering(self.model):
            for item in items:
                try:
                    answer = greedy_answer(self.model, self.tokenizer, item, stops)
                except torch.OutOfMemoryError:
                    raise CalibrationError(
                        f"answering a prompt of {len(item.prompt)} tokens doesn't fit the GPU's memory; try "
                        "--device-map auto, shorter --lengths or --answers dataset"
                    ) from None
                right.append(right_part(self.tokenizer, item, answer))
        return right


def collect(
    drawing: Drawing, length: int, answer: Answerer, report: Callable[[int], None]
) -> tuple[dict[str, list[Sample]], dict[str, int]]:
    """As many rightly answered samples of each source as a round has turns for it.

    The first right ones in the order of drawing are taken, so the result doesn't depend on how many are answered
    at once.

    Args:
        drawing: Where items come from.
        length: Tokens per item.
        answer: Answers them.
        report: Told the tokens of newly kept samples.

    Returns:
        The samples and the number of items tried, by source.

    Raises:
        CalibrationError: A source has too few within `ROUNDS` rounds.
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
