"""Influence statistics from whole N x N matrices, in the plainest way: every window is its own masked softmax."""

from __future__ import annotations

import torch
from moa_kernels.influence import STATISTICS
from torch import Tensor

__all__ = ["direct", "roundings"]


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
            totals[name].append(_by_bucket(rows, group, row_buckets, bucket_rows))
    return {name: torch.stack(each, -1) for name, each in totals.items()}


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
    """How much each statistic changes where the numbers that it is made of change relatively: sums of terms that
    cancel are as far off as their terms are large. A score's rounding grows with the score, and changes its attention
    by as much; a soft cap rounds scores as if they were as large as itself.
    """
    exact = direct(
        query, key, value, grad_out, windows=windows, row_buckets=row_buckets, bucket_rows=bucket_rows, sink=sink,
        scale=scale, softcap=softcap, sink_logits=sink_logits,
    )  # fmt: skip
    group = query.shape[0] // key.shape[0]
    scores, visible = _scores(query, key, scale, softcap)
    terms = _softmax(scores, visible, sink_logits) * (grad_out.abs() @ value.abs().repeat_interleave(group, 0).mT)
    terms = terms.sum(-1)
    linear, square = (_by_bucket(x, group, row_buckets, bucket_rows)[..., None] for x in (terms, terms**2))
    found = {"squared": square, "signed": linear, "absolute": linear, "elementwise": linear, "recall": exact["recall"]}
    if sink_logits is not None:  # what is kept comes as 1 less the weight of the sink logit
        ones = torch.ones(scores.shape[:2], dtype=scores.dtype)
        found["recall"] = _by_bucket(ones, group, row_buckets, bucket_rows)[..., None]
    largest = float(scores.abs().max()) if softcap is None else softcap
    return {name: size * (1 + largest) for name, size in found.items()}


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


def _by_bucket(rows: Tensor, group: int, row_buckets: int, bucket_rows: int) -> Tensor:
    """Sums over the query heads of each KV head and the rows of each bucket, ``[kv_heads, bucket]``."""
    grouped = rows.unflatten(0, (-1, group)).sum(1)
    room = grouped.new_zeros(grouped.shape[0], row_buckets * bucket_rows)
    room[:, : grouped.shape[1]] = grouped
    return room.unflatten(1, (row_buckets, bucket_rows)).sum(-1)
