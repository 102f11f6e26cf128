"""Attention of the query heads that share one KV head, under an explicit mask: the torch reference."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def span_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention over the keys that ``mask`` allows, computed in float32 or wider.

    A key that no query attends may hold anything, NaN included: it never reaches the result or a gradient.
    A query without keys gives exactly 0.

    Args:
        query: ``[batch, heads, query, head_dim]``, the query heads of one KV head.
        key: ``[batch, keys, head_dim]``.
        value: ``[batch, keys, value_dim]``.
        mask: Boolean ``[batch or 1, query, keys]``, True where attended.
        scale: Factor on the logits, before ``softcap``.
        softcap: Bounds logits smoothly: ``softcap * tanh(logits / softcap)`` (Gemma 2).
        sink_logits: ``[heads]``, one more logit per head that takes weight but has no value (GPT-OSS).

    Returns:
        ``[batch, heads, query, value_dim]`` in the dtype of ``value``.
    """
    # 0 * NaN is NaN: what no query attends becomes 0.
    unread = ~mask.any(dim=1)[:, :, None]
    key, value = key.masked_fill(unread, 0)[:, None], value.masked_fill(unread, 0)[:, None]
    keyless = ~mask.any(dim=2)[:, None, :, None]
    # A softmax over nothing is NaN, in the backward pass too: rows without keys attend all, then are dropped.
    mask = mask[:, None] | keyless
    if softcap is None and sink_logits is None:
        heads = query.shape[1]
        # [batch, heads, keys, dim], without a copy
        key, value = key.expand(-1, heads, -1, -1), value.expand(-1, heads, -1, -1)
        return scaled_dot_product_attention(query, key, value, mask, scale=scale).masked_fill(keyless, 0)
    wide = torch.promote_types(query.dtype, torch.float32)
    # [batch, heads, query, keys]
    logits = query.to(wide) @ key.to(wide).mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if sink_logits is not None:
        # One more column, which has weight and no value.
        sinks = sink_logits.to(wide)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = logits.softmax(dim=-1)[..., : key.shape[2]]
    return (weights @ value.to(wide)).to(value.dtype).masked_fill(keyless, 0)
