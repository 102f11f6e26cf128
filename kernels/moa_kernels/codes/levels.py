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

import torch
from torch import Tensor

NORMAL_STEPS = {4: 0.33520063, 3: 0.58601943, 2: 0.99568669}
"""By bits: step of evenly spaced levels with the least squared error for the standard normal distribution."""


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of vectors.

    Computed in float64, so that the result doesn't depend on which vectors are quantised together.

    Args:
        x: ``[..., width]``.
        bits: 8, 4, 3 or 2.

    Returns:
        Codes, uint8 ``[..., width]``, and scales, float16 ``[...]``. The scale of a zero vector is 0. It is NaN where a
        vector holds a NaN or an infinite number, or numbers too large for a float16 scale.
    """
    x = x.double()
    if bits == 8:
        step = x.abs().amax(-1, keepdim=True) * (2 / (2**bits - 1))
    else:
        step = x.square().mean(-1, keepdim=True).sqrt() * NORMAL_STEPS[bits]
    levels = torch.where(step > 0, x / step, 0).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
    along = (x * levels).sum(-1)
    scales = torch.where(step[..., 0] > 0, x.square().sum(-1) / along, step[..., 0]).half()
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    codes = (levels + (2**bits - 1) / 2).nan_to_num(0)
    return codes.to(torch.uint8), scales


def dequantise(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """What codes stand for, float64 ``[..., width]``.

    Args:
        codes: ``[..., width]``.
        scales: ``[...]``.
        bits: Of a code.
    """
    levels: Tensor = codes.double() - (2**bits - 1) / 2
    return levels * scales.double()[..., None]
