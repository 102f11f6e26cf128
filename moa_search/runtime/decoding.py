"""One decoding step in plain torch: the new token is stored first, then every head's slots are attended as they lie."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from moa_search.spans import SpanRule, span

if TYPE_CHECKING:
    from moa_kernels.rings import RingLayout

    from moa_search.runtime.layer import MoACacheLayer
    from moa_search.runtime.rules import LayerRules


@dataclass(frozen=True)
class _Run:
    """Neighbouring KV heads of one rule: their slots form a matrix ``[heads, capacity]`` from slot ``offset`` on.

    Where all samples have one length, older positions than ``floor`` were gone before the layout was made.
    """

    first: int
    heads: int
    offset: int
    capacity: int
    rule: SpanRule
    floor: int

    @property
    def slots(self) -> slice:
        return slice(self.offset, self.offset + self.heads * self.capacity)

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """The run's part ``[batch, heads, capacity, ...]`` of ``[batch, slots, ...]``, a view."""
        return torch.unflatten(states[:, self.slots], 1, (self.heads, self.capacity))


class DecodingTable:
    """What stays the same from step to step while a layer's layout lasts.

    Args:
        rules: What the layer's heads attend.
        layout: Where their keys are.
        floors: For every head, the oldest position besides the sink that was held when the layout was made.
    """

    def __init__(self, rules: LayerRules, layout: RingLayout, floors: list[int]) -> None:
        self.layout, self.rules = layout, rules
        self.runs: list[_Run] = []
        self._heads = list(zip(layout.offsets, [max(most - rules.sink, 1) for most in layout.capacities], strict=True))
        numbered = enumerate(zip(rules.rules, layout.capacities, strict=True))
        for (rule, capacity), same in groupby(numbered, key=lambda head: head[1]):
            heads = [number for number, _ in same]
            self.runs.append(_Run(heads[0], len(heads), layout.offsets[heads[0]], capacity, rule, floors[heads[0]]))

    def slots(self, position: int) -> list[int]:
        """Where every head keeps the key of a position."""
        sink = self.rules.sink
        if position < sink:
            return [offset + position for offset, _ in self._heads]
        return [offset + sink + (position - sink) % ring for offset, ring in self._heads]

    def hidden(self, run: _Run, length: int) -> tuple[list[slice], list[slice]]:
        """Slots among a run's first ``min(length, capacity)`` that the newest of ``length`` tokens doesn't attend.

        Returns:
            All of them, and those that hold no key of their position.
        """
        sink, ring = self.rules.sink, max(run.capacity - self.rules.sink, 1)
        window = span(length, run.rule, sink + self.rules.block) - sink
        parts = []
        if self.rules.sliding_window is not None:
            window = min(window, self.rules.sliding_window)
            left = min(length - self.rules.sliding_window, sink)
            parts = [slice(0, left)] if left > 0 else []
        held = max(length - ring, sink)  # as far as the ring's size goes
        return (
            parts + _ring_slots(held, length - window, sink, ring),
            _ring_slots(held, min(run.floor, length - window), sink, ring),
        )


def _ring_slots(start: int, stop: int, sink: int, ring: int) -> list[slice]:
    """Slots of the positions from ``start`` to ``stop``, which may wrap around the ring's end."""
    if start >= stop:
        return []
    first, last = sink + (start - sink) % ring, sink + (stop - 1 - sink) % ring + 1
    return [slice(first, last)] if first < last else [slice(first, sink + ring), slice(sink, last)]


def applies(past: MoACacheLayer, valid: torch.Tensor | None, *states: torch.Tensor) -> bool:
    """Whether `decode_one` can run a step: one real token per sample, after a past, on a CPU, without gradients."""
    query = states[0]
    if query.shape[2] != 1 or valid is not None or past.is_empty or past.is_compileable or query.device.type != "cpu":
        return False
    if any(part.dtype != past.keys.dtype for part in states):
        return False
    return not (torch.is_grad_enabled() and any(part.requires_grad for part in states))


def decode_one(
    past: MoACacheLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Store one new token per sample, and attend all that its heads keep.

    The query heads of a KV head are rows of one matrix: torch's kernels for CPUs are several times faster with three
    rows of one head than with one row of three. Slots that the query doesn't attend get a weight of 0, and those that
    hold nothing are set to 0 first, since 0 times what they may hold could be NaN.

    Args:
        past: The layer's cache; the token is added to it.
        query: ``[batch, heads, 1, head_dim]``.
        key: ``[batch, kv_heads, 1, head_dim]``.
        value: ``[batch, kv_heads, 1, value_dim]``.
        scale: Factor on the logits.
        softcap: Bound of the logits (Gemma 2).
        sink_logits: ``[heads]``, one more logit per head that has no value (GPT-OSS).

    Returns:
        ``[batch, 1, heads, value_dim]``.
    """
    past.make_room(1)
    table = past.table()
    masks = None
    if past.is_even:
        slots = torch.tensor(table.slots(past.longest))
        past.keys.index_copy_(1, slots, key[:, :, 0])
        past.values.index_copy_(1, slots, value[:, :, 0])
        past.lens = past.lens + 1
        past.advance(1)
    else:
        past.commit(key, value, None)
        masks = _masks(past)
    grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))  # [batch, kv_heads, group, head_dim]
    logits = None if sink_logits is None else sink_logits.view(1, key.shape[1], -1, 1)
    parts = []
    for run in table.runs:
        heads = slice(run.first, run.first + run.heads)
        keys, values = run.of(past.keys), run.of(past.values)
        if masks is not None:
            mask = run.of(masks)[:, :, None]  # [batch, heads, 1, capacity]
        else:
            mask, filled = None, min(past.longest, run.capacity)
            if filled < run.capacity:
                keys, values = keys[:, :, :filled], values[:, :, :filled]
            hidden, empty = table.hidden(run, past.longest)
            for part in hidden:
                mask = query.new_zeros(1, filled) if mask is None else mask
                mask[:, part] = -torch.inf
            for part in empty:
                keys[:, :, part], values[:, :, part] = 0, 0
        if softcap is None and logits is None:
            if mask is not None:
                mask = mask.expand(*mask.shape[:-2], grouped.shape[2], -1)
            parts.append(scaled_dot_product_attention(grouped[:, heads], keys, values, mask, scale=scale))
        else:
            run_logits = None if logits is None else logits[:, heads]
            parts.append(_attend(grouped[:, heads], keys, values, mask, scale, softcap, run_logits))
    return torch.cat(parts, 1).flatten(1, 2)[:, None]


def _masks(past: MoACacheLayer) -> torch.Tensor:
    """What is added to logits, for samples of different lengths: ``[batch, slots]``, 0 or minus infinity.

    Sets slots that hold nothing to 0.
    """
    position, last = past.positions(), past.lens[:, None] - 1
    oldest = past.rules.head_spans.oldest_key(last[:, 0])  # [kv_heads, batch]
    seen = (position <= last) & ((position >= oldest[past.layout.heads(past.device)].mT) | (position < past.rules.sink))
    if past.rules.sliding_window is not None:
        seen &= position > last - past.rules.sliding_window
    empty = (position > last).nonzero(as_tuple=True)
    past.keys[empty], past.values[empty] = 0, 0
    mask: torch.Tensor = past.keys.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    return mask


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a soft cap or sink logits, in float32 or wider; ``[batch, heads, group, value_dim]``."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ keys.to(wide).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits.to(wide).expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    out: torch.Tensor = weights @ values.to(wide)
    return out.to(values.dtype)
