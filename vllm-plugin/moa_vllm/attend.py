"""Attention over pages in plain torch: the reference of the kernel, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from moa_search.spans import SpanRule, span


def store(keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Write one KV head's new tokens.

    Args:
        keys: ``[token, head_dim]``.
        values: Likewise.
        pages: ``[block, token in block, head_dim of key and value]``.
        slots: ``[token]``, places in ``pages``.
    """
    size = pages.shape[1]
    pages[slots // size, slots % size] = torch.cat((keys, values), dim=-1)


def attend(
    queries: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    rule: SpanRule,
    *,
    length: int,
    sink: int,
    min_span: int,
    scale: float,
) -> torch.Tensor:
    """One request, one KV head: its newest tokens' queries over sinks and window.

    Args:
        queries: ``[query head, token, head_dim]``, the newest tokens.
        pages: ``[block, token in block, head_dim of key and value]``.
        table: ``[block]``, the request's blocks; entries of blocks that no query attends are never looked at.
        rule: The head's rule.
        length: Tokens of the request, the newest included.
        sink: First tokens that are always attended.
        min_span: Smallest span in tokens.
        scale: Of scores.

    Returns:
        ``[query head, token, head_dim]``.
    """
    size, (heads, count, width) = pages.shape[1], queries.shape
    device = queries.device
    contexts = torch.arange(length - count + 1, length + 1, device=device)
    starts = contexts - (span(contexts, rule, min_span) - sink)  # rises with the context
    sink_blocks, first, blocks = -(-sink // size), int(starts[0]) // size, -(-length // size)
    chosen = torch.arange(blocks, device=device)
    if first > sink_blocks:
        chosen = torch.cat((chosen[:sink_blocks], chosen[first:]))
    positions = (chosen[:, None] * size + torch.arange(size, device=device)).flatten()
    there = positions < length
    kept = pages[table[chosen].long()].flatten(0, 1)[there]
    positions = positions[there]
    mask = (positions < contexts[:, None]) & ((positions < sink) | (positions >= starts[:, None]))
    keys, values = (part.expand(heads, -1, -1) for part in kept.split(width, dim=-1))
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
