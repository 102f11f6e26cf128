"""Signed Hadamard rotations, which make the channels of any vector alike."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(width: int) -> Tensor:
    """Random signs, then a Hadamard matrix: orthonormal, float64 ``[width, width]``, for vectors that are rows.

    Widths that are no power of two get Hadamard blocks on the diagonal, of the largest power of two that divides them
    (as vLLM's ``int4_per_token_head``). The signs keep a constant vector from landing in one channel; they are a fixed
    function of the channel.

    Args:
        width: Numbers in a vector.
    """
    block = width & -width
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    rotation: Tensor = torch.block_diag(*[matrix] * (width // block)) * block**-0.5
    # The top bit of a multiplicative hash (Knuth), so that no generator has to stay the same for ever.
    signs = 1 - 2 * ((torch.arange(1, width + 1) * 2654435761 % 2**32) >> 31)
    return signs[:, None].double() * rotation


def spread_rotation(width: int) -> Tensor:
    """The same for channels in order of their variance: each Hadamard block gets large ones and small ones.

    Args:
        width: Numbers in a vector; none make an empty matrix.
    """
    blocks = width // max(width & -width, 1)
    order = torch.arange(width).unflatten(0, (-1, blocks)).T.flatten() if width else torch.arange(0)
    rotation = torch.zeros(width, width, dtype=torch.float64)
    rotation[order] = hadamard(width)
    return rotation
