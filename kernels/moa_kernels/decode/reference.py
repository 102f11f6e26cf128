"""Decode attention in plain torch, one KV head after the other; it defines what every implementation computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans


class Decode(NamedTuple):
    """Checked arguments of `moa_kernels.decode.span_decode`, which describes them; defaults are filled in."""

    query: Tensor
    keys: Tensor
    values: Tensor
    lens: Tensor
    layout: RingLayout
    spans: HeadSpans
    scale: float
    softcap: float | None
    sink_logits: Tensor | None


def span_decode(call: Decode) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, computed in float32 or wider."""
    query, keys, values, lens, layout, spans, scale, softcap, sink_logits = call
    heads, new = query.shape[1:3]
    kv_heads = len(spans.heads)
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).unflatten(1, (kv_heads, heads // kv_heads))  # [batch, kv_heads, group, new, head_dim]
    query_at = lens[:, None] - new + torch.arange(new, device=lens.device)  # [batch, new]
    positions = layout.positions(lens)  # [batch, slots]
    outputs, lses = [], []
    for head, (offset, capacity) in enumerate(zip(layout.offsets, layout.capacities, strict=True)):
        rule = HeadSpans((spans.heads[head],), spans.sliding_window)
        visible = rule.visible(query_at, positions[:, offset : offset + capacity])[0]  # [batch, new, capacity]
        # Slots that no query sees may hold NaN, and 0 * NaN is NaN.
        unseen = ~visible.any(1)[:, :, None]
        key, value = (  # [batch, 1, capacity, head_dim]
            cache[:, None, offset : offset + capacity].to(wide).masked_fill(unseen[:, None], 0)
            for cache in (keys, values)
        )
        scores = grouped[:, head] @ key.mT * scale  # [batch, group, new, capacity]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        lse = scores.logsumexp(-1)
        if sink_logits is not None:
            lse = torch.logaddexp(lse, sink_logits.to(wide).view(kv_heads, -1)[head][:, None])
        # A row that sees nothing has an LSE of -inf: its weights are exp(-inf - 0) = 0.
        dead = lse == -torch.inf
        outputs.append((scores - lse.masked_fill(dead, 0)[..., None]).exp() @ value)
        lses.append(lse)
    return torch.cat(outputs, 1).to(query.dtype), torch.cat(lses, 1).float()
