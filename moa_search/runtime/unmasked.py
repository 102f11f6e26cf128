"""Attention of whole prompts in plain torch, without padding or a past: most keys of a block need no mask at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from moa_search.spans import span

if TYPE_CHECKING:
    from moa_search.runtime.rules import LayerRules
    from moa_search.spans import SpanRule

ROW_BLOCK = 128
"""Queries handled at once: bounds how many keys are read in vain."""


def applies(query: torch.Tensor, rules: LayerRules, softcap: float | None, sink_logits: torch.Tensor | None) -> bool:
    """Whether `attend` can express a layer's attention; the caller knows that nothing is padded or past."""
    if softcap is not None or sink_logits is not None or query.device.type != "cpu":
        return False
    return rules.sliding_window is None or rules.sink == 0  # else the model's window hides sink tokens in time


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: LayerRules, *, scale: float
) -> torch.Tensor:
    """Attention of the newest tokens over all of them.

    The heads of one rule run together, a group's queries stacked as rows of its KV head. A block of rows reads the sink
    and the keys from its first row's window on; only keys that some rows of it attend and others don't, where windows
    start and on the diagonal, are compared with positions.

    Args:
        query: ``[batch, heads, query, head_dim]``, of the newest tokens.
        key: ``[batch, kv_heads, keys, head_dim]``, of all tokens.
        value: ``[batch, kv_heads, keys, value_dim]``.
        rules: The layer's.
        scale: Factor on the logits.

    Returns:
        ``[batch, heads, query, value_dim]``.
    """
    rows, keys, kv_heads = query.shape[2], key.shape[2], key.shape[1]
    grouped = query.unflatten(1, (kv_heads, -1))  # [batch, kv_heads, group, query, head_dim]
    group = grouped.shape[2]
    parts: list[torch.Tensor | None] = [None] * kv_heads
    for rule, heads in rules.heads_by_rule.items():
        chosen = _picked(heads)
        rule_query, rule_key, rule_value = grouped[:, chosen], key[:, chosen], value[:, chosen]
        blocks = []
        for top in range(0, rows, ROW_BLOCK):
            block = slice(top, min(top + ROW_BLOCK, rows))
            first, end = keys - rows + block.start, keys - rows + block.stop
            columns, mask = _mask(first, end, rule, rules, heads[0], query)
            stacked = rule_query[:, :, :, block].flatten(2, 3)
            near_key, near_value = (_columns(states, columns) for states in (rule_key, rule_value))
            out = scaled_dot_product_attention(stacked, near_key, near_value, mask.repeat(group, 1), scale=scale)
            blocks.append(out.unflatten(2, (group, -1)))
        for place, head in enumerate(heads):
            parts[head] = torch.cat([block[:, place] for block in blocks], 2)
    return torch.cat([part for part in parts if part is not None], 1)


def _picked(heads: tuple[int, ...]) -> slice | list[int]:
    """An index of heads; neighbours are picked without a copy."""
    if heads[-1] - heads[0] == len(heads) - 1:
        return slice(heads[0], heads[-1] + 1)
    return list(heads)


def _columns(states: torch.Tensor, columns: list[slice]) -> torch.Tensor:
    """``[batch, heads, keys, dim]`` of some keys."""
    parts = [states[:, :, part] for part in columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _mask(
    first: int, end: int, rule: SpanRule, rules: LayerRules, head: int, like: torch.Tensor
) -> tuple[list[slice], torch.Tensor]:
    """Keys that the queries at positions ``first`` to ``end`` read, and what is added to their logits.

    Returns:
        One or two slices of keys, and ``[end - first, keys]``: 0, or minus infinity where a key isn't attended.
    """
    at = torch.arange(first, end)[:, None]
    begin, last = (_oldest_key(position, rule, rules) for position in (first, end - 1))
    if begin <= rules.sink:
        columns, begin, ahead = [slice(0, end)], rules.sink, rules.sink
    else:
        columns, ahead = [slice(0, rules.sink), slice(begin, end)][not rules.sink :], rules.sink
    # Column `ahead` is now position `begin`, and all columns before it are sink tokens.
    mask = like.new_zeros(end - first, ahead + end - begin)
    left = torch.arange(begin, max(min(last, end), begin)) < rules.head_spans.oldest_key(at)[head]
    mask[:, ahead : ahead + left.shape[1]].masked_fill_(left, -torch.inf)
    mask[:, first - end :].masked_fill_(at.mT > at, -torch.inf)
    return columns, mask


def _oldest_key(position: int, rule: SpanRule, rules: LayerRules) -> int:
    """`HeadSpans.oldest_key` of one position."""
    window = span(position + 1, rule, rules.sink + rules.block) - rules.sink
    if rules.sliding_window is not None:
        window = min(window, rules.sliding_window)
    return position + 1 - window
