"""Rings of codes in plain torch, which defines what every implementation does: heads of equal bits go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moa_kernels.codes.codec import wants_transform
from moa_kernels.codes.levels import quantise
from moa_kernels.codes.packing import pack, unpack
from moa_kernels.codes.storage import CodeLayout, Side, Stored
from moa_kernels.codes.turns import Turns
from moa_kernels.spans import HeadSpans

TILE = 1024
"""Slots of each head that are decoded at once."""


class AppendCodes(NamedTuple):
    """Checked arguments of `moa_kernels.coded.append_codes`, which describes them."""

    new_keys: Tensor
    new_values: Tensor
    stored: Stored
    lens: Tensor
    layout: CodeLayout
    turns: Turns
    counts: Tensor | None


class DecodeCodes(NamedTuple):
    """Checked arguments of `moa_kernels.coded.decode_codes`, which describes them; defaults are filled in."""

    query: Tensor
    stored: Stored
    lens: Tensor
    layout: CodeLayout
    turns: Turns
    spans: HeadSpans
    scale: float
    softcap: float | None
    sink_logits: Tensor | None


class SeeTokens(NamedTuple):
    """Checked arguments of `moa_kernels.coded.see_tokens`, which describes them."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    layout: CodeLayout
    turns: Turns


class StoredStates(NamedTuple):
    """Checked arguments of `moa_kernels.coded.stored_states`, which describes them."""

    lens: Tensor
    stored: Stored
    layout: CodeLayout
    turns: Turns


def append_codes(call: AppendCodes) -> None:
    """Write what the rings still hold after the last token."""
    new_keys, new_values, stored, lens, layout, turns, counts = call
    kv_heads, new = new_keys.shape[1:3]
    sink = layout.sink
    token = torch.arange(new, device=lens.device)
    count = torch.full_like(lens, new) if counts is None else counts.clamp(max=new)
    position = lens[:, None] + token
    real = token < count[:, None]
    sunk = (real & (position < sink)).nonzero(as_tuple=True)
    rings = torch.tensor(layout.ring_slots, device=lens.device)
    newest = (lens + count)[:, None, None] - rings[:, None].clamp(min=1)
    kept = real[:, None] & (position[:, None] >= sink) & (position[:, None] >= newest) & (rings[:, None] > 0)
    for states, (side, codes, scales, sinks) in zip((new_keys, new_values), layout.sides(stored), strict=True):
        if sink:
            by_head = sinks.unflatten(1, (kv_heads, sink))  # a view: [batch, kv_heads, sink, width]
            by_head[sunk[0], :, position[sunk]] = states[sunk[0], :, sunk[1]]
        table = torch.tensor([side.offsets, side.rows, side.scale_offsets], device=lens.device)
        for bits, heads in side.heads_by_bits.items():
            packed, scale = encode(states, position, heads, bits, turns, keys=side is layout.keys)
            sample, index, at = kept[:, list(heads)].nonzero(as_tuple=True)
            head = torch.tensor(heads, device=lens.device)[index]
            slot = (position[sample, at] - sink) % rings[head]
            offset, row, scale_offset = table[:, head]
            byte = (offset + slot * row)[:, None] + torch.arange(packed.shape[-1], device=lens.device)
            codes[sample[:, None], byte] = packed[sample, index, at]
            if scale is not None:
                scales[sample, scale_offset + slot] = scale[sample, index, at]


def decode_codes(call: DecodeCodes) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, computed in float32 or wider."""
    query, stored, lens, layout, turns, spans, scale, softcap, sink_logits = call
    batch, heads, new, width = query.shape
    kv_heads, sink = len(layout.ring_slots), layout.sink
    group = heads // kv_heads
    wide = torch.promote_types(query.dtype, torch.float32)
    # Rows are the queries that share a KV head: [batch, kv_heads, group * new, width]
    rows = query.to(wide).unflatten(1, (kv_heads, group)).flatten(2, 3)
    by_halves = rows[..., turns.order]
    position = slot_positions(lens, layout)  # [batch, kv_heads, sink + most slots of a ring], -1 where none
    visible = _visible(lens, new, position, spans).repeat(1, 1, group, 1)  # [batch, kv_heads, group * new, slots]
    seen = visible.any(2)

    # Slots that no query sees may hold NaN, and 0 * NaN is NaN.
    scores = rows.new_full((*rows.shape[:3], position.shape[-1]), -torch.inf)
    plain_keys, plain_values = (
        sinks.to(wide).unflatten(1, (kv_heads, sink)).masked_fill(~seen[:, :, :sink, None], 0)
        if sink
        else sinks.to(wide).new_zeros(batch, kv_heads, 0, width)
        for sinks in (stored.key_sinks, stored.value_sinks)
    )
    scores[..., :sink] = rows @ plain_keys.mT
    for bits, index, slots, keys in _tiles(stored.key_codes, stored.key_scales, layout.keys, layout, seen, query.dtype):
        asking = rows[:, index]
        if wants_transform(bits):
            asking = by_halves[:, index]
            keys = turns.invert(keys, position[:, index, slots].clamp(min=0), index, keys=True)
        scores[:, index, :, slots] = asking @ keys.mT
    scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    if sink_logits is not None:
        lse = torch.logaddexp(lse, sink_logits.to(wide).view(kv_heads, group, 1).expand(-1, -1, new).flatten(1))
    # A row that sees nothing has an LSE of -inf: its weights are exp(-inf - 0) = 0.
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()

    plain = weights[..., :sink] @ plain_values
    coded = torch.zeros_like(plain)
    sides = stored.value_codes, stored.value_scales, layout.values
    for bits, index, slots, values in _tiles(*sides, layout, seen, query.dtype):
        (coded if wants_transform(bits) else plain)[:, index] += weights[:, index, :, slots] @ values
    output = plain + coded @ turns.value_back.to(wide)
    output, lse = (x.unflatten(2, (group, new)).flatten(1, 2) for x in (output, lse))
    return output.to(query.dtype), lse.float()


def see_tokens(call: SeeTokens) -> tuple[Tensor, Tensor]:
    """Through the codes and back, the sink aside."""
    keys, values, positions, layout, turns = call
    wide = torch.promote_types(keys.dtype, torch.float32)
    found = []
    for side, states in ((layout.keys, keys), (layout.values, values)):
        out = states.clone()
        for bits, heads in side.heads_by_bits.items():
            if bits == 16:
                continue
            packed, scales = encode(states, positions, heads, bits, turns, keys=side is layout.keys)
            assert scales is not None
            y = levels(packed, bits, wide) * scales.to(wide)[..., None]
            if wants_transform(bits):
                y = _inverted(y, positions[:, None], heads, turns, keys=side is layout.keys)
            index = list(heads)
            out[:, index] = torch.where((positions < layout.sink)[:, None, :, None], out[:, index], y.to(out.dtype))
        found.append(out)
    return found[0], found[1]


def stored_states(call: StoredStates) -> tuple[Tensor, Tensor]:
    """All slots as plain vectors, those without a token 0."""
    lens, stored, layout, turns = call
    kv_heads, sink = len(layout.ring_slots), layout.sink
    position = slot_positions(lens, layout)
    held = position >= 0
    dtype, width = stored.key_sinks.dtype, layout.width
    found = []
    for side, codes, scales, sinks in layout.sides(stored):
        out = sinks.new_zeros(*position.shape, width)
        if sink:
            out[:, :, :sink] = sinks.unflatten(1, (kv_heads, sink)).masked_fill(~held[:, :, :sink, None], 0)
        for bits, index, slots, y in _tiles(codes, scales, side, layout, held, dtype):
            if wants_transform(bits):
                y = _inverted(y, position[:, index, slots].clamp(min=0), index, turns, keys=side is layout.keys)
            out[:, index, slots] = y.to(dtype).masked_fill(~held[:, index, slots, None], 0)
        found.append(
            torch.cat([out[:, head, : layout.rings.capacities[head]] for head in range(kv_heads)], 1)
        )  # fmt: skip
    return found[0], found[1]


def encode(
    states: Tensor, positions: Tensor, heads: Sequence[int], bits: int, turns: Turns, *, keys: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows and scales ``[batch, heads, tokens, ...]`` of some heads of one number of bits.

    Args:
        states: ``[batch, kv_heads, tokens, width]``.
        positions: ``[batch or 1, tokens]``.
        heads: Which.
        bits: Of these heads.
        turns: Of all heads.
        keys: Whether they are keys.
    """
    x = states[:, list(heads)]
    if bits == 16:
        return x.contiguous().view(torch.uint8), None
    if not wants_transform(bits):
        codes, scales = quantise(x, bits)
    else:
        y = turns.apply(x, positions, heads, keys=keys)
        codes, scales = quantise(y, bits, turns.digits_of(heads, keys=keys))
    return pack(codes, bits), scales


def levels(packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Rows of codes as levels: ``code - (2**bits - 1) / 2``."""
    centred: Tensor = unpack(packed, bits).to(dtype) - (2**bits - 1) / 2
    return centred


def slot_positions(lens: Tensor, layout: CodeLayout) -> Tensor:
    """Position that each slot should hold, -1 if none: ``[batch, kv_heads, sink + slots of the longest ring]``."""
    rings = torch.tensor(layout.ring_slots, device=lens.device)
    sunk = torch.arange(layout.sink, device=lens.device).expand(len(lens), len(rings), -1)
    slot = torch.arange(max(layout.ring_slots), device=lens.device) + layout.sink
    last = lens[:, None, None] - 1
    # The newest position that falls on each slot.
    ringed = last - (last - slot) % rings.clamp(min=1)[:, None]
    ringed = ringed.where((slot < layout.sink + rings[:, None]) & (ringed >= layout.sink), -1)
    return torch.cat([sunk.where(sunk <= last, -1), ringed], -1)


def _inverted(y: Tensor, positions: Tensor, heads: Sequence[int], turns: Turns, *, keys: bool) -> Tensor:
    """As `Turns.invert`, keys' channels in their own places."""
    x = turns.invert(y, positions, heads, keys=keys)
    return x[..., turns.order.argsort()] if keys else x


def _visible(lens: Tensor, new: int, position: Tensor, spans: HeadSpans) -> Tensor:
    """Boolean ``[batch, kv_heads, new, slots]``."""
    query_at = lens[:, None] - new + torch.arange(new, device=lens.device)  # [batch, new]
    per_head = [
        HeadSpans((rule,), spans.sliding_window).visible(query_at, position[:, head])[0]
        for head, rule in enumerate(spans.heads)
    ]
    return torch.stack(per_head, 1)


def _tiles(
    codes: Tensor, scales: Tensor, side: Side, layout: CodeLayout, seen: Tensor, dtype: torch.dtype
) -> Iterator[tuple[int, list[int], slice, Tensor]]:
    """What the rings hold, some slots of all heads of equal bits at a time.

    Yields:
        Bits, heads, slots (after the sink's), and their vectors ``[batch, heads, slots, width]`` in float32 or wider,
        before any transform is undone; 0 where ``seen`` ``[batch, kv_heads, slots]`` is False.
    """
    wide = torch.promote_types(dtype, torch.float32)
    for bits, heads in side.heads_by_bits.items():
        longest = max(layout.ring_slots[head] for head in heads)
        for start in range(0, longest, TILE):
            index = [head for head in heads if layout.ring_slots[head] > start]
            size = min(max(layout.ring_slots[head] for head in index) - start, TILE)
            rows, factors = [], []
            for head in index:
                count, row = min(layout.ring_slots[head] - start, size), side.rows[head]
                first = side.offsets[head] + start * row
                part = codes[:, first : first + count * row].unflatten(1, (count, row))
                rows.append(torch.nn.functional.pad(part, (0, 0, 0, size - count)) if count < size else part)
                if bits < 16:
                    at = side.scale_offsets[head] + start
                    factors.append(torch.nn.functional.pad(scales[:, at : at + count], (0, size - count)))
            packed = torch.stack(rows, 1)  # [batch, heads, size, row]
            slots = slice(layout.sink + start, layout.sink + start + size)
            hidden = ~seen[:, index, slots, None]
            if bits == 16:
                yield bits, index, slots, packed.view(dtype).to(wide).masked_fill(hidden, 0)
            else:
                factor = torch.stack(factors, 1).to(wide)[..., None].masked_fill(hidden, 0)
                yield bits, index, slots, levels(packed, bits, wide) * factor
