"""How one layer of a cache stores codes: a flat buffer of bytes for keys and one for values, whatever heads' bits are.

The contract, by which append and decode of every implementation go. With `RingLayout` L, position p of KV head h is in
the sink (``p < sink``) or in slot ``r = (p - sink) % rings[h]`` of the head's ring, ``rings[h] = capacity[h] - sink``
(or 0). All heads have one sink.

* **Sinks** are plain numbers of the model's type, ``[batch, kv_heads * sink, width]``: position p of head h is row
  ``h * sink + p``. That holds for heads of 16 bits, too.
* **Codes** are uint8 ``[batch, nbytes]``. Slot r of head h begins at byte ``offsets[h] + r * rows[h]``; ``offsets`` and
  ``nbytes`` are multiples of `ALIGNMENT`. A row holds one vector's codes in the planes of `moa_kernels.codes.packing`,
  without its scale; with 16 bits, the numbers' own bytes.
* **Scales** are float16 ``[batch, scale_slots]``. That of slot r of head h is at ``scale_offsets[h] + r``. Heads of 16
  bits have none; their ``scale_offsets`` say where one would be.

A row stands for ``y = scale * (code - (2**bits - 1) / 2)``. With 8 bits that is the vector itself, below 8 bits it is
under the head's transform (`Turns`). For the key x of a token at position p, with R(p) the layer's rotary embedding
(`moa_kernels.codes.rotary`)::

    y = (x R(p)^-1 - mean[h]) @ into[h]            x = (y @ back[h] + mean[h]) R(p)

Logits are ``scale * (q . x)``, then the soft cap. An output is ``sum_plain w v + (sum_coded w y) @ back[h]``: the sums
over plain values (sinks, 16 and 8 bits) and over those under a transform apart, the latter turned back once. Values
have neither mean nor rotary embedding. Slots that hold no visible token, codes and scales, may hold anything.

For kernels: with channels in `Turns.order`, pairs are the two halves of a vector, so that ``q . x`` is a product of
``q[order]`` and ``halves(y @ back[:, order] + mean[order])`` (`Turns.back_by_halves`, `mean_by_halves`, `angles`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from moa_kernels.codes.codec import SCALE_BYTES, token_bytes
from moa_kernels.codes.rotary import Rotary
from moa_kernels.codes.transforms import Transform
from moa_kernels.rings import RingLayout

ALIGNMENT = 16
"""Bytes of which every head's first one is a multiple."""


@dataclass(frozen=True)
class Side:
    """Where the keys, or the values, of every KV head are; see the module.

    Attributes:
        bits: Per KV head.
        offsets: Bytes before each head's first row.
        rows: Bytes of a row.
        nbytes: Of all heads, per sample.
        scale_offsets: Scales before each head's first one.
        scale_slots: Scales of all heads, per sample.
    """

    bits: tuple[int, ...]
    offsets: tuple[int, ...]
    rows: tuple[int, ...]
    nbytes: int
    scale_offsets: tuple[int, ...]
    scale_slots: int

    def rows_of(self, codes: Tensor, head: int, slots: int) -> Tensor:
        """A head's part ``[batch, slots, row]`` of all codes, a view."""
        first, row = self.offsets[head], self.rows[head]
        part: Tensor = codes[:, first : first + slots * row].unflatten(1, (slots, row))
        return part

    @functools.cached_property
    def heads_by_bits(self) -> dict[int, tuple[int, ...]]:
        """The KV heads that share a number of bits."""
        return {bits: tuple(h for h, b in enumerate(self.bits) if b == bits) for bits in dict.fromkeys(self.bits)}


@dataclass(frozen=True)
class CodeLayout:
    """Where one layer keeps its codes, derived from where its rings are.

    Attributes:
        rings: Slots of every KV head; one sink for all.
        key_bits: Per KV head, one of `moa_kernels.codes.BITS`.
        value_bits: Likewise.
        width: Numbers in a key, and in a value.
        plain_bytes: Of a number of the model's type.

    Raises:
        ValueError: Sinks differ, bits and rings differ in number, or the width doesn't pack into some bits.
    """

    rings: RingLayout
    key_bits: tuple[int, ...]
    value_bits: tuple[int, ...]
    width: int
    plain_bytes: int

    def __post_init__(self) -> None:
        if len(set(self.rings.sinks)) > 1:
            raise ValueError(f"all KV heads must have one sink, not {self.rings.sinks}")
        if not len(self.key_bits) == len(self.value_bits) == len(self.rings.capacities):
            raise ValueError(
                f"{len(self.rings.capacities)} rings for {len(self.key_bits)} heads' keys and {len(self.value_bits)} "
                "heads' values"
            )
        _ = self.keys, self.values  # checks bits and widths

    @property
    def sink(self) -> int:
        """Tokens of every head that stay plain."""
        return self.rings.sinks[0]

    @functools.cached_property
    def ring_slots(self) -> tuple[int, ...]:
        """Slots of each head's ring."""
        return tuple(max(capacity - self.sink, 0) for capacity in self.rings.capacities)

    @functools.cached_property
    def keys(self) -> Side:
        """Where keys are."""
        return self._side(self.key_bits)

    @functools.cached_property
    def values(self) -> Side:
        """Where values are."""
        return self._side(self.value_bits)

    def tensor(self, device: torch.device) -> Tensor:
        """int64 ``[kv_heads, 2, 4]``, of keys and of values: bits, offset, row, scale offset; made once per device.

        `RingLayout.tensor` has sinks and capacities.
        """
        kept: dict[torch.device, Tensor] = self.__dict__.setdefault("_by_device", {})
        if device not in kept:
            table = [
                list(zip(side.bits, side.offsets, side.rows, side.scale_offsets, strict=True))
                for side in (self.keys, self.values)
            ]
            kept[device] = torch.tensor(table, device=device).transpose(0, 1).contiguous()
        return kept[device]

    @property
    def flat(self) -> list[int]:
        """All of it as integers, for operators: width, bytes of a plain number, bits of keys, of values, and rings."""
        return [self.width, self.plain_bytes, *self.key_bits, *self.value_bits, *self.rings.flat]

    @classmethod
    def from_flat(cls, flat: Sequence[int]) -> CodeLayout:
        """The inverse of `flat`."""
        return _from_flat(tuple(flat))

    def empty(self, batch: int, dtype: torch.dtype, device: torch.device) -> Stored:
        """Room for the codes and sinks of some samples, zeros.

        Args:
            batch: Samples.
            dtype: The model's type, of ``plain_bytes`` bytes.
            device: Where it is.
        """
        assert dtype.itemsize == self.plain_bytes
        rows = len(self.key_bits) * self.sink
        return Stored(
            *(torch.zeros(batch, side.nbytes, dtype=torch.uint8, device=device) for side in (self.keys, self.values)),
            *(
                torch.zeros(batch, side.scale_slots, dtype=torch.float16, device=device)
                for side in (self.keys, self.values)
            ),
            *(torch.zeros(batch, rows, self.width, dtype=dtype, device=device) for _ in range(2)),
        )

    def _side(self, bits: tuple[int, ...]) -> Side:
        rows = tuple(
            token_bytes(b, self.width, self.plain_bytes) - (0 if b == 16 else SCALE_BYTES) for b in bits
        )  # fmt: skip
        ends = [
            *accumulate(
                -(-slots * row // ALIGNMENT) * ALIGNMENT for slots, row in zip(self.ring_slots, rows, strict=True)
            )
        ]
        scale_ends = [*accumulate(0 if b == 16 else slots for slots, b in zip(self.ring_slots, bits, strict=True))]
        return Side(bits, (0, *ends[:-1]), rows, ends[-1], (0, *scale_ends[:-1]), scale_ends[-1])


class Stored(NamedTuple):
    """The tensors of one layer; see the module."""

    key_codes: Tensor
    value_codes: Tensor
    key_scales: Tensor
    value_scales: Tensor
    key_sinks: Tensor
    value_sinks: Tensor

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(part.nbytes for part in self)

    def change(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """Every tensor changed."""
        return Stored(*map(change, self))


@dataclass(frozen=True, eq=False)
class Turns:
    """The transforms of a layer's KV heads, stacked; heads that need none have identities and zeros.

    Attributes:
        key_into: Float64 ``[kv_heads, width, width]``; vectors are rows.
        key_back: Its inverse.
        key_mean: Float64 ``[kv_heads, width]``, before rotary embedding.
        frequencies: Of the keys' rotary embedding, float64 ``[width / 2]``; zeros, or none of them, turn nothing.
        order: Its channels, int64 ``[width]``, the pairs' first ones, then their second ones.
        value_into: Float64 ``[kv_heads, width, width]``.
        value_back: Its inverse.
    """

    key_into: Tensor
    key_back: Tensor
    key_mean: Tensor
    frequencies: Tensor
    order: Tensor
    value_into: Tensor
    value_back: Tensor

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
        return cls(key_into, key_back, torch.cat(mean), frequencies, order, value_into, value_back)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the attributes."""
        keys = [self.key_into, self.key_back, self.key_mean, self.frequencies, self.order]
        return [*keys, self.value_into, self.value_back]

    def to(self, device: torch.device) -> Turns:
        """The same on a device."""
        return self if self.order.device == device else Turns(*(part.to(device) for part in self.tensors))

    @functools.cached_property
    def turns_keys(self) -> bool:
        """Whether the keys' rotary embedding turns anything."""
        return bool(self.frequencies.any())

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
        """The inverse of `apply`, in the type of ``y``; keys come by halves.

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


@functools.lru_cache(maxsize=4096)
def _from_flat(flat: tuple[int, ...]) -> CodeLayout:
    width, plain_bytes, *numbers = flat
    heads = len(numbers) // 4
    key_bits, value_bits = tuple(numbers[:heads]), tuple(numbers[heads : 2 * heads])
    return CodeLayout(RingLayout.from_flat(numbers[2 * heads :]), key_bits, value_bits, width, plain_bytes)
