"""What a profile knows of tiers: the keys' transforms, and the influence of keys and values in fewer bits.

Statistics of a codec are changes: what it adds to `SAMPLE_STATISTICS` when keys, or values, are seen through it. They
are kept for keys and values apart. A pair's change is the sum of both: on SmolLM2 the sum differed from the measured
one by 2 to 16 % of a standard error of the mean.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moa_search.formats.transforms import KeyTransforms

CODED_BITS = (8, 4, 3, 2)
"""Bits of a number that keys and values can be stored in, beside 16, which means the model's own type."""

PLAIN_BITS: Final = 16
"""The model's own type, whatever its size."""

Tier = tuple[int, int]
"""Bits of keys and of values."""

PLAIN: Final[Tier] = (PLAIN_BITS, PLAIN_BITS)

SCALE_BYTES = 2

SIDES = ("key", "value")

Floats = npt.NDArray[np.float32]


class WindowGrid(BaseModel):
    """Where influence was measured at one length.

    Attributes:
        length: Tokens per sample, prompt and answer.
        windows: Window sizes in tokens, increasing, the last one at least ``length``.
        row_buckets: Number of equal slices of the rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    length: int = Field(ge=1)
    windows: tuple[int, ...] = Field(min_length=1)
    row_buckets: int = Field(ge=1)

    @model_validator(mode="after")
    def _windows_increase_to_the_length(self) -> Self:
        if self.windows[0] < 1 or any(a >= b for a, b in itertools.pairwise(self.windows)):
            raise ValueError(f"the windows at length {self.length} don't increase from 1 on")
        if self.windows[-1] < self.length:
            raise ValueError(f"the last window at length {self.length} is {self.windows[-1]}, shorter than that")
        return self


class TiersHeader(BaseModel):
    """What was measured of tiers.

    Attributes:
        bits: Measured for keys and values, decreasing; 16 goes without saying.
        lengths: The profile's lengths.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: tuple[int, ...] = Field(min_length=1)
    lengths: tuple[WindowGrid, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _bits_are_known(self) -> TiersHeader:
        if set(self.bits) - set(CODED_BITS) or any(a <= b for a, b in itertools.pairwise(self.bits)):
            raise ValueError(f"the tiers' bits are {list(self.bits)}, not a decreasing choice of {list(CODED_BITS)}")
        return self


def wants_transform(bits: int) -> bool:
    """Whether keys are stored under a measured transform; 8 bits do without."""
    return bits < 8


def token_bytes(bits: int, width: int, plain_bytes: int = 2) -> int:
    """Bytes of one token's key, or value, in one head: its codes and their float16 scale.

    Args:
        bits: Of a number.
        width: Numbers of a key.
        plain_bytes: Of a number where ``bits`` is 16.
    """
    return width * plain_bytes if bits == PLAIN_BITS else -(-width * bits // 8) + SCALE_BYTES


def head_bytes(tokens: int, tier: Tier, width: int, *, sink: int, plain_bytes: int = 2) -> int:
    """Bytes of the keys and values of one head, of which the first ``sink`` are stored in 16 bits.

    Args:
        tokens: Tokens kept, the sink's included.
        tier: Bits of keys and of values.
        width: Numbers of a key.
        sink: Tokens.
        plain_bytes: Of a number in 16 bits.
    """
    plain = min(tokens, sink)
    coded = sum(token_bytes(bits, width, plain_bytes) for bits in tier)
    return 2 * plain * token_bytes(PLAIN_BITS, width, plain_bytes) + (tokens - plain) * coded


@dataclass(frozen=True, eq=False)
class TierLength:
    """Changes by codecs at one length.

    Attributes:
        header: Windows and buckets.
        answer_tokens: Tokens whose mean loss a sample's is, ``[sample]``.
        keys: By bits and `SAMPLE_STATISTICS`, each ``[sample, layer, kv_head, bucket, window]``: what coding the keys
            adds. It may be negative.
        values: The same of values.
    """

    header: WindowGrid
    answer_tokens: Floats = field(repr=False)
    keys: dict[int, dict[str, Floats]] = field(repr=False)
    values: dict[int, dict[str, Floats]] = field(repr=False)

    def change(self, statistic: str, key_bits: int, value_bits: int) -> Floats:
        """What a pair of codecs adds to a statistic, ``[sample, layer, kv_head, bucket, window]``.

        Args:
            statistic: One of `SAMPLE_STATISTICS`.
            key_bits: 16 or one that was measured.
            value_bits: Likewise.
        """
        parts = [
            side[bits][statistic] for side, bits in ((self.keys, key_bits), (self.values, value_bits)) if bits < 16
        ]
        like = next(iter(self.keys.values()))[statistic]
        return sum(parts, np.zeros_like(like))

    def seeing_everything(self) -> TierLength:
        """The same of `tier_grid` alone: of the last window, over all rows."""

        def reduced(side: dict[int, dict[str, Floats]]) -> dict[int, dict[str, Floats]]:
            return {
                bits: {
                    name: values[..., -1:].sum(-2, keepdims=True, dtype=np.float64).astype(np.float32)
                    for name, values in statistics.items()
                }
                for bits, statistics in side.items()
            }

        return TierLength(tier_grid(self.header.length), self.answer_tokens, reduced(self.keys), reduced(self.values))

    def rounding(self, key_bits: int, value_bits: int) -> npt.NDArray[np.float64]:
        """Squared change of the loss by rounding in heads that see everything, ``[sample, layer, kv_head]``.

        What rounding does to one token is random and adds up to nothing over tokens, heads and samples; its square
        stays. In nats it raises the mean loss of T answer tokens by half of T times this, as the Fisher information
        has it. With gradients of the given labels alone, which is all a profile has, half of that was found
        (docs/results-precision.md): so `answer_tokens` times this is what it is taken for.
        """
        change = self.change("squared", key_bits, value_bits)[..., -1].astype(np.float64).sum(-1)
        squared: npt.NDArray[np.float64] = np.maximum(change, 0)
        return squared


@dataclass(frozen=True, eq=False)
class TierStatistics:
    """What a profile holds of tiers, beside its header.

    Attributes:
        transforms: What keys go through before they are coded.
        by_length: Changes by length in tokens.
    """

    transforms: KeyTransforms
    by_length: dict[int, TierLength]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Every array by a name of its own, as files name them."""
        found = {f"transforms/{name}": values for name, values in self.transforms.tensors().items()}
        for length, entry in sorted(self.by_length.items()):
            found[f"{length}/answer_tokens"] = entry.answer_tokens
            for side, by_bits in zip(SIDES, (entry.keys, entry.values), strict=True):
                for bits, statistics in by_bits.items():
                    found |= {f"{length}/{side}{bits}/{name}": values for name, values in statistics.items()}
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TierStatistics):
            return NotImplemented
        mine, theirs = self.arrays(), other.arrays()
        same = mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)
        return same and {n: e.header for n, e in self.by_length.items()} == {
            n: e.header for n, e in other.by_length.items()
        }

    __hash__ = None  # type: ignore[assignment]


def tier_grid(length: int) -> WindowGrid:
    """Where codecs are measured: in heads that see everything, over all rows.

    Nothing else is asked of a profile (`TierLength.rounding`). Files from before hold more windows and buckets.

    Args:
        length: Tokens per sample.
    """
    return WindowGrid(length=length, windows=(length,), row_buckets=1)
