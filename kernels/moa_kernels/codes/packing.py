"""Codes as bytes, in planes, so that unpacking moves no number to another lane.

Byte b of a vector of 4-bit codes holds channel b in its low half and channel ``b + width / 2`` in its high half; of
2-bit codes, from low to high, the channels b, ``b + width / 4``, ``b + width / 2`` and ``b + 3 width / 4``. 3 bits are
a plane of the codes' high 2 bits, then one of their low bit. 8 bits stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""By bits of a code: bits of each plane, the high bits' plane first."""


def code_bytes(bits: int, width: int) -> int:
    """Bytes of one vector's codes.

    Args:
        bits: 8, 4, 3 or 2.
        width: Numbers in a vector.

    Raises:
        ValueError: The codes don't fill whole bytes of every plane.
    """
    per_byte = 8 // min(PLANES[bits])
    if width < 1 or width % per_byte:
        raise ValueError(
            f"vectors of {width} numbers don't pack into {bits}-bit codes: width must divide by {per_byte}"
        )
    return width * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes of codes.

    Args:
        codes: uint8 ``[..., width]``, below ``2**bits``.
        bits: 8, 4, 3 or 2.

    Returns:
        uint8 ``[..., code_bytes]``.
    """
    code_bytes(bits, codes.shape[-1])  # checks the width
    planes, below = [], bits
    for plane in PLANES[bits]:
        below -= plane
        parts = ((codes >> below) & (2**plane - 1)).unflatten(-1, (8 // plane, -1))  # [..., part, byte]
        packed = torch.zeros_like(parts[..., 0, :])
        for place, part in enumerate(parts.unbind(-2)):
            packed |= part << (plane * place)
        planes.append(packed)
    return torch.cat(planes, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes of bytes: the inverse of `pack`.

    Args:
        packed: uint8 ``[..., code_bytes]``.
        bits: 8, 4, 3 or 2.

    Returns:
        uint8 ``[..., width]``.
    """
    width = packed.shape[-1] * 8 // bits
    codes = packed.new_zeros(*packed.shape[:-1], width)
    for plane, stored in zip(
        PLANES[bits], packed.split([width * plane // 8 for plane in PLANES[bits]], -1), strict=True
    ):
        parts = [(stored >> (plane * place)) & (2**plane - 1) for place in range(8 // plane)]
        codes = (codes << plane) | torch.cat(parts, -1)
    return codes
