"""What keys and values go through before they are coded, and how attention undoes it without decoding them.

With M a head's matrix, m its mean and R the rotary embedding at a key's position, what is stored of a key x is a code
of ``y = (x R^-1 - m) M``. For values, which have neither, M is a signed Hadamard rotation: it spreads every outlier
over all channels (QuaRot, arXiv 2404.00456), and needs no inverse per value, ``sum_j w_j x_j = (sum_j w_j y_j) M^-1``.
For keys a balancing matrix (`moa_kernels.codes.balancing`) stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_kernels.codes.rotary import Rotary


@dataclass(frozen=True)
class Transform:
    """One layer's transform of keys, or of values; float64.

    Attributes:
        into: M, ``[kv_heads, width, width]``; vectors are rows, ``y = (x - mean) @ into``.
        back: Its inverse.
        mean: ``[kv_heads, width]``, or None where nothing is taken off.
        rotary: What keys went through, to be undone first; None where there is none.
    """

    into: Tensor
    back: Tensor
    mean: Tensor | None = None
    rotary: Rotary | None = None

    @classmethod
    def rotation(cls, kv_heads: int, width: int) -> Transform:
        """The signed Hadamard rotation alone, the same for every head.

        Args:
            kv_heads: Of the layer.
            width: Numbers in a vector.
        """
        matrix = hadamard(width).expand(kv_heads, -1, -1)
        return cls(matrix, matrix.mT)

    @classmethod
    def balanced(cls, balance: Tensor, mean: Tensor, rotary: Rotary | None = None) -> Transform:
        """A balancing matrix, then the rotation.

        Args:
            balance: ``[kv_heads, width, width]``, invertible.
            mean: ``[kv_heads, width]``, before rotary embedding.
            rotary: The layer's.

        Raises:
            ValueError: Shapes don't fit together, numbers aren't finite, or a matrix has no inverse.
        """
        if balance.ndim != 3 or balance.shape[1] != balance.shape[2] or mean.shape != balance.shape[:2]:
            raise ValueError(
                f"balance {tuple(balance.shape)} must be [kv_heads, width, width] and mean {tuple(mean.shape)} "
                "[kv_heads, width]"
            )
        if not (balance.isfinite().all() and mean.isfinite().all()):
            raise ValueError("balance and mean must be finite")
        rotation = hadamard(balance.shape[-1]).to(balance.device)
        inverse, failed = torch.linalg.inv_ex(balance.double())
        if failed.any() or not inverse.isfinite().all():
            raise ValueError(f"balance of KV heads {failed.nonzero()[:, 0].tolist()} has no inverse")
        return cls(balance.double() @ rotation, rotation.mT @ inverse, mean.double(), rotary)

    @classmethod
    def of_keys(cls, balance: Tensor, frequencies: Tensor, mean: Tensor, order: Tensor) -> Transform:
        """As files keep a layer's.

        Args:
            balance: ``[kv_heads, width, width]``, invertible.
            frequencies: Of `Rotary`, ``[width / 2]``.
            mean: ``[kv_heads, width]``, before rotary embedding.
            order: Of `Rotary`, ``[width]``.

        Raises:
            ValueError: As `balanced` and `Rotary`.
        """
        rotary = Rotary(frequencies.double(), order.long()) if frequencies.any() else None
        return cls.balanced(balance, mean, rotary)

    def apply(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """What is to be coded, float64.

        Args:
            x: ``[..., kv_heads, tokens, width]``.
            positions: Integers that broadcast to ``[..., kv_heads, tokens]``; only rotary embedding needs them.
        """
        x = x.double()
        if self.rotary is not None:
            assert positions is not None, "keys under rotary embedding are coded by position"
            x = self.rotary.turn(x, positions, back=True)
        if self.mean is not None:
            x = x - self.mean[:, None]
        return x @ self.into

    def invert(self, y: Tensor, positions: Tensor | None = None) -> Tensor:
        """Vectors of what was coded, float64; the inverse of `apply`.

        Args:
            y: ``[..., kv_heads, tokens, width]``.
            positions: As `apply` was given.
        """
        x = y.double() @ self.back
        if self.mean is not None:
            x = x + self.mean[:, None]
        if self.rotary is None:
            return x
        assert positions is not None, "keys under rotary embedding are decoded by position"
        return self.rotary.turn(x, positions)

    def of(self, heads: Sequence[int]) -> Transform:
        """The transform of some of the KV heads.

        Args:
            heads: Their indices, in the order wanted.
        """
        index = torch.tensor(heads, dtype=torch.long, device=self.into.device)
        mean = None if self.mean is None else self.mean[index]
        return Transform(self.into[index], self.back[index], mean, self.rotary)

    def to(self, device: torch.device | str) -> Transform:
        """The same on another device."""
        mean = None if self.mean is None else self.mean.to(device)
        rotary = None if self.rotary is None else self.rotary.to(device)
        return Transform(self.into.to(device), self.back.to(device), mean, rotary)


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
