"""Influence statistics from whole N x N matrices, in the plainest way: every window is its own masked softmax."""

from __future__ import annotations

import torch
from moa_kernels.influence import STATISTICS

__all__ = ["direct"]


def direct(query, key, value, grad_out, windows, row_buckets, sink, scale, softcap, sinks):
    """Statistics from full matrices; every window is its own masked softmax."""
    heads, n, _ = query.shape
    group = heads // key.shape[0]
    keys, values = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = query @ keys.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    visible = j <= i
    scores = scores.masked_fill(~visible, float("-inf"))
    extra = torch.full((heads, n, 1), float("-inf"), dtype=query.dtype)
    if sinks is not None:
        extra = sinks[:, None, None].expand(heads, n, 1)

    def softmax(kept):
        return torch.cat([scores.masked_fill(~kept, float("-inf")), extra], -1).softmax(-1)[..., :n]

    attention = softmax(visible)
    out = attention @ values
    gain, row_gain = grad_out @ values.mT, (grad_out * out).sum(-1, keepdim=True)
    effect = (attention * (gain - row_gain) / (1 - attention).clamp_min(1e-6)).abs()
    rows = -(-n // row_buckets)
    totals = {name: torch.zeros(key.shape[0], row_buckets, len(windows), dtype=query.dtype) for name in STATISTICS}
    for index, size in enumerate(windows):
        kept = visible & ((i - j < size) | (j < sink))
        delta = (grad_out * (softmax(kept) @ values - out)).sum(-1)
        by_row = {
            "squared": delta**2,
            "signed": delta,
            "absolute": delta.abs(),
            "elementwise": (effect * (visible & ~kept)).sum(-1),
            "recall": (attention * kept).sum(-1),
        }
        for name, values_by_row in by_row.items():
            grouped = values_by_row.unflatten(0, (-1, group)).sum(1)
            for bucket in range(row_buckets):
                totals[name][:, bucket, index] = grouped[:, bucket * rows : (bucket + 1) * rows].sum(1)
    return totals
