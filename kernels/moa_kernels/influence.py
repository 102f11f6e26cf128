"""Influence of shorter windows on the loss: the torch reference of the profiling pass.

For a query row i with attention ``A_ij``, output gradient ``dO_i`` and ``g_ij = dO_i . v_j``, restricting the
row to a kept set S renormalises its softmax, and the loss changes to first order by

    delta_i(S) = dO_i . (o_i(S) - o_i) = (sum_S A_ij g_ij) / (sum_S A_ij) - D_i,    D_i = sum_j A_ij g_ij

so two running sums per row, over keys ordered from nearest to farthest after the sink, give every window at
once. The same pass yields the gradients of queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["InfluenceBackward", "causal_attention", "influence_backward"]

ROWS = 128
"""Query rows per chunk: memory is ``heads * ROWS * N``, linear in N."""

SMALLEST_COMPLEMENT = 1e-6
"""Lower bound of ``1 - A`` in the single-entry effect: the first row has A = 1, giving 0 / 0."""


@dataclass(frozen=True)
class InfluenceBackward:
    """Gradients and statistics of one layer.

    Attributes:
        grad_query: ``[heads, N, head_dim]``.
        grad_key: ``[kv_heads, N, head_dim]``.
        grad_value: ``[kv_heads, N, head_dim]``.
        statistics: ``squared``, ``signed``, ``absolute``, ``elementwise`` and ``recall``, each
            ``[kv_heads, bucket, window]`` in the accumulation type, summed over the rows of the bucket and the
            query heads of the KV head.
    """

    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor
    statistics: dict[str, Tensor]


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Dense causal attention with grouped queries, in chunks of rows where SDPA can't express it.

    Args:
        query: ``[heads, N, head_dim]``.
        key: ``[kv_heads, N, head_dim]``; consecutive query heads share a KV head.
        value: ``[kv_heads, N, head_dim]``.
        scale: Factor of the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        window: The model's own sliding window in tokens, the query included.

    Returns:
        ``[heads, N, head_dim]`` in the type of ``query``.
    """
    n = query.shape[1]
    if softcap is None and (window is None or window >= n):
        out = functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
        )
        return out[0]
    accumulate = _accumulation_type(query)
    kv_heads = key.shape[0]
    grouped = query.unflatten(0, (kv_heads, -1))
    backwards = key.to(accumulate).flip(1), value.to(accumulate).flip(1)
    rows = []
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        attention, _ = _attention_rows(
            grouped[:, :, start:stop].to(accumulate), backwards[0], stop, scale, softcap, window
        )
        rows.append(_product(attention, backwards[1][:, n - stop :]).to(query.dtype))
    return torch.cat(rows, 2).flatten(0, 1)


def influence_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    *,
    windows: Sequence[int],
    row_buckets: int,
    sink: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> InfluenceBackward:
    """Backward pass of `causal_attention` that also measures what each window would cost.

    Never holds more than ``heads * ROWS * N`` scores. Accumulates in float32, or float64 for float64 inputs.

    Args:
        query: ``[heads, N, head_dim]``.
        key: ``[kv_heads, N, head_dim]``.
        value: ``[kv_heads, N, head_dim]``.
        grad_out: Gradient of the output, ``[heads, N, head_dim]``.
        windows: Candidate windows in tokens, increasing; a window counts the query and excludes the sink.
        row_buckets: Number of equal slices of the rows; the last ones may be short or empty.
        sink: First tokens that are always kept.
        scale: Factor of the scores.
        softcap: As in `causal_attention`.
        window: As in `causal_attention`; such keys are outside every candidate too.
    """
    n, kv_heads = query.shape[1], key.shape[0]
    accumulate = _accumulation_type(query)
    grouped, grad_grouped = (x.to(accumulate).unflatten(0, (kv_heads, -1)) for x in (query, grad_out))
    keys, values = key.to(accumulate).flip(1), value.to(accumulate).flip(1)
    grad_query = torch.empty_like(grouped)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    bucket_rows = -(-n // row_buckets)
    totals = {
        name: grouped.new_zeros(kv_heads, row_buckets, len(windows))
        for name in ("squared", "signed", "absolute", "elementwise", "recall")
    }
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        near = slice(n - stop, n)  # keys stop-1, stop-2, ..., 0
        query_rows, grad_rows = grouped[:, :, start:stop], grad_grouped[:, :, start:stop]
        attention, slope = _attention_rows(query_rows, keys, stop, scale, softcap, window)
        gain = _product(grad_rows, values[:, near].transpose(1, 2))
        weighted = attention * gain
        row_gain = weighted.sum(-1, keepdim=True)
        entry = gain.sub_(row_gain).mul_(attention)  # dLoss/dScore
        grad_values[:, near] += _product(attention.flatten(1, 2).transpose(1, 2), grad_rows.flatten(1, 2))
        grad_scores = entry if slope is None else entry * slope
        grad_query[:, :, start:stop] = _product(grad_scores, keys[:, near]) * scale
        grad_keys[:, near] += _product(grad_scores.flatten(1, 2).transpose(1, 2), query_rows.flatten(1, 2)) * scale
        effect = entry.div_((1 - attention).clamp_min_(SMALLEST_COMPLEMENT)).abs_()
        chunk = _window_statistics(
            attention, weighted, effect, row_gain, start=start, sink=sink, windows=windows, window=window
        )
        bucket = torch.arange(start, stop, device=query.device) // bucket_rows
        for name, by_row in chunk.items():
            totals[name].index_add_(1, bucket, by_row.sum(1))
    return InfluenceBackward(
        grad_query=grad_query.flatten(0, 1).to(query.dtype),
        grad_key=grad_keys.flip(1).to(key.dtype),
        grad_value=grad_values.flip(1).to(value.dtype),
        statistics=totals,
    )


def _accumulation_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` where ``a`` may have a group dimension that ``b`` lacks: one matrix product per KV head."""
    if a.ndim == b.ndim:
        return torch.bmm(a, b)
    return torch.bmm(a.flatten(1, 2), b).view(*a.shape[:3], b.shape[2])


def _attention_rows(
    query_rows: Tensor, keys: Tensor, stop: int, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of the rows that end at ``stop`` over keys ``stop - 1, ..., 0`` (column c is key ``stop - 1 - c``).

    Returns:
        ``[kv_heads, group, row, stop]`` and, with a softcap, the derivative of the capped score.
    """
    n, rows = keys.shape[1], query_rows.shape[2]
    scores = _product(query_rows, keys[:, n - stop :].transpose(1, 2)).mul_(scale)
    slope = None
    if softcap is not None:
        scores = torch.tanh(scores / softcap)
        slope = 1 - scores * scores
        scores = scores * softcap
    row = torch.arange(rows, device=keys.device)[:, None]
    column = torch.arange(stop, device=keys.device)[None, :]
    scores[..., :rows].masked_fill_(column[:, :rows] < rows - 1 - row, float("-inf"))
    if window is not None and window < stop:
        scores.masked_fill_(column - (rows - 1 - row) >= window, float("-inf"))
    return torch.softmax(scores, -1), slope


def _window_statistics(
    attention: Tensor,
    weighted: Tensor,
    effect: Tensor,
    row_gain: Tensor,
    *,
    start: int,
    sink: int,
    windows: Sequence[int],
    window: int | None,
) -> dict[str, Tensor]:
    """Per-row statistics of every window, ``[kv_heads, group, row, window]``. Overwrites its first three inputs."""
    stop = attention.shape[3]
    sunk = min(sink, stop)
    mass, gain = (x[..., stop - sunk :].sum(-1, keepdim=True) for x in (attention, weighted))
    bands = []
    for matrix in (attention, weighted, effect):
        matrix[..., stop - sunk :] = 0
        bands.append(_band_sums(matrix, windows))
    kept_mass, kept_gain = mass + bands[0].cumsum(-1), gain + bands[1].cumsum(-1)
    position = torch.arange(start, stop, device=attention.device)[:, None]
    candidates = torch.tensor(windows, device=attention.device)[None, :]
    whole = candidates > position - sink
    if window is not None:
        whole |= candidates >= window
    smallest = torch.finfo(kept_mass.dtype).tiny
    delta = (kept_gain / kept_mass.clamp_min(smallest) - row_gain).masked_fill(whole, 0)
    beyond = bands[2].sum(-1, keepdim=True) - bands[2].cumsum(-1)
    return {
        "squared": delta * delta,
        "signed": delta,
        "absolute": delta.abs(),
        "elementwise": beyond.clamp_min(0).masked_fill(whole, 0),
        "recall": kept_mass.masked_fill(whole, 1),
    }


def _band_sums(matrix: Tensor, windows: Sequence[int]) -> Tensor:
    """Sums of ``matrix[..., row, column]`` over the distances between consecutive windows.

    Row r's key at distance d stands in column ``d + rows - 1 - r``, so a view whose row stride is one less
    than the width lines up equal distances; entries past a row's first key fall on masked zeros of the next.

    Returns:
        ``[..., row, window]``; band k holds distances ``windows[k - 1] <= d < windows[k]``.
    """
    rows, width = matrix.shape[-2:]
    stride = (*matrix.stride()[:-2], width - 1, 1)
    by_distance = matrix.as_strided((*matrix.shape[:-1], width - 1), stride, matrix.storage_offset() + rows - 1)
    sums = matrix.new_zeros(*matrix.shape[:-1], len(windows))
    near = 0
    for band, far in enumerate(windows):
        if near < width - 1:
            sums[..., band] = by_distance[..., near : min(far, width - 1)].sum(-1)
        if near <= width - 1 < far:  # the last row's first key, which the view leaves out
            sums[..., rows - 1, band] += matrix[..., rows - 1, width - 1]
        near = far
    return sums
