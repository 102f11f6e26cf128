"""Where a ragged cache keeps the keys of every KV head: sink tokens first, then a ring of the newest ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["RingLayout"]


@dataclass(frozen=True)
class RingLayout:
    """Slots of a flat buffer ``[batch, slots, head_dim]``, heads one after the other.

    Position p of a head lies in its slot p if ``p < sink``, else in slot ``sink + (p - sink) % (capacity - sink)``.
    A head must hold all that its next queries attend: ``capacity >= sink + window + new tokens - 1``.

    Attributes:
        capacities: Slots per KV head.
        sinks: Sink tokens per KV head.
    """

    capacities: tuple[int, ...]
    sinks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.capacities) != len(self.sinks):
            raise ValueError(f"{len(self.capacities)} capacities for {len(self.sinks)} sinks")
        if min(self.capacities) < 0 or sum(self.capacities) >= 2**31:
            raise ValueError(f"capacities must be 0 or more and sum to less than 2**31, not {self.capacities}")

    @classmethod
    def from_flat(cls, flat: Sequence[int]) -> RingLayout:
        """The inverse of `flat`."""
        heads = len(flat) // 2
        return cls(tuple(flat[:heads]), tuple(flat[heads:]))

    @property
    def flat(self) -> list[int]:
        """Capacities, then sinks: operators take lists of integers only."""
        return [*self.capacities, *self.sinks]

    @property
    def offsets(self) -> list[int]:
        """First slot of each head."""
        return [0, *accumulate(self.capacities)][:-1]

    @property
    def slots(self) -> int:
        """Slots of all heads."""
        return sum(self.capacities)

    def tensor(self, device: torch.device) -> Tensor:
        """int32 ``[kv_heads, 3]``: offset, sink, capacity. Made once per device: a CUDA graph may capture it."""
        return _tensor(self, device)

    def heads(self, device: torch.device) -> Tensor:
        """int64 ``[slots]``, the KV head that each slot belongs to."""
        return self._index(device)[1]

    def rings(self, device: torch.device) -> Tensor:
        """int64 ``[kv_heads]``, slots besides the sink, at least 1."""
        return self._index(device)[0][2]

    def slot(self, head: int | Tensor, position: Tensor) -> Tensor:
        """Slots in the flat buffer, int64, of positions of heads; the two broadcast.

        Where the sink is longer than a head's whole capacity, some lie beyond the head's own slots.
        """
        offset, sink, ring = self._index(position.device)[0][:, head]
        slot: Tensor = offset + position.where(position < sink, sink + (position - sink) % ring)
        return slot

    def positions(self, length: Tensor) -> Tensor:
        """Position that each slot should hold after ``length`` tokens, -1 if none.

        Args:
            length: int64 ``[batch]``.

        Returns:
            int64 ``[batch, slots]``.
        """
        columns, head, index = self._index(length.device)
        _, sink, ring = columns[:, head]
        last = length[:, None] - 1
        sunk = index < sink
        position = index.where(sunk, last - (last - index) % ring)
        held = (position <= last) & (position >= sink.where(~sunk, 0))
        return position.where(held, -1)

    def _index(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Offset, sink and ring size ``[3, kv_heads]``; and of each slot its head and its place in the head."""
        # Kept with this very layout and not by value, as `tensor` is: these are as long as the cache.
        kept: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = self.__dict__.setdefault("_kept", {})
        if device not in kept:
            # A layout shorter than the sink has no ring and stores no position that asks for it.
            ring = [max(most - sink, 1) for most, sink in zip(self.capacities, self.sinks, strict=True)]
            columns = torch.tensor([self.offsets, self.sinks, ring], device=device)
            counts = torch.tensor(self.capacities, device=device)
            head = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=self.slots)
            kept[device] = columns, head, torch.arange(self.slots, device=device) - columns[0][head]
        return kept[device]


@functools.lru_cache(maxsize=4096)
def _tensor(layout: RingLayout, device: torch.device) -> Tensor:
    columns = zip(layout.offsets, layout.sinks, layout.capacities, strict=True)
    return torch.tensor(list(columns), dtype=torch.int32, device=device)
