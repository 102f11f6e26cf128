"""Dense causal attention with memory linear in the length, differentiable: what profiling runs.

Where torch's fused attention can express it, that runs, forward and backward. Soft caps, sliding windows and
sink logits go through chunks of rows instead, which are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

ROWS = 128
"""Query rows per chunk."""


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Causal attention with grouped queries.

    Args:
        query: ``[heads, N, head_dim]``.
        key: ``[kv_heads, N, head_dim]``; consecutive query heads share a KV head.
        value: ``[kv_heads, N, head_dim]``.
        scale: Factor of the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        window: The model's own sliding window in tokens, the query included.
        sink_logits: ``[heads]``, one more logit per head that takes weight but has no value (GPT-OSS). Gets no
            gradient.

    Returns:
        ``[heads, N, head_dim]`` in the type of ``query``.
    """
    if softcap is None and sink_logits is None and (window is None or window >= query.shape[1]):
        out = functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
        )
        return out[0]
    settings = (scale, softcap, window, sink_logits)
    return _ChunkedAttention.apply(query, key, value, settings)  # type: ignore[no-untyped-call, no-any-return]


class _ChunkedAttention(torch.autograd.Function):
    """Never holds more than ``heads * ROWS * N`` scores; accumulates in float32, or float64 for float64."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings = settings
        wide = torch.promote_types(query.dtype, torch.float32)
        # [kv_heads, group, N, head_dim]
        grouped = query.unflatten(0, (key.shape[0], -1))
        out = torch.empty_like(grouped)
        for rows, keys in _chunks(query.shape[1], settings[2]):
            weights, _ = _attention_rows(grouped[:, :, rows].to(wide), key[:, keys].to(wide), *settings)
            out[:, :, rows] = _by_head(weights, value[:, keys].to(wide)).to(out.dtype)
        return out.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        scale = ctx.settings[0]
        wide = torch.promote_types(query.dtype, torch.float32)
        grouped, grad_grouped = (x.unflatten(0, (key.shape[0], -1)) for x in (query, grads[0]))
        grad_query = torch.empty_like(grouped)
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for rows, keys in _chunks(query.shape[1], ctx.settings[2]):
            near_query, near_key, near_value = grouped[:, :, rows].to(wide), key[:, keys].to(wide), value[:, keys]
            grad_rows = grad_grouped[:, :, rows].to(wide)
            # The chunk's attention again, then the chain rule through softmax and soft cap.
            weights, slope = _attention_rows(near_query, near_key, *ctx.settings)
            # dO . v_j, and its mean under the attention: [kv_heads, group, rows, keys or 1]
            gain = _by_head(grad_rows, near_value.to(wide).mT)
            row_gain = (weights * gain).sum(-1, keepdim=True)
            grad_scores = gain.sub_(row_gain).mul_(weights)
            if slope is not None:
                grad_scores.mul_(slope)
            grad_query[:, :, rows] = (_by_head(grad_scores, near_key) * scale).to(grad_query.dtype)
            # Query heads of a KV head add up: one product over group and rows.
            grad_key[:, keys] += grad_scores.flatten(1, 2).mT @ near_query.flatten(1, 2) * scale
            grad_value[:, keys] += weights.flatten(1, 2).mT @ grad_rows.flatten(1, 2)
        return grad_query.flatten(0, 1), grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _attention_rows(
    query: Tensor, key: Tensor, scale: float, softcap: float | None, window: int | None, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of consecutive rows whose last one is the newest key's own.

    Args:
        query: ``[kv_heads, group, rows, head_dim]``.
        key: ``[kv_heads, keys, head_dim]``.
        scale: As in `dense_attention`.
        softcap: As in `dense_attention`.
        window: As in `dense_attention`.
        sink_logits: As in `dense_attention`.

    Returns:
        Weights ``[kv_heads, group, rows, keys]``, and with a soft cap its derivative, in that shape.
    """
    rows, keys = query.shape[2], key.shape[1]
    scores = _by_head(query, key.mT).mul_(scale)
    slope = None
    if softcap is not None:
        scores = torch.tanh(scores.div_(softcap))
        slope = 1 - scores * scores
        scores.mul_(softcap)
    # [rows, keys]
    distance = torch.arange(keys - rows, keys, device=key.device)[:, None] - torch.arange(keys, device=key.device)
    hidden = distance < 0
    if window is not None and window < keys:
        hidden |= distance >= window
    scores.masked_fill_(hidden, float("-inf"))
    weights = torch.softmax(scores, -1)
    if sink_logits is not None:
        # A sink logit takes its share of every weight.
        logits = sink_logits.to(scores.dtype).view(key.shape[0], -1, 1, 1)
        weights.mul_(torch.sigmoid(torch.logsumexp(scores, -1, keepdim=True) - logits))
    return weights, slope


def _chunks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Rows of each chunk with the keys that they may attend."""
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        yield slice(start, stop), slice(0 if window is None else max(0, start - window + 1), stop)


def _by_head(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` where ``a`` has a group dimension that ``b`` lacks: one matrix product per KV head."""
    return torch.bmm(a.flatten(1, 2), b).view(*a.shape[:3], b.shape[2])
