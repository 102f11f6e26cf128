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

    def slot(self, head: int, position: Tensor) -> Tensor:
        """Slots in the flat buffer of positions of one head, int64."""
        ring = max(self.capacities[head] - self.sinks[head], 1)
        ringed = self.sinks[head] + (position - self.sinks[head]) % ring
        return self.offsets[head] + torch.where(position < self.sinks[head], position, ringed)

    def positions(self, head: int, length: Tensor) -> Tensor:
        """Position that each slot of one head should hold after ``length`` tokens, -1 if none.

        Args:
            head: KV head.
            length: int64 ``[batch]``.

        Returns:
            int64 ``[batch, capacity]``.
        """
        sink, capacity = self.sinks[head], self.capacities[head]
        index = torch.arange(capacity, device=length.device)
        last = length[:, None] - 1
        newest = last - (last - index) % max(capacity - sink, 1)
        position = torch.where(index < sink, index, newest)
        held = (position <= last) & (position >= torch.where(index < sink, 0, sink))
        return torch.where(held, position, -1)


@functools.lru_cache(maxsize=4096)
def _tensor(layout: RingLayout, device: torch.device) -> Tensor:
    columns = zip(layout.offsets, layout.sinks, layout.capacities, strict=True)
    return torch.tensor(list(columns), dtype=torch.int32, device=device)
