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
under the head's transform (`Turns`)::

    y = (x - mean[h, block]) @ into[h]        block = min(position // stride, blocks - 1)

so that, with ``turned = q @ back[h].T`` and ``bias[h, block] = q . mean[h, block]``, a key's logit is

    ``scale * (turned . y + bias[h, block])``, then the soft cap,

and an output is ``sum_plain w v + (sum_coded w y) @ back[h]``: the values' sums over plain vectors (sinks, 16 bits) and
over coded ones apart, the latter turned back once. Values have no mean. Slots that hold no visible token, codes and
scales, may hold anything.
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
from moa_kernels.codes.transforms import Transform
from moa_kernels.rings import RingLayout

ALIGNMENT = 16
"""Bytes of which every head's first one is a multiple."""

FOREVER = 2**30
"""A stride longer than any sequence."""


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


class Turns(NamedTuple):
    """The transforms of a layer's KV heads, float64 and stacked; heads that need none have identities and zeros.

    Attributes:
        key_into: ``[kv_heads, width, width]``; vectors are rows.
        key_back: Its inverse.
        key_mean: ``[kv_heads, blocks, width]``.
        stride: Positions per block; the last block has no end.
        value_into: ``[kv_heads, width, width]``.
        value_back: Its inverse.
    """

    key_into: Tensor
    key_back: Tensor
    key_mean: Tensor
    stride: int
    value_into: Tensor
    value_back: Tensor

    @classmethod
    def of(cls, keys: Sequence[Transform | None], values: Sequence[Transform | None], width: int) -> Turns:
        """Of transforms of one KV head each.

        Args:
            keys: By KV head.
            values: By KV head, without means.
            width: Numbers in a vector.
        """
        strides = {getattr(t, "stride", FOREVER) for t in keys if t is not None and t.mean is not None}
        assert len(strides) <= 1, "one layer's heads share their blocks of positions"
        means = [None if t is None or t.mean is None else t.mean.reshape(-1, width) for t in keys]
        blocks = max((len(mean) for mean in means if mean is not None), default=1)
        assert all(mean is None or len(mean) == blocks for mean in means)
        mean = torch.stack([torch.zeros(blocks, width).double() if mean is None else mean.double() for mean in means])
        plain = torch.eye(width, dtype=torch.float64)
        (key_into, key_back), (value_into, value_back) = (
            [torch.cat([plain[None] if t is None else getattr(t, part) for t in side]) for part in ("into", "back")]
            for side in (keys, values)
        )
        return cls(key_into, key_back, mean, min(strides, default=FOREVER), value_into, value_back)

    def to(self, device: torch.device) -> Turns:
        """The same on a device."""
        into, back, mean, value_into, value_back = (x.to(device) for x in self if isinstance(x, Tensor))
        return Turns(into, back, mean, self.stride, value_into, value_back)

    def block(self, positions: Tensor) -> Tensor:
        """The block of each position; that of a negative one is 0."""
        return (positions // self.stride).clamp(0, self.key_mean.shape[1] - 1)

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
        return (x - self.key_mean[index][:, self.block(positions)].transpose(0, 1)) @ self.key_into[index]

    def invert(self, y: Tensor, positions: Tensor, heads: Sequence[int], *, keys: bool) -> Tensor:
        """The inverse of `apply`, in the type of ``y``; positions are ``[batch or 1, heads, tokens]``."""
        index = list(heads)
        if not keys:
            return y @ self.value_back[index].to(y.dtype)
        head = torch.tensor(index, device=y.device)[:, None]
        mean = self.key_mean[head, self.block(positions)]  # [batch or 1, heads, tokens, width]
        return y @ self.key_back[index].to(y.dtype) + mean.to(y.dtype)

    def queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Turned queries, and their products with the means of all blocks.

        Args:
            query: ``[batch, kv_heads, rows, width]``.

        Returns:
            ``[batch, kv_heads, rows, width]`` and ``[batch, kv_heads, rows, blocks]``.
        """
        return query @ self.key_back.mT.to(query.dtype), query @ self.key_mean.mT.to(query.dtype)


@functools.lru_cache(maxsize=4096)
def _from_flat(flat: tuple[int, ...]) -> CodeLayout:
    width, plain_bytes, *numbers = flat
    heads = len(numbers) // 4
    key_bits, value_bits = tuple(numbers[:heads]), tuple(numbers[heads : 2 * heads])
    return CodeLayout(RingLayout.from_flat(numbers[2 * heads :]), key_bits, value_bits, width, plain_bytes)
