"""Attention under a plan, differentiable: for profiling a model that already runs under one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from moa_kernels import span_attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moa_search.errors import ModelMismatchError
from moa_search.formats import ModelSignature, Plan
from moa_search.spans import SpanRule, span

__all__ = ["planned_attention", "require_plan_fits"]

ROWS = 128
"""Query rows per chunk: only one chunk's mask and weights are alive at a time."""


def require_plan_fits(plan: Plan, model: Any, native: Collection[int]) -> None:
    """Check that a model can be profiled under a plan.

    Args:
        plan: The plan.
        model: The model.
        native: The model's layers that have a sliding window of their own.

    Raises:
        ModelMismatchError: The plan is another model's, or treats other layers as native.
    """
    plan.model.require(ModelSignature.of(model.config), "under_plan")
    differing = sorted({*plan.native_layers} ^ {*native})
    if differing:
        raise ModelMismatchError(
            f"under_plan: layer {differing[0]} must be native in the plan exactly where the model has a sliding window "
            "of its own; profile and search again"
        )


def planned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rules: Sequence[SpanRule],
    *,
    sink: int,
    min_span: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of one layer, every KV head under its rule at each query's own position; masks are explicit.

    Computes in float32 or wider, so that the gradients of keys and values, which add up over chunks, keep their
    precision. A chunk is computed again in the backward pass: memory stays linear in the length.

    Args:
        query: ``[heads, N, head_dim]``.
        key: ``[kv_heads, N, head_dim]``; consecutive query heads share a KV head.
        value: ``[kv_heads, N, head_dim]``.
        rules: One per KV head.
        sink: First tokens that are always attended.
        min_span: Smallest span in tokens.
        scale: Factor of the scores.
        softcap: As in `moa_kernels.span_attention`.
        sink_logits: ``[heads]``, as in `moa_kernels.span_attention`.

    Returns:
        ``[heads, N, head_dim]`` in the type of ``query``.
    """
    group, length = query.shape[0] // key.shape[0], query.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)

    def attend(queries: Tensor, keys: Tensor, values: Tensor, start: int, rule: SpanRule, logits: Any) -> Tensor:
        mask = _mask(start, keys.shape[1], rule, sink, min_span, keys.device)
        return span_attention(queries, keys, values, mask, scale=scale, softcap=softcap, sink_logits=logits)

    by_head = []
    for head, rule in enumerate(rules):
        shared = slice(head * group, (head + 1) * group)
        queries, keys, values = query[shared].to(wide)[None], key[head].to(wide)[None], value[head].to(wide)[None]
        logits = None if sink_logits is None else sink_logits[shared]
        chunks = []
        for start in range(0, length, ROWS):
            stop = min(start + ROWS, length)
            parts = (queries[:, :, start:stop], keys[:, :stop], values[:, :stop], start, rule, logits)
            chunks.append(checkpoint(attend, *parts, use_reentrant=False, preserve_rng_state=False))
        by_head.append(torch.cat(chunks, 2)[0])
    return torch.cat(by_head).to(query.dtype)


def _mask(start: int, stop: int, rule: SpanRule, sink: int, min_span: int, device: torch.device) -> Tensor:
    """Which of the keys up to ``stop`` the queries from ``start`` on attend, ``[1, query, key]``."""
    j = torch.arange(stop, device=device)
    i = j[start:, None]
    oldest = i + 1 - (span(i + 1, rule, min_span) - sink)
    return ((j <= i) & ((j < sink) | (j >= oldest)))[None]
