"""Influence statistics from whole N x N matrices, in the plainest way: every window is its own masked softmax."""

from __future__ import annotations

import torch
from moa_kernels.influence import STATISTICS
from torch import Tensor
from torch.nn import functional


def direct(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    *,
    windows: tuple[int, ...],
    row_buckets: int,
    bucket_rows: int,
    sink: int,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> dict[str, Tensor]:
    """As `influence_statistics`, in the type of the inputs."""
    group = query.shape[0] // key.shape[0]
    values = value.repeat_interleave(group, 0)
    scores, visible = _scores(query, key, scale, softcap)
    attention = _softmax(scores, visible, sink_logits)
    out = attention @ values
    gain, row_gain = grad_out @ values.mT, (grad_out * out).sum(-1, keepdim=True)
    effect = (attention * (gain - row_gain) / (1 - attention).clamp_min(1e-6)).abs()
    i, j = torch.arange(query.shape[1])[:, None], torch.arange(query.shape[1])[None]
    totals: dict[str, list[Tensor]] = {name: [] for name in STATISTICS}
    for size in windows:
        kept = visible & ((i - j < size) | (j < sink))
        delta = (grad_out * (_softmax(scores, kept, sink_logits) @ values - out)).sum(-1)
        by_row = {
            "squared": delta**2,
            "signed": delta,
            "absolute": delta.abs(),
            "elementwise": (effect * (visible & ~kept)).sum(-1),
            "recall": (attention * kept).sum(-1),
        }
        for name, rows in by_row.items():
            totals[name].append(rows)
    return {name: by_bucket(torch.stack(each), group, row_buckets, bucket_rows) for name, each in totals.items()}


def windowed_attention(
    query: Tensor,
    key: Tensor,
    *,
    windows: tuple[int, ...],
    sink: int,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Attention under every window, ``[window, heads, N, N]``, and sizes of the products that scores are made of."""
    scores, visible = _scores(query, key, scale, softcap)
    i, j = torch.arange(query.shape[1])[:, None], torch.arange(query.shape[1])[None]
    kept = [visible & ((i - j < size) | (j < sink)) for size in windows]
    norms = key.norm(dim=-1).repeat_interleave(query.shape[0] // key.shape[0], 0)
    sizes = query.norm(dim=-1)[..., None] * norms[:, None] * abs(scale)
    return torch.stack([_softmax(scores, each, sink_logits) for each in kept]), sizes


def roundings(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    *,
    windows: tuple[int, ...],
    row_buckets: int,
    bucket_rows: int,
    sink: int,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> dict[str, Tensor]:
    """How much each statistic changes where the numbers that it is made of change relatively.

    Sums of terms that cancel are as far off as their terms are large; scores are rounded relative to their size, or
    the soft cap's, of which exp makes a relative error of attention; and dividing by ``1 - A`` raises the errors of
    both sides.
    """
    group = query.shape[0] // key.shape[0]
    scores, visible = _scores(query, key, scale, softcap)
    attention = _softmax(scores, visible, sink_logits)
    sizes = grad_out.abs() @ value.abs().repeat_interleave(group, 0).mT
    row_sizes = (attention * sizes).sum(-1)
    complement = (1 - attention).clamp_min(1e-6)
    effects = attention * (sizes + row_sizes[..., None]) / complement**2
    i, j = torch.arange(query.shape[1])[:, None], torch.arange(query.shape[1])[None]
    masked = torch.stack([(effects * ((i - j >= size) & (j >= sink))).sum(-1) for size in windows])
    by_row = {
        "squared": row_sizes**2,
        "signed": row_sizes,
        "absolute": row_sizes,
        "elementwise": masked,
        "recall": torch.ones_like(row_sizes),
    }
    score_size = softcap or scores[:, visible].abs().max()
    return {
        name: (1 + score_size) * by_bucket(rows.expand(len(windows), -1, -1), group, row_buckets, bucket_rows)
        for name, rows in by_row.items()
    }


def _scores(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Scores ``[heads, N, N]``, and where a query sees a key."""
    scores = query @ key.repeat_interleave(query.shape[0] // key.shape[0], 0).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores, torch.ones(scores.shape[1:], dtype=torch.bool).tril()


def _softmax(scores: Tensor, kept: Tensor, sink_logits: Tensor | None) -> Tensor:
    heads, n, _ = scores.shape
    extra = scores.new_full((heads, n, 1), float("-inf"))
    if sink_logits is not None:
        extra = sink_logits[:, None, None].expand(heads, n, 1)
    return torch.cat([scores.masked_fill(~kept, float("-inf")), extra], -1).softmax(-1)[..., :n]


def by_bucket(rows: Tensor, group: int, row_buckets: int, bucket_rows: int) -> Tensor:
    """Sums over the query heads of each KV head and the rows of each bucket, ``[kv_heads, bucket, window]``."""
    padded = functional.pad(rows, (0, row_buckets * bucket_rows - rows.shape[-1]))
    by_kv_head = padded.unflatten(2, (row_buckets, bucket_rows)).sum(-1).unflatten(1, (-1, group)).sum(2)
    return by_kv_head.permute(1, 2, 0)
