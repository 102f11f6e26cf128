"""The largest batch that fits: by doubling, then bisecting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moa_search.evaluation.throughput.memory import PeakMemory
from moa_search.evaluation.throughput.running import run_once
from moa_search.evaluation.throughput.ways import Way

MOST_SAMPLES = 4096
"""Beyond that nobody looks."""


def largest_batch(fits: Callable[[int], bool], most: int = MOST_SAMPLES) -> int:
    """The largest batch up to ``most`` that fits, 0 if not even one sample does.

    Args:
        fits: Whether a batch fits. If one fits, all smaller ones do.
        most: Where to stop.
    """
    good, bad = 0, most + 1
    size = 1
    while size <= most:
        if not fits(size):
            bad = size
            break
        good, size = size, max(size + 1, min(2 * size, most))
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


class Probe:
    """Tries batches of one way: whole runs, so that prefill, cache and decoding all count.

    On a GPU a batch fits if torch doesn't run out of memory. With a limit it also must peak below that. A batch whose
    peak is forecast above the limit, on the line through the two largest batches before (nothing at all is one), isn't
    run: a CPU would swap, or the system kill the process.

    Args:
        model: The dense model.
        way: How to run it.
        length: Tokens per prompt.
        decode_tokens: As for `run_once`.
        limit_bytes: Most bytes in use, weights included; None for what the GPU has.
    """

    def __init__(self, model: Any, way: Way, length: int, decode_tokens: int, limit_bytes: int | None) -> None:
        self.model, self.way, self.length, self.decode_tokens = model, way, length, decode_tokens
        self.limit_bytes = limit_bytes
        with PeakMemory(model.device) as idle:
            pass
        self._peaks: dict[int, int] = {} if idle.peak_bytes is None else {0: idle.peak_bytes}

    def __call__(self, batch: int, *, compiled: bool = False) -> bool:
        """Whether ``batch`` samples fit; a compiled way is tried uncompiled unless told otherwise, to save minutes."""
        if self.limit_bytes is not None and self._forecast(batch) > self.limit_bytes:
            return False
        ids = torch.zeros(batch, self.length, dtype=torch.long, device=self.model.device)
        try:
            run = run_once(self.model, self.way, ids, self.decode_tokens, compiled=compiled)
        except torch.OutOfMemoryError:
            return False
        if run.peak_bytes is not None:
            self._peaks[batch] = run.peak_bytes
        return self.limit_bytes is None or run.peak_bytes is None or run.peak_bytes <= self.limit_bytes

    def _forecast(self, batch: int) -> float:
        """Bytes that a larger batch will take, or 0 as long as nobody can tell."""
        below = sorted(known for known in self._peaks if known < batch)
        if len(below) < 2:
            return 0.0
        small, large = below[-2:]
        slope = (self._peaks[large] - self._peaks[small]) / (large - small)
        return self._peaks[large] + slope * (batch - large)
