"""What keys and values go through before they are coded, and how attention undoes it without decoding them.

With M a head's matrix, m its mean and R the rotary embedding at a key's position, what is stored of a key x is a code
of ``y = (x R^-1 - m) M``. For values, which have neither, M is a signed Hadamard rotation: it spreads every outlier
over all channels (QuaRot, arXiv 2404.00456), and needs no inverse per value, ``sum_j w_j x_j = (sum_j w_j y_j) M^-1``.
For keys a balancing matrix (`moa_kernels.codes.balancing`) stands before it, and channels that vary much get two codes
(`moa_kernels.codes.digits`): then M depends on the bits, some channels of y stand twice and some not at all, and the
matrix that leads back is no inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_kernels.codes.digits import allotted, in_digits
from moa_kernels.codes.levels import Digits
from moa_kernels.codes.rotary import Rotary
from moa_kernels.codes.rotation import hadamard


@dataclass(frozen=True)
class Transform:
    """One layer's transform of keys, or of values; float64.

    Attributes:
        into: M, ``[kv_heads, width, width]``; vectors are rows, ``y = (x - mean) @ into``.
        back: Of what comes back of y; the inverse of ``into`` without ``digits``.
        mean: ``[kv_heads, width]``, or None where nothing is taken off.
        rotary: What keys went through, to be undone first; None where there is none.
        digits: Which codes are digits of one channel; None where each is a channel.
        bits: Of the codes that it is for; None where it is for any below 8.
    """

    into: Tensor
    back: Tensor
    mean: Tensor | None = None
    rotary: Rotary | None = None
    digits: Digits | None = None
    bits: int | None = None

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
        _require_statics(balance, mean)
        rotation = hadamard(balance.shape[-1]).to(balance.device)
        inverse = _inverse(balance)
        return cls(balance.double() @ rotation, rotation.mT @ inverse, mean.double(), rotary)

    @classmethod
    def of_keys(
        cls,
        balance: Tensor,
        frequencies: Tensor,
        mean: Tensor,
        order: Tensor,
        spectrum: Tensor | None = None,
        *,
        bits: int,
    ) -> Transform:
        """As files keep a layer's, for keys of some bits.

        Args:
            balance: ``[kv_heads, width, width]``, invertible.
            frequencies: Of `Rotary`, ``[width / 2]``.
            mean: ``[kv_heads, width]``, before rotary embedding.
            order: Of `Rotary`, ``[width]``.
            spectrum: Variance of every channel behind ``balance``, decreasing, ``[kv_heads, width]``. Without it, as in
                files from before, no channel has two digits.
            bits: Of a code, below 8.

        Raises:
            ValueError: As `balanced` and `Rotary`, or a spectrum isn't positive and decreasing.
        """
        rotary = Rotary(frequencies.double(), order.long()) if frequencies.any() else None
        if spectrum is None:
            return cls.balanced(balance, mean, rotary)
        _require_statics(balance, mean)
        if spectrum.shape != mean.shape or not ((spectrum > 0).all() and (spectrum.diff() <= 0).all()):
            raise ValueError(f"spectrum {tuple(spectrum.shape)} must be {tuple(mean.shape)}, positive and decreasing")
        counts = allotted(spectrum, bits)
        into, back, digits = in_digits(balance.double(), _inverse(balance), spectrum.double(), counts, bits)
        return cls(into, back, mean.double(), rotary, digits, bits)

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
        """Vectors of what comes back of codes, float64; without digits the inverse of `apply`.

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
        digits = None if self.digits is None else self.digits.of(index)
        return Transform(self.into[index], self.back[index], mean, self.rotary, digits, self.bits)

    def to(self, device: torch.device | str) -> Transform:
        """The same on another device."""
        mean = None if self.mean is None else self.mean.to(device)
        rotary = None if self.rotary is None else self.rotary.to(device)
        digits = None if self.digits is None else self.digits.to(device)
        return Transform(self.into.to(device), self.back.to(device), mean, rotary, digits, self.bits)


def _require_statics(balance: Tensor, mean: Tensor) -> None:
    if balance.ndim != 3 or balance.shape[1] != balance.shape[2] or mean.shape != balance.shape[:2]:
        raise ValueError(
            f"balance {tuple(balance.shape)} must be [kv_heads, width, width] and mean {tuple(mean.shape)} "
            "[kv_heads, width]"
        )
    if not (balance.isfinite().all() and mean.isfinite().all()):
        raise ValueError("balance and mean must be finite")


def _inverse(balance: Tensor) -> Tensor:
    inverse, failed = torch.linalg.inv_ex(balance.double())
    if failed.any() or not inverse.isfinite().all():
        raise ValueError(f"balance of KV heads {failed.nonzero()[:, 0].tolist()} has no inverse")
    found: Tensor = inverse
    return found
