"""Repeat an earlier passage."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moa_search.errors import CalibrationError
from moa_search.tasks.base import TokenAccuracyTask
from moa_search.tasks.items import Generator, Item

Tokens = npt.NDArray[np.int64]


class CopyTask(TokenAccuracyTask):
    """The first tokens of an earlier passage are repeated; the answer is how it goes on (induction).

    A continuation, not a request: it never has a chat's turns around it.
    """

    name = "copy"
    in_chat = False
    cue_tokens = 8
    answer_tokens = 24
    attempts = 200

    def draw(self, maker: Generator, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `DrawnTask.draw`."""
        passage_tokens = self.cue_tokens + self.answer_tokens
        separator = maker.encode("\n\n")
        missing = maker.missing(length, len(separator) + passage_tokens)
        document, filler = maker.source.cut(missing, rng)
        last = len(filler) - passage_tokens
        for _ in range(self.attempts):
            at = round(depth * last)
            passage = filler[at : at + passage_tokens]
            if _occurrences(filler, passage[: self.cue_tokens]) == 1:
                return Item(
                    prompt=np.concatenate([maker.frame.before, filler, separator, passage[: self.cue_tokens]]),
                    reference=passage[self.cue_tokens :],
                    accepted=(),
                    ends="reference",
                    exact=True,
                    task=self.kind,
                    depth=at / max(last, 1),
                    document=document,
                    target_length=length,
                    question_tokens=len(separator) + self.cue_tokens,
                )
            depth = float(np.clip(depth + rng.normal(0, 0.02), 0, 1))
        raise CalibrationError(f"no passage of {document} near depth {depth:.2f} starts with a unique cue")


def _occurrences(text: Tokens, pattern: Tokens) -> int:
    views = np.lib.stride_tricks.sliding_window_view(text, len(pattern))
    return int((views == pattern).all(axis=1).sum())
