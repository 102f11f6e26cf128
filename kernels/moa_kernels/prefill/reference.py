"""Prefill attention in plain torch, which defines what every implementation computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moa_kernels.spans import HeadSpans

ROWS = 256
"""Query rows at once: bounds the memory of the scores."""


class Prefill(NamedTuple):
    """Checked arguments of `moa_kernels.prefill.span_prefill`, which describes them; defaults are filled in."""

    query: Tensor
    key: Tensor
    value: Tensor
    spans: HeadSpans
    starts: Tensor | None
    ends: Tensor | None
    scale: float
    softcap: float | None
    sink_logits: Tensor | None


def span_prefill(call: Prefill) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, computed in float32, or float64 for float64 inputs."""
    query, key, value, spans, starts, ends, scale, softcap, sink_logits = call
    batch, queries, kv_heads, keys = query.shape[0], query.shape[2], *key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    column = torch.arange(keys, device=key.device)
    start = column.new_zeros(batch) if starts is None else starts.long()
    end = column.new_full((batch,), keys) if ends is None else ends.long()
    real = (column >= start[:, None]) & (column < end[:, None])  # [batch, keys]
    grouped = query.unflatten(1, (kv_heads, -1))  # [batch, kv_heads, group, queries, head_dim]
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=wide)
    for rows in torch.arange(queries, device=key.device).split(ROWS):
        row = keys - queries + rows
        # Who sees whom: [batch, kv_heads, rows, keys]
        visible = spans.visible(row - start[:, None], column - start[:, None]).transpose(0, 1)
        visible = visible & real[:, None, None, :] & real[:, None, row, None]
        read = visible.any(2)[..., None]  # an unread key may hold NaN
        k, v = (torch.where(read, x.to(wide), 0)[:, :, None] for x in (key, value))
        # Scores: [batch, kv_heads, group, rows, keys]
        scores = grouped[:, :, :, rows].to(wide) @ k.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
        total = torch.logsumexp(scores, -1)
        if sink_logits is not None:
            total = torch.logaddexp(total, sink_logits.to(wide).view(1, kv_heads, -1, 1))
        # A row that sees nothing has a total of -inf: its weights are exp(-inf - 0) = 0.
        weights = torch.exp(scores - total.masked_fill(total == -torch.inf, 0)[..., None])
        out[:, :, rows] = (weights @ v).flatten(1, 2).to(query.dtype)
        lse[:, :, rows] = total.flatten(1, 2)
    return out, lse
