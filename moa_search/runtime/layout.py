"""Where the keys of every head lie in a layer's flat buffer."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moa_search.runtime.rules import LayerRules

__all__ = ["EMPTY", "Layout"]

EMPTY = 2**31 - 1
"""Position of a slot that holds no key: later than any query, so that causality hides it."""


class Layout:
    """Which slot of the flat buffer holds which position of which head.

    Attributes:
        capacities: Slots per head.
        offsets: First slot of each head.
        ring: ``[kv_heads]``, slots per head besides the sink; at least 1.
        head: ``[slots]``, the head of each slot.
    """

    def __init__(self, rules: LayerRules, capacities: list[int], device: torch.device) -> None:
        self.sink = rules.sink
        self.capacities = capacities
        self.offsets = [0, *accumulate(capacities)][:-1]
        counts = torch.tensor(capacities, device=device)
        # A layout shorter than the sink has no ring and stores no position that asks for it.
        self.ring = (counts - rules.sink).clamp(min=1)
        self.head = torch.arange(len(capacities), device=device).repeat_interleave(counts)
        self._offset = torch.tensor(self.offsets, device=device)
        self._index = torch.arange(len(self.head), device=device) - self._offset[self.head]

    def slot(self, head: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Slots of positions of heads; the two broadcast."""
        ringed = self.sink + (position - self.sink) % self.ring[head]
        return self._offset[head] + position.where(position < self.sink, ringed)

    def positions(self, lens: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
        """Position that each slot holds, or `EMPTY`.

        Args:
            lens: ``[batch]``, tokens stored.
            floor: ``[batch, kv_heads]``, the oldest position that each ring may still hold.

        Returns:
            int64 ``[batch, slots]``.
        """
        last = lens[:, None] - 1
        sunk = self._index < self.sink
        position = self._index.where(sunk, last - (last - self._index) % self.ring[self.head])
        held = (position <= last) & (sunk | (position >= floor[:, self.head]))
        return position.where(held, EMPTY)
