"""Evenly spaced levels with one scale per vector.

A code c of n bits stands for the level ``c - (2**n - 1) / 2``, so levels lie half a step beside zero, and a number is
``scale * level``. For up to 4 bits the step that sorts numbers into levels is a fixed multiple of the vector's root
mean square: the best one for normally distributed numbers, which a rotation makes of any vector (Max 1960, "Quantizing
for minimum distortion", table II; QuaRot, arXiv 2404.00456, rotates for the same reason). 8 bits reach up to the
largest magnitude instead. The scale that is stored isn't that step but

    scale = x . x / x . levels

so that ``x . decoded(x) = x . x`` (RaBitQ, arXiv 2405.12497): scores of a query along x keep their size, where the step
itself, or the scale of the least squared error, would shrink them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NORMAL_STEPS = {8: 0.03076239, 6: 0.10406301, 4: 0.33520063, 3: 0.58601943, 2: 0.99568669}
"""By bits: step of evenly spaced levels with the least squared error for the standard normal distribution."""

NORMAL_ERRORS = {8: 8.768618e-5, 6: 0.001040045, 4: 0.01154288, 3: 0.03743966, 2: 0.1188461}
"""By bits: that error."""


@dataclass(frozen=True)
class Digits:
    """Which codes of KV heads' vectors are digits of one number; see `moa_kernels.codes.digits`.

    Attributes:
        counts: int64 ``[kv_heads]``: of n, the codes ``[0, n)`` are high digits, ``[n, 2 n)`` their low ones, and every
            other one is a number. Of a number of two digits both places of the vector hold it.
        weights: float64 ``[kv_heads]``: how much the square of a number of two digits counts in sums over a vector,
            where that of another one counts once.
        norms: float64 ``[kv_heads]``: that sum for a vector whose numbers of one digit have a mean square of 1.
    """

    counts: Tensor
    weights: Tensor
    norms: Tensor

    @classmethod
    def none(cls, heads: int, width: int) -> Digits:
        """Of heads whose codes are numbers, all of them."""
        norms = torch.full((heads,), width, dtype=torch.float64)
        return cls(torch.zeros(heads, dtype=torch.int64), torch.ones_like(norms), norms)

    def of(self, index: Tensor) -> Digits:
        """Of some of the heads."""
        return Digits(self.counts[index], self.weights[index], self.norms[index])

    def to(self, device: torch.device | str) -> Digits:
        """The same on another device."""
        return Digits(self.counts.to(device), self.weights.to(device), self.norms.to(device))


def quantise(x: Tensor, bits: int, digits: Digits | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of vectors.

    Computed in float64, so that the result doesn't depend on which vectors are quantised together.

    Args:
        x: ``[..., width]``; with digits ``[..., kv_heads, tokens, width]``.
        bits: 8, 4, 3 or 2.
        digits: Of the heads; below 8 bits.

    Returns:
        Codes, uint8 ``[..., width]``, and scales, float16 ``[...]``. The scale of a zero vector is 0. It is NaN where a
        vector holds a NaN or an infinite number, or numbers too large for a float16 scale.
    """
    x = x.double()
    half = torch.tensor(2 ** (bits - 1), device=x.device)  # levels below 0
    if digits is None:
        weighed = x
        norm: Tensor | int = x.shape[-1]
    else:
        place, count = torch.arange(x.shape[-1], device=x.device), digits.counts[:, None, None]
        high, low = place < count, (place >= count) & (place < 2 * count)
        half = torch.where(high | low, 2 ** (2 * bits - 1), half)
        weighed = x * torch.where(high, digits.weights[:, None, None], torch.where(low, 0.0, 1.0))
        norm = digits.norms[:, None]
    squares = (weighed * x).sum(-1)
    step = x.abs().amax(-1) * (2 / (2**bits - 1)) if bits == 8 else (squares / norm).sqrt() * NORMAL_STEPS[bits]
    levels = torch.where(step[..., None] > 0, x / step[..., None], 0).floor().clamp(-half, half - 1) + 0.5
    scales = torch.where(step > 0, squares / (weighed * levels).sum(-1), step).half()
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    codes = (levels + (half - 0.5)).nan_to_num(0).to(torch.uint8)
    if digits is not None:
        codes = torch.where(high, codes >> bits, torch.where(low, codes & (2**bits - 1), codes))
    return codes, scales


def dequantise(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """What codes stand for, float64 ``[..., width]``.

    Args:
        codes: ``[..., width]``.
        scales: ``[...]``.
        bits: Of a code.
    """
    levels: Tensor = codes.double() - (2**bits - 1) / 2
    return levels * scales.double()[..., None]
