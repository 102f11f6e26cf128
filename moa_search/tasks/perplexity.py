"""Next-token loss of long documents, by position."""

from __future__ import annotations

import numpy as np

from moa_search.errors import CalibrationError
from moa_search.tasks.base import TokenAccuracyTask
from moa_search.tasks.items import Generator, Item


class PerplexityTask(TokenAccuracyTask):
    """Every token of a long document given those before it, in slices of its length.

    Perplexity is ``exp(nll)``; the score is the share of tokens ranked first. A document starts anywhere in a text and
    may go on in the next.
    """

    name = "perplexity"
    always_forced = True
    at_depths = False
    in_chat = False
    is_source = False
    slices = 8
    least_per_slice = 8

    def draw(self, maker: Generator, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `DrawnTask.draw`; all but the first token is the answer."""
        before = maker.frame.before
        if length < self.slices * self.least_per_slice:
            raise CalibrationError(f"{self.name} items can't be as short as {length} tokens")
        document, text = maker.source.cut(length - len(before), rng)
        ids = np.concatenate([before, text])
        return Item(
            prompt=ids[:1],
            reference=ids[1:],
            accepted=(),
            ends="reference",
            exact=False,
            task=self.kind,
            depth=depth,
            document=document,
            target_length=length,
        )
