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
    new = new_keys.shape[2]
    token = torch.arange(new, device=lens.device)
    count = torch.full_like(lens, new) if counts is None else counts.clamp(max=new)
    slot, kept = layout.kept(lens[:, None] + token, lens + count)
    if counts is not None:
        kept = kept & (token < count[:, None, None])
    sample = kept.nonzero(as_tuple=True)[0]
    keys[sample, slot[kept]] = new_keys[kept]
    values[sample, slot[kept]] = new_values[kept]
