"""Where a ragged cache keeps the keys of every KV head: sink tokens first, then a ring of the newest ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


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
        return _from_flat(tuple(flat))

    @property
    def flat(self) -> list[int]:
        """Capacities, then sinks: operators take lists of integers only."""
        return [*self.capacities, *self.sinks]

    @property
    def offsets(self) -> list[int]:
        """First slot of each head."""
        return [0, *accumulate(self.capacities)][:-1]

    @property
    def ends(self) -> list[int]:
        """Slot after each head's last one."""
        return [*accumulate(self.capacities)]

    @functools.cached_property
    def slots(self) -> int:
        """Slots of all heads."""
        return sum(self.capacities)

    def tensor(self, device: torch.device) -> Tensor:
        """int32 ``[kv_heads, 3]``: offset, sink, capacity. Made once per device: a CUDA graph may capture it."""
        kept: dict[torch.device, Tensor] = self.__dict__.setdefault("_by_device", {})
        if device not in kept:
            kept[device] = _tensor(self, device)  # layers with equal layouts share it
        return kept[device]

    def rings(self, device: torch.device) -> Tensor:
        """int64 ``[kv_heads]``, slots besides the sink, at least 1."""
        return self._columns(device)[2]

    def heads(self, device: torch.device) -> Tensor:
        """int64 ``[slots]``, the KV head that each slot belongs to."""
        return self._slots(device)[0]

    def kept(self, position: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of positions in every head, and whether a position is still there after ``length`` tokens.

        Args:
            position: int64 ``[batch, tokens]``.
            length: int64 ``[batch]``.

        Returns:
            ``[batch, kv_heads, tokens]`` twice: int64, and boolean.
        """
        # [kv_heads, 1] each, against positions [batch, 1, tokens]
        offset, sink, ring, end = self._columns(position.device)[:, :, None].unbind()
        position = position[:, None]
        slot = _slot(offset, sink, ring, position)
        # Where the sink is longer than the whole capacity, slots lie beyond it.
        return slot, ((position < sink) | (position >= length[:, None, None] - ring)) & (slot < end)

    def slot(self, head: int | Tensor, position: Tensor) -> Tensor:
        """Slots in the flat buffer, int64, of positions of heads; the two broadcast.

        Where the sink is longer than a head's whole capacity, some lie beyond the head's own slots.
        """
        offset, sink, ring, _ = self._columns(position.device)[:, head]
        return _slot(offset, sink, ring, position)

    def positions(self, length: Tensor) -> Tensor:
        """Position that each slot should hold after ``length`` tokens, -1 if none.

        Args:
            length: int64 ``[batch]``.

        Returns:
            int64 ``[batch, slots]``.
        """
        head, index = self._slots(length.device)
        _, sink, ring, _ = self._columns(length.device)[:, head]
        # The newest position that falls on each slot: [batch, slots].
        last = length[:, None] - 1
        sunk = index < sink
        position = index.where(sunk, last - (last - index) % ring)
        held = (position <= last) & (position >= sink.where(~sunk, 0))
        return position.where(held, -1)

    # What follows is kept with this very layout and not by value, as `tensor` is: it may be as long as the cache.

    def _columns(self, device: torch.device) -> Tensor:
        """int64 ``[4, kv_heads]``: first slot, sink, ring size, and slot after the last."""
        kept: dict[torch.device, Tensor] = self.__dict__.setdefault("_columns_by_device", {})
        if device not in kept:
            # A layout shorter than the sink has no ring and stores no position that asks for it.
            rings = [max(most - sink, 1) for most, sink in zip(self.capacities, self.sinks, strict=True)]
            kept[device] = torch.tensor([self.offsets, self.sinks, rings, self.ends], device=device)
        return kept[device]

    def _slots(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int64 ``[slots]``, twice: each slot's head, and its place in that head."""
        kept: dict[torch.device, tuple[Tensor, Tensor]] = self.__dict__.setdefault("_slots_by_device", {})
        if device in kept:
            return kept[device]
        counts = torch.tensor(self.capacities, device=device)
        head = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=self.slots)
        slots = head, torch.arange(self.slots, device=device) - self._columns(device)[0][head]
        if device.type == "cpu":  # elsewhere kernels decode, which never ask: memory is worth more there
            kept[device] = slots
        return slots


def _slot(offset: Tensor, sink: Tensor, ring: Tensor, position: Tensor) -> Tensor:
    return offset + position.where(position < sink, sink + (position - sink) % ring)


@functools.lru_cache(maxsize=4096)
def _from_flat(flat: tuple[int, ...]) -> RingLayout:
    heads = len(flat) // 2
    return RingLayout(flat[:heads], flat[heads:])


@functools.lru_cache(maxsize=4096)
def _tensor(layout: RingLayout, device: torch.device) -> Tensor:
    columns = zip(layout.offsets, layout.sinks, layout.capacities, strict=True)
    return torch.tensor(list(columns), dtype=torch.int32, device=device)
