"""The transforms of a layer's KV heads together, as what runs over rings of codes takes them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_kernels.codes.levels import Digits
from moa_kernels.codes.rotary import Rotary
from moa_kernels.codes.transforms import Transform


@dataclass(frozen=True, eq=False)
class Turns:
    """The transforms of a layer's KV heads, stacked; heads that need none have identities and zeros.

    Attributes:
        key_into: Float64 ``[kv_heads, width, width]``; vectors are rows.
        key_back: Of what comes back; its inverse where no codes are digits.
        key_mean: Float64 ``[kv_heads, width]``, before rotary embedding.
        frequencies: Of the keys' rotary embedding, float64 ``[width / 2]``; zeros, or none of them, turn nothing.
        order: Its channels, int64 ``[width]``, the pairs' first ones, then their second ones.
        value_into: Float64 ``[kv_heads, width, width]``.
        value_back: Its inverse.
        digits: `Digits.counts` of keys, int64 ``[kv_heads]``; 0 where no codes are digits.
        digit_sizes: `Digits.weights` and ``norms``, float64 ``[kv_heads, 2]``.
    """

    key_into: Tensor
    key_back: Tensor
    key_mean: Tensor
    frequencies: Tensor
    order: Tensor
    value_into: Tensor
    value_back: Tensor
    digits: Tensor
    digit_sizes: Tensor

    @classmethod
    def of(cls, keys: Sequence[Transform | None], values: Sequence[Transform | None], width: int) -> Turns:
        """Of transforms of one KV head each.

        Args:
            keys: By KV head, under one rotary embedding.
            values: By KV head, without means.
            width: Numbers in a vector.
        """
        rotary = next((t.rotary for t in keys if t is not None and t.rotary is not None), None)
        assert all(t is None or (t.rotary is None) == (rotary is None) for t in keys)
        mean = [
            torch.zeros(1, width, dtype=torch.float64) if t is None or t.mean is None else t.mean.double() for t in keys
        ]
        plain = torch.eye(width, dtype=torch.float64)[None]
        key_into, key_back, value_into, value_back = (
            torch.cat([plain if t is None else getattr(t, part) for t in side])
            for side in (keys, values)
            for part in ("into", "back")
        )
        frequencies = torch.zeros(width // 2, dtype=torch.float64) if rotary is None else rotary.frequencies.double()
        order = torch.arange(width) if rotary is None else rotary.order
        digits = [Digits.none(1, width) if t is None or t.digits is None else t.digits for t in keys]
        counts = torch.cat([of.counts for of in digits])
        sizes = torch.cat([torch.stack([of.weights, of.norms], -1) for of in digits])
        return cls(key_into, key_back, torch.cat(mean), frequencies, order, value_into, value_back, counts, sizes)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the attributes."""
        keys = [self.key_into, self.key_back, self.key_mean, self.frequencies, self.order]
        return [*keys, self.value_into, self.value_back, self.digits, self.digit_sizes]

    def to(self, device: torch.device) -> Turns:
        """The same on a device."""
        return self if self.order.device == device else Turns(*(part.to(device) for part in self.tensors))

    @functools.cached_property
    def turns_keys(self) -> bool:
        """Whether the keys' rotary embedding turns anything."""
        return bool(self.frequencies.any())

    @functools.cached_property
    def has_digits(self) -> bool:
        """Whether any code of a key is a digit."""
        return bool(self.digits.any())

    def digits_of(self, heads: Sequence[int], *, keys: bool) -> Digits | None:
        """Which codes of some heads are digits; None if there are none.

        Args:
            heads: Their indices.
            keys: Whether codes are of keys; values have no digits.
        """
        if not (keys and self.has_digits):
            return None
        index = list(heads)
        return Digits(self.digits[index], self.digit_sizes[index, 0], self.digit_sizes[index, 1])

    @functools.cached_property
    def back_by_halves(self) -> Tensor:
        """``key_back`` with its columns in ``order``, float64 ``[kv_heads, width, width]``."""
        return self.key_back[..., self.order].contiguous()

    @functools.cached_property
    def mean_by_halves(self) -> Tensor:
        """``key_mean`` in ``order``, float64 ``[kv_heads, width]``."""
        return self.key_mean[..., self.order].contiguous()

    def angles(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions before ``length``, and maybe more, ``[positions, width / 2]``.

        Computed in float64; layers of equal frequencies share them.
        """
        rows = max(256, 1 << (length - 1).bit_length())
        return _angles(self._frequencies, rows, dtype, self.order.device)

    @functools.cached_property
    def _frequencies(self) -> tuple[float, ...]:
        return tuple(self.frequencies.tolist())

    def apply(self, x: Tensor, positions: Tensor, heads: Sequence[int], *, keys: bool) -> Tensor:
        """What is coded of keys or values of some heads below 8 bits, float64.

        Args:
            x: ``[batch, heads, tokens, width]``.
            positions: ``[batch or 1, tokens]``.
            heads: Their indices.
            keys: Whether they are keys.
        """
        index, x = list(heads), x.double()
        if not keys:
            return x @ self.value_into[index]
        if self.turns_keys:
            x = Rotary(self.frequencies, self.order).turn(x, positions[:, None], back=True)
        return (x - self.key_mean[index, None]) @ self.key_into[index]

    def invert(self, y: Tensor, positions: Tensor, heads: Sequence[int], *, keys: bool) -> Tensor:
        """What comes back of codes, in the type of ``y``; keys come by halves.

        Args:
            y: ``[batch, heads, tokens, width]``.
            positions: ``[batch or 1, heads or 1, tokens]``, 0 or more.
            heads: Their indices.
            keys: Whether they are keys.
        """
        index = list(heads)
        if not keys:
            return y @ self.value_back[index].to(y.dtype)
        x = y @ self.back_by_halves[index].to(y.dtype) + self.mean_by_halves[index, None].to(y.dtype)
        if not self.turns_keys or not positions.numel():
            return x
        cos, sin = (table[positions] for table in self.angles(int(positions.max()) + 1, y.dtype))
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@functools.lru_cache(maxsize=16)
def _angles(
    frequencies: tuple[float, ...], rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)
