"""Channels of keys that get two codes, and others that get none, in the same bytes.

Behind the balancing matrix (`moa_kernels.codes.balancing`) channels are uncorrelated, and vary very differently. The
total error is least where a channel that varies more gets more bits, and one that hardly varies none (reverse
water-filling; Cover and Thomas, "Elements of Information Theory", section 10.3.3). So of the channels in order of their
variance the first n get codes of twice the bits, the last n none, and those between one code each: as many bytes.

A code of twice the bits is two digits, ``code = 2**bits * high + low``. With ``m = (2**bits - 1) / 2`` its level is
``2**bits * (high - m) + (low - m)``: a sum of levels of one digit. So readers of codes needn't know of digits: the
matrix that leads back holds two rows of such a channel, one 2**bits times the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moa_kernels.codes.levels import NORMAL_ERRORS, NORMAL_STEPS, Digits
from moa_kernels.codes.rotation import spread_rotation

PARTS = 16
"""Channels of two digits are multiples of about this part of a head's width: a power of two, which rotates well."""


def allotted(spectrum: Tensor, bits: int) -> Tensor:
    """How many channels get two codes: as many as make the error least, int64 ``[kv_heads]``.

    Channels of a group are rotated among themselves, so that all have the group's mean variance v, and err by
    ``v NORMAL_ERRORS[bits]``. Behind the balancing matrix an error costs in proportion to its channel's variance.

    Args:
        spectrum: Variance of every channel, decreasing, ``[kv_heads, width]``.
        bits: Of a code, below 8.
    """
    spectrum, width = spectrum.double(), spectrum.shape[-1]
    unit = 1 << max(width // PARTS, 1).bit_length() - 1
    counts = range(0, (width + 1) // 2, unit)
    errors = []
    for count in counts:
        most, some, least = spectrum.split([count, width - 2 * count, count], -1)
        error = NORMAL_ERRORS[bits] * some.sum(-1).square() / (width - 2 * count) + least.square().sum(-1)
        errors.append(error + NORMAL_ERRORS[2 * bits] * most.sum(-1).square() / max(count, 1))
    return torch.tensor([*counts], device=spectrum.device)[torch.stack(errors).argmin(0)]


def in_digits(
    balance: Tensor, inverse: Tensor, spectrum: Tensor, counts: Tensor, bits: int
) -> tuple[Tensor, Tensor, Digits]:
    """The matrices into codes of digits and back, and the digits.

    Args:
        balance: Float64 ``[kv_heads, width, width]``; vectors are rows.
        inverse: Its inverse.
        spectrum: As in `allotted`, float64.
        counts: From `allotted`.
        bits: Of a code, below 8.
    """
    width, device = balance.shape[-1], balance.device
    into, back = torch.zeros_like(balance), torch.zeros_like(inverse)
    # A number of two digits is scaled so that its best step is that of a number of one.
    finer = NORMAL_STEPS[bits] / NORMAL_STEPS[2 * bits]
    weights, norms = torch.ones(2, len(balance), dtype=torch.float64, device=device)
    for head, count in enumerate(counts.tolist()):
        most, some = slice(0, count), slice(count, width - count)
        rotation = spread_rotation(width - 2 * count).to(device)
        into[head, :, 2 * count :] = balance[head, :, some] @ rotation
        back[head, 2 * count :] = rotation.mT @ inverse[head, some]
        norms[head] = width - 2 * count
        if count:
            ratio = spectrum[head, most].mean() / spectrum[head, some].mean()
            size = ratio.sqrt() / finer
            rotation = spread_rotation(count).to(device)
            into[head, :, : 2 * count] = (balance[head, :, most] @ rotation / size).repeat(1, 2)
            low = size * rotation.mT @ inverse[head, most]
            back[head, : 2 * count] = torch.cat([2**bits * low, low])
            weights[head] = size.square()
            norms[head] += count * ratio
            # Steps may be far smaller than keys: in units near one, float16 holds scales. Powers of two round nothing.
            unit = 2.0 ** round(math.log2(float(spectrum[head, some].mean())) / 2)
            into[head], back[head] = into[head] / unit, back[head] * unit
    return into, back, Digits(counts, weights, norms)
