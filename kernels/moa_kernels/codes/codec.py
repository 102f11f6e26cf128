"""Keys or values of one token and one KV head as bytes, and back.

Each token and head stands alone, since rings overwrite single tokens: no scale is shared between tokens. A vector is
coded as it enters the cache, and every query, those of the prompt too, sees what comes back, so that results don't
depend on how a sequence is cut into chunks. The sink's tokens stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moa_kernels.codes.levels import dequantise, quantise
from moa_kernels.codes.packing import code_bytes, pack, unpack
from moa_kernels.codes.transforms import Transform

BITS = (16, 8, 4, 3, 2)
"""Bits of a number that a cache can hold; 16 means the model's own type, untouched."""

SCALE_BYTES = 2
"""Of a token's float16 scale."""


@dataclass(frozen=True)
class Codes:
    """Coded vectors.

    Attributes:
        packed: uint8 ``[..., tokens, bytes]``; see `moa_kernels.codes.packing`. With 16 bits the numbers' own bytes.
        scales: float16 ``[..., tokens]``; None with 16 bits.
    """

    packed: Tensor
    scales: Tensor | None

    @property
    def nbytes(self) -> int:
        """Memory that the codes and their scales take."""
        return self.packed.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True)
class Codec:
    """How the keys, or the values, of some KV heads of a layer are stored.

    Attributes:
        bits: One of `BITS`.
        transform: Of these heads; None stores numbers as they are, which only 16 and 8 bits should
            (`wants_transform`).
    """

    bits: int
    transform: Transform | None = None

    def __post_init__(self) -> None:
        """Check the number of bits.

        Raises:
            ValueError: It isn't one of `BITS`, or the transform is for codes of other bits.
        """
        _require(self.bits)
        made_for = None if self.transform is None else self.transform.bits
        if made_for not in (None, self.bits):
            raise ValueError(f"the transform is for codes of {made_for} bits, not {self.bits}")

    def encode(self, x: Tensor, positions: Tensor | None = None) -> Codes:
        """Store vectors.

        The bytes of a vector depend on nothing but the vector and its position. Gradients don't flow.

        Args:
            x: ``[..., kv_heads, tokens, width]``.
            positions: Integers that broadcast to ``[..., kv_heads, tokens]``; only rotary embedding needs them.

        Returns:
            Codes ``[..., kv_heads, tokens, bytes]``. A vector with a NaN or an infinite number, or with numbers too
            large for a float16 scale, gets a NaN scale and comes back as NaN throughout: outputs show it.

        Raises:
            ValueError: The width doesn't pack.
        """
        x = x.detach()
        if self.bits == 16:
            return Codes(x.contiguous().view(torch.uint8), None)
        if self.transform is None:
            codes, scales = quantise(x, self.bits)
        else:
            codes, scales = quantise(self.transform.apply(x, positions), self.bits, self.transform.digits)
        return Codes(pack(codes, self.bits), scales)

    def decode(self, codes: Codes, dtype: torch.dtype, positions: Tensor | None = None) -> Tensor:
        """What comes back, ``[..., kv_heads, tokens, width]``.

        Args:
            codes: From `encode`.
            dtype: Of the result; with 16 bits it must be the type that was stored.
            positions: As `encode` was given.
        """
        if self.bits == 16:
            return codes.packed.view(dtype)
        assert codes.scales is not None
        turned = dequantise(unpack(codes.packed, self.bits), codes.scales, self.bits)
        return (turned if self.transform is None else self.transform.invert(turned, positions)).to(dtype)

    def seen(self, x: Tensor, positions: Tensor, sink: int) -> Tensor:
        """What attention sees of vectors once they are stored, in the type of ``x``.

        Args:
            x: ``[..., kv_heads, tokens, width]``.
            positions: Integers that broadcast to ``[..., kv_heads, tokens]``.
            sink: Tokens before this position stay as they are.
        """
        if self.bits == 16:
            return x
        back = self.decode(self.encode(x, positions), x.dtype, positions)
        return torch.where((positions < sink)[..., None], x, back)


def token_bytes(bits: int, width: int, plain_bytes: int = 2) -> int:
    """Bytes of one token's key, or value, of one KV head, scale included.

    Args:
        bits: One of `BITS`.
        width: Numbers in the vector.
        plain_bytes: Of a number of the model's type, which 16 bits stand for.

    Raises:
        ValueError: The width doesn't pack into these bits, or they are none of `BITS`.
    """
    _require(bits)
    return width * plain_bytes if bits == 16 else code_bytes(bits, width) + SCALE_BYTES


def wants_transform(bits: int) -> bool:
    """Whether codes of so many bits are meant to be stored under a transform: those below 8 bits.

    Args:
        bits: One of `BITS`.
    """
    return bits < 8


def _require(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits are {bits}; they must be one of {', '.join(map(str, BITS))}")
