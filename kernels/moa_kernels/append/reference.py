"""Storing new keys and values in plain torch, which defines what every implementation does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moa_kernels.rings import RingLayout


class Append(NamedTuple):
    """Checked arguments of `moa_kernels.append.append_tokens`, which describes them."""

    keys: Tensor
    values: Tensor
    new_keys: Tensor
    new_values: Tensor
    lens: Tensor
    layout: RingLayout
    counts: Tensor | None


def append_tokens(call: Append) -> None:
    """Write what the rings still hold after the last token."""
    keys, values, new_keys, new_values, lens, layout, counts = call
    new = new_keys.shape[2]
    token = torch.arange(new, device=lens.device)
    count = torch.full_like(lens, new) if counts is None else counts.clamp(max=new)
    slot, kept = layout.kept(lens[:, None] + token, lens + count)  # [batch, kv_heads, new], twice
    if counts is not None:
        kept = kept & (token < count[:, None, None])
    sample = kept.nonzero(as_tuple=True)[0]
    keys[sample, slot[kept]] = new_keys[kept]
    values[sample, slot[kept]] = new_values[kept]
