"""Storing new keys and values in plain torch, one KV head after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from moa_kernels.rings import RingLayout

__all__ = ["append_tokens"]


def append_tokens(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    lens: Tensor,
    layout: RingLayout,
    counts: Tensor | None,
) -> None:
    """As `moa_kernels.append.append_tokens`."""
    token = torch.arange(new_keys.shape[2], device=lens.device)
    position = lens[:, None] + token
    count = torch.full_like(lens, len(token)) if counts is None else counts.clamp(max=len(token))
    for head, (offset, capacity, sink) in enumerate(zip(layout.offsets, layout.capacities, layout.sinks, strict=True)):
        slot = layout.slot(head, position)
        lasts = position >= (lens + count)[:, None] - max(capacity - sink, 1)
        # Where the sink is longer than the whole capacity, slots lie beyond it.
        kept = (token < count[:, None]) & ((position < sink) | lasts) & (slot < offset + capacity)
        sample, column = kept.nonzero(as_tuple=True)
        keys[sample, slot[kept]] = new_keys[sample, head, column]
        values[sample, slot[kept]] = new_values[sample, head, column]
