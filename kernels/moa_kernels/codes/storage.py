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
under the head's transform (`moa_kernels.codes.turns`). For the key x of a token at position p, with R(p) the layer's
rotary embedding (`moa_kernels.codes.rotary`)::

    y = (x R(p)^-1 - mean[h]) @ into[h]            x = (y @ back[h] + mean[h]) R(p)

Codes of keys may be digits of one number (`moa_kernels.codes.digits`), which matters as they are written, not as they
are read: ``back`` puts digits together.

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

    def sides(self, stored: Stored) -> list[tuple[Side, Tensor, Tensor, Tensor]]:
        """Of keys, then of values: where they are, codes, scales and sinks."""
        return [
            (self.keys, stored.key_codes, stored.key_scales, stored.key_sinks),
            (self.values, stored.value_codes, stored.value_scales, stored.value_sinks),
        ]

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


@functools.lru_cache(maxsize=4096)
def _from_flat(flat: tuple[int, ...]) -> CodeLayout:
    width, plain_bytes, *numbers = flat
    heads = len(numbers) // 4
    key_bits, value_bits = tuple(numbers[:heads]), tuple(numbers[heads : 2 * heads])
    return CodeLayout(RingLayout.from_flat(numbers[2 * heads :]), key_bits, value_bits, width, plain_bytes)
