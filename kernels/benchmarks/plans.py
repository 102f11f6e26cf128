"""The plans that benchmarks run: heads of very different spans, as searches find them."""

from __future__ import annotations

import torch
from moa_kernels.spans import HeadSpans
from torch import Tensor

SINK = 64

BETAS_256 = {
    "dense": (256,) * 8,
    "25 %": (256, 128, 64, 32, 8, 8, 8, 8),
    "12.5 %": (128, 64, 32, 16, 4, 4, 4, 4),
}
"""Growth of eight KV heads; a head with beta attends about that share of all causal pairs."""


def spans_of(plan: str) -> HeadSpans:
    """One layer's rules."""
    return HeadSpans.of([(0, beta) for beta in BETAS_256[plan]], sink=SINK, min_span=SINK + 64)


def attention_density(spans: HeadSpans, length: int) -> float:
    """Share of causal pairs that are attended in a prefill."""
    position = torch.arange(length)
    window = position + 1 - spans.oldest_key(position).clamp(min=0)
    sink = torch.tensor([head[0] for head in spans.heads])[:, None]
    kept = torch.minimum(window + sink, position + 1)
    return float(kept.sum() / (len(spans.heads) * (position + 1).sum()))


def block_lists(spans: HeadSpans, length: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which blocks of keys a block of rows attends in part, and which as a whole.

    Returns:
        Two booleans ``[kv_heads, row blocks, key blocks]``.
    """
    first = torch.arange(0, length, block, device=device)
    last = (first + block).clamp(max=length) - 1
    sink = torch.tensor([head[0] for head in spans.heads], device=device)[:, None, None]
    oldest_first, oldest_last = spans.oldest_key(first)[..., None], spans.oldest_key(last)[..., None]
    some = (first <= last[:, None]) & ((last >= oldest_first) | (first < sink))
    whole = (last <= first[:, None]) & ((torch.maximum(first, sink) >= oldest_last) | (last < sink))
    return some & ~whole, whole
