"""Storing new keys and values in plain torch."""

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
    kv_heads, new = new_keys.shape[1:3]
    head, token = torch.arange(kv_heads, device=lens.device), torch.arange(new, device=lens.device)
    count = torch.full_like(lens, new) if counts is None else counts.clamp(max=new)
    position = (lens[:, None] + token)[:, None]  # [batch, 1, new]
    sink, end = (torch.tensor(column, device=lens.device) for column in (layout.sinks, layout.ends))
    lasts = position >= (lens + count)[:, None, None] - layout.rings(lens.device)[:, None]
    slot = layout.slot(head[:, None], position)
    # Where the sink is longer than the whole capacity, slots lie beyond it.
    kept = (token < count[:, None, None]) & ((position < sink[:, None]) | lasts) & (slot < end[:, None])
    sample = kept.nonzero(as_tuple=True)[0]
    keys[sample, slot[kept]] = new_keys[kept]
    values[sample, slot[kept]] = new_values[kept]
