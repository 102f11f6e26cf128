"""Attention over a ring and new tokens in plain torch, some rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from moa_kernels import span_attention

from moa_search.runtime import unmasked
from moa_search.runtime.padding import real_first
from moa_search.runtime.streaming import by_part

if TYPE_CHECKING:
    from moa_search.runtime.layer import MoACacheLayer
    from moa_search.runtime.rules import LayerRules

ROW_BLOCK = 128
"""Queries handled at once: bounds the memory of masks, and how many keys are read in vain."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    rules: LayerRules,
    past: MoACacheLayer | None,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Attention over ring and new tokens.

    Positions are ``[batch, ...]``, or ``[1, ...]`` where all samples agree, so that they share one mask.

    Args:
        query: ``[batch, heads, query, head_dim]``, the newest tokens.
        key: ``[batch, kv_heads, keys, head_dim]``, of the newest tokens; of all, without ``past``.
        value: ``[batch, kv_heads, keys, value_dim]``.
        valid: Boolean ``[batch, keys]``, False for padding; None if there is none.
        rules: The layer's.
        past: Where the keys before these are.
        scale: Factor on the logits.
        softcap: Bound of the logits (Gemma 2).
        sink_logits: ``[heads]``, one more logit per head that has no value (GPT-OSS).

    Returns:
        ``[batch, heads, query, value_dim]``; anything for padding.
    """
    fresh = valid is None and (past is None or past.is_empty) and not rules.streams(key.shape[2])
    if fresh and unmasked.applies(query, rules, softcap, sink_logits):
        return unmasked.attend(query, key, value, rules, scale=scale)
    rows, keys = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    start = torch.zeros(1, dtype=torch.int64, device=query.device) if past is None else past.start
    key_at = start[:, None] + torch.arange(keys, device=query.device)
    query_at = key_at[:, keys - rows :]
    if valid is not None:
        key, value = real_first(key, valid), real_first(value, valid)
        # Padding rows take their predecessor's position: nobody reads them, and positions stay sorted.
        query_at = start[:, None] + (valid.cumsum(1) - 1)[:, keys - rows :].clamp(min=0)
    at_sink = rules.stream.at_sink(query, query_at) if rules.stream is not None else None
    ring = None if past is None or past.is_empty else past
    ring_key, ring_value, ring_at = (None,) * 3 if ring is None else (*ring.states(), ring.positions())
    tops = list(range(0, rows, ROW_BLOCK))
    last_rows = [min(top + ROW_BLOCK, rows) - 1 for top in tops]
    ends = (query_at[:, last_rows] - start[:, None] + 1).amax(0).tolist()
    sink_end = min(max(rules.sink - int(start.min()), 0), keys)

    blocks: list[list[torch.Tensor]] = [[] for _ in rules.rules]
    windows_from = rules.head_spans.oldest_key(query_at)  # [kv_heads, batch or 1, query]
    for heads in rules.heads_by_rule.values():
        oldest = windows_from[heads[0]]
        begins = (oldest[:, tops] - start[:, None]).amin(0).tolist()
        for top, begin, end in zip(tops, begins, ends, strict=True):
            block = slice(top, top + ROW_BLOCK)
            new = _columns(begin, end, sink_end)
            old = [slice(0)] * len(rules.rules) if ring is None else ring.slots(only_sink=begin >= 0)
            at = _join(ring_at, old[heads[0]], key_at, new)
            mask = _mask(query_at[:, block], oldest[:, block], at, rules)
            for head in heads:
                group_heads = slice(head * group, (head + 1) * group)
                rows_query, rows_key = query[:, group_heads, block], _join(ring_key, old[head], key[:, head], new)
                if at_sink is not None:
                    rows_query = torch.cat([rows_query, at_sink[:, group_heads, block]], -1)
                    rows_key = by_part(rows_key, at < rules.sink)
                out = span_attention(
                    rows_query,
                    rows_key,
                    _join(ring_value, old[head], value[:, head], new),
                    mask,
                    scale=scale,
                    softcap=softcap,
                    sink_logits=None if sink_logits is None else sink_logits[group_heads],
                )
                blocks[head].append(out)
    return torch.cat([torch.cat(parts, 2) for parts in blocks], 1)


def _columns(begin: int, end: int, sink_end: int) -> list[slice]:
    """The new tokens that a block of rows may attend: the sink, and from its first row's window on."""
    if begin <= sink_end:
        return [slice(0 if sink_end else max(begin, 0), end)]
    return [slice(0, sink_end), slice(begin, end)] if sink_end else [slice(begin, end)]


def _join(ring: torch.Tensor | None, old: slice, fresh: torch.Tensor, new: list[slice]) -> torch.Tensor:
    """Slots ``old`` of a ring, if there is one, then columns ``new`` of new tokens; keys are dimension 1."""
    parts = [fresh[:, part] for part in new]
    if ring is not None:
        parts.insert(0, ring[:, old])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _mask(at: torch.Tensor, oldest: torch.Tensor, key_at: torch.Tensor, rules: LayerRules) -> torch.Tensor:
    """Boolean ``[batch or 1, query, key]`` from positions: queries, their windows' starts, and keys."""
    # Half the width of int64 makes these comparisons twice as fast.
    i, first, j = at.int()[:, :, None], oldest.int()[:, :, None], key_at.int()[:, None, :]
    mask = (j <= i) & ((j >= first) | (j < rules.sink))
    return mask if rules.sliding_window is None else mask & (j > i - rules.sliding_window)
