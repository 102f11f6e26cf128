"""Statistics over samples: per-sample values where a statistic isn't linear, else running mean and error."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moa_search.formats.profile_content import MEAN_STATISTICS, SAMPLE_STATISTICS, LengthHeader, LengthProfile

Doubles = npt.NDArray[np.float64]


class LengthAccumulator:
    """Gathers the samples of one length.

    Args:
        length: Tokens per sample.
        windows: Candidate windows in tokens.
        row_buckets: Equal slices of the rows.
    """

    def __init__(self, length: int, windows: tuple[int, ...], row_buckets: int) -> None:
        self._length, self._windows, self._row_buckets = length, windows, row_buckets
        self._losses: list[float] = []
        self._per_sample: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in SAMPLE_STATISTICS}
        self._mean: dict[str, Doubles] = {}
        self._squares: dict[str, Doubles] = {}

    def add(self, loss: float, statistics: dict[str, npt.NDArray[np.floating]]) -> None:
        """Add one sample.

        Args:
            loss: Its loss in nats per answer token.
            statistics: Each ``[layer, kv_head, bucket, window]``.
        """
        self._losses.append(loss)
        for name in SAMPLE_STATISTICS:
            self._per_sample[name].append(statistics[name].astype(np.float32))
        for name in MEAN_STATISTICS:  # Welford's update
            value = statistics[name].astype(np.float64)
            mean = self._mean.setdefault(name, np.zeros_like(value))
            squares = self._squares.setdefault(name, np.zeros_like(value))
            change = value - mean
            mean += change / len(self._losses)
            squares += change * (value - mean)

    def result(self) -> LengthProfile:
        """Everything gathered so far; at least one sample."""
        count = len(self._losses)
        spread = max(count - 1, 1) * count
        return LengthProfile(
            header=LengthHeader(
                length=self._length, windows=self._windows, row_buckets=self._row_buckets, samples=count
            ),
            loss=np.asarray(self._losses, dtype=np.float32),
            per_sample={name: np.stack(values) for name, values in self._per_sample.items()},
            mean={name: value.astype(np.float32) for name, value in self._mean.items()},
            error={name: np.sqrt(value / spread).astype(np.float32) for name, value in self._squares.items()},
        )
