"""Decode attention over codes in Triton: tiles of bytes on a fixed grid, then a merge.

As `moa_kernels.decode.kernel`, and planned alike, but for three things. Tiles take equally long instead of holding
equally many keys, since a key of few bits costs less. The sink's keys, which are plain, are a tile of their own: plain
values and coded ones are added up apart, and only the latter's sum is turned back. And a program's loop is made for its
head's tier, one of those that the layer has.

A vector's planes (`moa_kernels.codes.packing`) are taken apart in registers. Byte b of a plane of W bytes holds the
channels b, ``b + W``, ..., so a product over channels is one over W channels for each place in a byte, and no number
moves to another lane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa_kernels.coded.vector_kernel import digit, turn
from moa_kernels.decode.kernel import _in_reach, _rules
from moa_kernels.device import LOG2E, MASKED, close_softmax, oldest_key, scores_of


@triton.jit
def _planned(
    lens, layout, codes, spans, start, pairs, num_kv_heads, sliding_window,
    NEW: tl.constexpr, OVERHEAD: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Keys in reach of pairs ``start`` to ``start + BLOCK_P``, the sink's and the ring's, and what one of the latter
    costs.
    """
    # A pair is a sample and a KV head.
    pair = start + tl.arange(0, BLOCK_P)
    known = pair < pairs
    head = pair % num_kv_heads
    length = tl.load(lens + pair // num_kv_heads, mask=known, other=0).to(tl.int32)
    sink, capacity, min_span, alpha, beta_256 = _rules(layout, spans, head, known)
    _, sunk, _, ringed = _in_reach(length, sink, capacity, min_span, alpha, beta_256, sliding_window, NEW)
    cost = tl.load(codes + head * 8 + 2, mask=known, other=0) + tl.load(codes + head * 8 + 6, mask=known, other=0)
    return sunk, ringed, cost.to(tl.int32) + OVERHEAD


@triton.jit
def _keys_per_tile(share, cost, BLOCK_N: tl.constexpr):
    """Whole blocks of keys that cost ``share``, or a little more."""
    return (tl.cdiv(tl.cdiv(share, cost.to(tl.int64)), BLOCK_N) * BLOCK_N).to(tl.int32)


@triton.jit
def _channels(BITS: tl.constexpr, PART: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Channels at one place of a row's bytes, from low to high bits, and which of them there are: [BLOCK], twice.

    Plain numbers have one place.
    """
    byte = tl.arange(0, BLOCK)
    PLANE: tl.constexpr = 2 if BITS == 3 else BITS
    WIDTH: tl.constexpr = HEAD_DIM * PLANE // 8 if BITS < 16 else HEAD_DIM
    return byte + PART * WIDTH, byte < WIDTH


@triton.jit
def _numbers(raw, low, BITS: tl.constexpr, PART: tl.constexpr):
    """Levels at a place of bytes times ``2 << b``, with b the place's first bit: float16, without rounding.

    An instruction for each two codes puts them in, and one subtracts: the bits of a float16 between 1024 and 2048 are
    0x6400 and what is added to 1024.

    Args:
        raw: Twice the bytes, as int16; with 3 bits four times.
        low: With 3 bits, twice the bytes of the low bits' plane, such that the lowest place is that of PART 0.
        BITS: Of a code.
        PART: The place.
    """
    PLACE: tl.constexpr = PART * (2 if BITS == 3 else BITS)
    code = raw & 12 << PLACE | low & 2 << PLACE if BITS == 3 else raw & (2 << PLACE) * (2**BITS - 1)
    return (code | 0x6400).to(tl.float16, bitcast=True) - (1024 + (2**BITS - 1) * 2**PLACE)


@triton.jit
def _back_part(
    pointer, first, BITS: tl.constexpr, PART: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What turns back the channels at a place of bytes, into half of a key's from ``first`` on: [BLOCK, BLOCK_H]."""
    channel, within = _channels(BITS, PART, HEAD_DIM, BLOCK)
    pair = tl.arange(0, BLOCK_H)
    back = tl.load(
        pointer + channel[:, None] * HEAD_DIM + first + pair[None, :],
        mask=within[:, None] & (pair < HEAD_DIM // 2)[None, :], other=0.0,
    )  # fmt: skip
    return back * (0.5 ** (1 + PART * (2 if BITS == 3 else BITS)))


@triton.jit
def _add_half(x, back, raw, low, BITS: tl.constexpr, PART: tl.constexpr):
    """Half of the keys' channels with what a place adds to them, if there is such a place: [BLOCK_N, BLOCK_H]."""
    if max(8 // (2 if BITS == 3 else BITS), 1) > PART:
        return tl.dot(_numbers(raw, low, BITS, PART), back, x)
    return x


@triton.jit
def _add_values(acc, w, shrink, raw, low, BITS: tl.constexpr, PART: tl.constexpr):
    """The sum of values at a place, shrunk, and what new keys add, if there is such a place: [BLOCK_M, BLOCK_V]."""
    if max(8 // (2 if BITS == 3 else BITS), 1) > PART:
        return tl.dot(w, _numbers(raw, low, BITS, PART), acc * shrink[:, None])
    return acc


@triton.jit
def _store_part(
    partial, result, real, acc, grow, BITS: tl.constexpr, PART: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sum of values at a place, if there is such a place."""
    if max(8 // (2 if BITS == 3 else BITS), 1) > PART:
        channel, within = _channels(BITS, PART, HEAD_DIM, BLOCK)
        if BITS < 16:
            acc = acc * (grow * 0.5 ** (1 + PART * (2 if BITS == 3 else BITS)))
        tl.store(
            partial + result[:, None] * HEAD_DIM + channel[None, :], acc, mask=real[:, None] & within[None, :]
        )  # fmt: skip


@triton.jit
def _loaded(codes, slot, there, BITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Bytes, and with 3 bits those of the low bits' plane, as `_numbers` takes them; or plain numbers.

    What isn't in reach may be anything, NaN included, and 0 * NaN is NaN: it isn't loaded at all.
    """
    ROW: tl.constexpr = HEAD_DIM * BITS // 8 if BITS < 16 else HEAD_DIM
    byte = tl.arange(0, BLOCK)
    mask = there[:, None] & _channels(BITS, 0, HEAD_DIM, BLOCK)[1][None, :]
    row = codes + slot[:, None] * ROW
    raw = tl.load(row + byte[None, :], mask=mask, other=0)
    low = raw
    if BITS < 16:
        raw = raw.to(tl.int16) * (4 if BITS == 3 else 2)
    if BITS == 3:
        # Codes at place p have their low bits at place 2p of their plane's bytes, then at place 2p + 1.
        LOW: tl.constexpr = HEAD_DIM // 8
        low = tl.load(row + HEAD_DIM // 4 + byte[None, :] % LOW, mask=mask, other=0).to(tl.int16)
        low = (low * 2) >> (byte >= LOW).to(tl.int16)[None, :]
    return raw, low


@triton.jit
def _slots(first_slot, start, ring, BLOCK_N: tl.constexpr):
    """Slots of keys ``start`` and on, around the ring once at most."""
    slot = first_slot + start + tl.arange(0, BLOCK_N)
    return tl.where(slot >= ring, slot - ring, slot).to(tl.int64)


@triton.jit
def _in_half_range(a, b):
    """Rows of numbers by the power of two in front of the largest one's mantissa, at most 2 then, and that power."""
    size = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 1).to(tl.int32, bitcast=True) & 0x7F800000
    size = tl.minimum(tl.maximum(size, 0x02000000), 0x7D000000)
    shrink = (0x7F000000 - size).to(tl.float32, bitcast=True)[:, None]
    return a * shrink, b * shrink, size.to(tl.float32, bitcast=True)


@triton.jit
def _turned_back(a, b, cos, sin):
    """Rows of pairs of channels, [BLOCK_M, BLOCK_H] twice, turned back by angles, [BLOCK_H]."""
    return a * cos[None, :] + b * sin[None, :], b * cos[None, :] - a * sin[None, :]


@triton.jit
def _turned_queries(
    query, query_rows, order, angles, at, real, HEAD_DIM: tl.constexpr, RADIX: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Halves of queries' channels, turned back to a position: float32 [BLOCK_M, BLOCK_H] twice, and their factors."""
    pair = tl.arange(0, BLOCK_H)
    paired = pair < HEAD_DIM // 2
    mask = real[:, None] & paired[None, :]
    row = query + query_rows[:, None]
    first = tl.load(order + pair, mask=paired, other=0)[None, :]
    second = tl.load(order + HEAD_DIM // 2 + pair, mask=paired, other=0)[None, :]
    a = tl.load(row + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(row + second, mask=mask, other=0.0).to(tl.float32)
    a, b, size = _in_half_range(a, b)
    cos, sin = turn(angles, at, pair, paired, HEAD_DIM, RADIX)
    a, b = _turned_back(a, b, cos, sin)
    return a, b, size


@triton.jit
def _attend(
    query, query_rows, key_codes, key_scales, value_codes, value_scales,
    back, back_size, mean, order, angles,
    first_at, first_slot, ring, low, high, row_at, since, real, scale,
    partial, tops, totals, result,
    NEW: tl.constexpr, HEAD_DIM: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, RADIX: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial results of keys ``low`` to ``high - 1`` in reach of a pair, all of one tier.

    Key number i in reach is at position ``first_at + i``, in slot ``first_slot + i`` of the ring, or around it. Rows
    see positions from ``since`` on.
    """
    # Bytes of a plane, or plain numbers, and pairs of a key's channels: padded, as products want it.
    BLOCK_K: tl.constexpr = BLOCK_D if KEY_BITS == 16 else max(BLOCK_D * (2 if KEY_BITS == 3 else KEY_BITS) // 8, 16)
    BLOCK_V: tl.constexpr = (
        BLOCK_D if VALUE_BITS == 16 else max(BLOCK_D * (2 if VALUE_BITS == 3 else VALUE_BITS) // 8, 16)
    )
    BLOCK_H: tl.constexpr = max(BLOCK_D // 2, 16)
    PLAIN: tl.constexpr = tl.float32 if UPCAST else query.dtype.element_ty
    TURNED: tl.constexpr = KEY_BITS < 8

    # Queries [BLOCK_M, channels].
    if TURNED:
        # By halves, in float32, turned back to the first key's position: keys then turn by their distance from it.
        q_a, q_b, q_size = _turned_queries(
            query, query_rows, order, angles, first_at + low, real, HEAD_DIM, RADIX, BLOCK_H
        )
        pair = tl.arange(0, BLOCK_H)
        paired = pair < HEAD_DIM // 2
        # What turns keys by their distance from the block's first one: [BLOCK_N, BLOCK_H].
        place = angles + tl.arange(0, BLOCK_N)[:, None] * HEAD_DIM + pair[None, :]
        cos = tl.load(place, mask=paired[None, :], other=1.0).to(tl.float16)
        sin = tl.load(place + HEAD_DIM // 2, mask=paired[None, :], other=0.0).to(tl.float16)
        step_cos, step_sin = digit(angles, BLOCK_N, pair, paired, HEAD_DIM)
        mean_a = tl.load(mean + pair, mask=paired, other=0.0).to(tl.float16)
        mean_b = tl.load(mean + HEAD_DIM // 2 + pair, mask=paired, other=0.0).to(tl.float16)
        size = tl.load(back_size)
        back_a0 = _back_part(back, 0, KEY_BITS, 0, HEAD_DIM, BLOCK_K, BLOCK_H)
        back_b0 = _back_part(back, HEAD_DIM // 2, KEY_BITS, 0, HEAD_DIM, BLOCK_K, BLOCK_H)
        back_a1 = _back_part(back, 0, KEY_BITS, 1, HEAD_DIM, BLOCK_K, BLOCK_H)
        back_b1 = _back_part(back, HEAD_DIM // 2, KEY_BITS, 1, HEAD_DIM, BLOCK_K, BLOCK_H)
        if KEY_BITS < 4:
            back_a2 = _back_part(back, 0, KEY_BITS, 2, HEAD_DIM, BLOCK_K, BLOCK_H)
            back_b2 = _back_part(back, HEAD_DIM // 2, KEY_BITS, 2, HEAD_DIM, BLOCK_K, BLOCK_H)
            back_a3 = _back_part(back, 0, KEY_BITS, 3, HEAD_DIM, BLOCK_K, BLOCK_H)
            back_b3 = _back_part(back, HEAD_DIM // 2, KEY_BITS, 3, HEAD_DIM, BLOCK_K, BLOCK_H)
    else:
        channel, within = _channels(KEY_BITS, 0, HEAD_DIM, BLOCK_K)
        q = tl.load(query + query_rows[:, None] + channel[None, :], mask=real[:, None] & within[None, :], other=0.0)
        if KEY_BITS == 16:
            q = q.to(PLAIN)
        else:
            q = q.to(tl.float32)
            q, _, q_size = _in_half_range(q, q)
            q, q_size = q.to(tl.float16), q_size * 0.5  # levels come doubled

    top = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.zeros([], tl.float32)
    acc0 = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    acc1 = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    acc2 = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    acc3 = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    # Scales are read one block ahead: they are too narrow for the asynchronous copies by which codes come.
    slot = _slots(first_slot, low, ring, BLOCK_N)
    ahead = low + tl.arange(0, BLOCK_N) < high
    next_key_scale, next_value_scale = tl.zeros([BLOCK_N], tl.float16), tl.zeros([BLOCK_N], tl.float16)
    if KEY_BITS < 16:
        next_key_scale = tl.load(key_scales + slot, mask=ahead, other=0.0)
    if VALUE_BITS < 16:
        next_value_scale = tl.load(value_scales + slot, mask=ahead, other=0.0)
    for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        index = start + tl.arange(0, BLOCK_N)
        there = index < high
        slot = _slots(first_slot, start, ring, BLOCK_N)
        k, k_low = _loaded(key_codes, slot, there, KEY_BITS, HEAD_DIM, BLOCK_K)
        k_scale, v_scale = next_key_scale.to(tl.float32), next_value_scale.to(tl.float32)
        next_slot = _slots(first_slot, start + BLOCK_N, ring, BLOCK_N)
        ahead = index + BLOCK_N < high
        if KEY_BITS < 16:
            next_key_scale = tl.load(key_scales + next_slot, mask=ahead, other=0.0)
        if VALUE_BITS < 16:
            next_value_scale = tl.load(value_scales + next_slot, mask=ahead, other=0.0)
        # Products [BLOCK_M, BLOCK_N].
        if TURNED:
            # Both halves of the keys' channels, before rotary embedding.
            x_a = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
            x_b = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
            x_a = _add_half(x_a, back_a0, k, k_low, KEY_BITS, 0)
            x_b = _add_half(x_b, back_b0, k, k_low, KEY_BITS, 0)
            x_a = _add_half(x_a, back_a1, k, k_low, KEY_BITS, 1)
            x_b = _add_half(x_b, back_b1, k, k_low, KEY_BITS, 1)
            if KEY_BITS < 4:
                x_a = _add_half(x_a, back_a2, k, k_low, KEY_BITS, 2)
                x_b = _add_half(x_b, back_b2, k, k_low, KEY_BITS, 2)
                x_a = _add_half(x_a, back_a3, k, k_low, KEY_BITS, 3)
                x_b = _add_half(x_b, back_b3, k, k_low, KEY_BITS, 3)
            half_a = (x_a * (k_scale * size)[:, None]).to(tl.float16) + mean_a[None, :]
            half_b = (x_b * (k_scale * size)[:, None]).to(tl.float16) + mean_b[None, :]
            k_a, k_b = half_a * cos - half_b * sin, half_b * cos + half_a * sin
            # Keys by queries: what a product leaves in registers is how the next one takes its first factor.
            by_key = tl.dot(k_b, tl.trans(q_b.to(tl.float16)), tl.dot(k_a, tl.trans(q_a.to(tl.float16))))
            products = tl.trans(by_key) * q_size[:, None]
            # The next block's first key is so much farther.
            q_a, q_b = _turned_back(q_a, q_b, step_cos, step_sin)
        elif KEY_BITS == 8:
            products = tl.dot(q, tl.trans(_numbers(k, k_low, 8, 0))) * q_size[:, None] * k_scale[None, :]
        else:
            products = tl.dot(q, tl.trans(k.to(PLAIN)), input_precision="ieee")
        scores = scores_of(products, scale, SOFTCAP)
        visible = there[None, :]
        if NEW > 1:
            # One new token sees all in reach; of several, each has its own window and its own past.
            at = (first_at + index)[None, :]
            visible = visible & (at >= since[:, None]) & (at <= row_at[:, None])
        scores = tl.where(visible, scores, MASKED)
        higher = tl.maximum(top, tl.max(scores, 1))
        # Again, since a row that has seen no key yet has its maximum at MASKED.
        p = tl.where(visible, tl.math.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.math.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        top = higher
        # Last, so that values take no registers while keys do.
        v, v_low = _loaded(value_codes, slot, there, VALUE_BITS, HEAD_DIM, BLOCK_V)
        if VALUE_BITS == 16:
            acc0 = tl.dot(p.to(PLAIN), v.to(PLAIN), acc0 * shrink[:, None], input_precision="ieee")
        else:
            # Weights by scales, as shares of the largest scale so far: float16 has a short range.
            larger = tl.maximum(largest, tl.max(v_scale, 0))
            factor = 1.0 / tl.maximum(larger, 1e-30)
            shrink *= largest * factor
            w = (p * (v_scale * factor)[None, :]).to(tl.float16)
            largest = larger
            acc0 = _add_values(acc0, w, shrink, v, v_low, VALUE_BITS, 0)
            acc1 = _add_values(acc1, w, shrink, v, v_low, VALUE_BITS, 1)
            acc2 = _add_values(acc2, w, shrink, v, v_low, VALUE_BITS, 2)
            acc3 = _add_values(acc3, w, shrink, v, v_low, VALUE_BITS, 3)

    tl.store(tops + result, top, mask=real)
    tl.store(totals + result, total, mask=real)
    _store_part(partial, result, real, acc0, largest, VALUE_BITS, 0, HEAD_DIM, BLOCK_V)
    _store_part(partial, result, real, acc1, largest, VALUE_BITS, 1, HEAD_DIM, BLOCK_V)
    _store_part(partial, result, real, acc2, largest, VALUE_BITS, 2, HEAD_DIM, BLOCK_V)
    _store_part(partial, result, real, acc3, largest, VALUE_BITS, 3, HEAD_DIM, BLOCK_V)


@triton.jit
def split_kernel(
    query, back, back_sizes, means, order, angles,
    key_codes, value_codes, plain_keys, plain_values, key_scales, value_scales,
    key_sinks, value_sinks, lens, layout, codes, spans, partial, tops, totals, ends,
    scale, sliding_window, pairs, num_kv_heads,
    key_codes_stride, value_codes_stride, key_scales_stride, value_scales_stride,
    TIERS: tl.constexpr, TARGET_TILES: tl.constexpr, PLANS: tl.constexpr, OVERHEAD: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUP: tl.constexpr, NEW: tl.constexpr, HEAD_DIM: tl.constexpr, ITEMSIZE: tl.constexpr,
    SOFTCAP: tl.constexpr, RADIX: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys of a pair, and per BLOCK_M of its rows (query heads by new tokens).

    Writes partial results, and where each pair's tiles end. TIERS has a bit for each pair of bits that the layer has,
    see `tier_mask`.
    """
    tile = tl.program_id(0)
    ROWS: tl.constexpr = GROUP * NEW

    # The plan, the same in every program: first what tiles may cost, then where each pair's tiles end.
    everything = tl.zeros([], tl.int64)
    for start in tl.range(0, PLANS * BLOCK_P, BLOCK_P):
        _, ringed, cost = _planned(
            lens, layout, codes, spans, start, pairs, num_kv_heads, sliding_window, NEW, OVERHEAD, BLOCK_P
        )
        everything += tl.sum(ringed.to(tl.int64) * cost)
    share = tl.maximum(tl.cdiv(everything, TARGET_TILES), 1)
    # Pairs whose tiles end before this one: how many (its own number), and where the last of them ends.
    planned = tl.zeros([], tl.int32)
    mine = tl.zeros([], tl.int32)
    first_tile = tl.zeros([], tl.int32)
    for start in tl.range(0, PLANS * BLOCK_P, BLOCK_P):
        sunk, ringed, cost = _planned(
            lens, layout, codes, spans, start, pairs, num_kv_heads, sliding_window, NEW, OVERHEAD, BLOCK_P
        )
        tiles = tl.cdiv(ringed, _keys_per_tile(share, cost, BLOCK_N)) + (sunk > 0).to(tl.int32)
        end = planned + tl.cumsum(tiles, 0)
        planned += tl.sum(tiles)
        mine += tl.sum((end <= tile).to(tl.int32))
        first_tile = tl.maximum(first_tile, tl.max(tl.where(end <= tile, end, 0)))
        # Once for all: `merge_kernel` needs to know.
        if (tile == 0) & (tl.program_id(1) == 0):
            pair = start + tl.arange(0, BLOCK_P)
            tl.store(ends + pair, end, mask=pair < pairs)
    # No early return for tiles beyond the plan: Triton pipelines no loop after one.
    live = tile < planned
    mine = tl.minimum(mine, pairs - 1)

    # What this program reads.
    batch = (mine // num_kv_heads).to(tl.int64)
    head = mine % num_kv_heads
    length = tl.load(lens + batch).to(tl.int32)
    sink, capacity, min_span, alpha, beta_256 = _rules(layout, spans, head, True)
    sunk_from, sunk, ring_from, ringed = _in_reach(
        length, sink, capacity, min_span, alpha, beta_256, sliding_window, NEW
    )
    ring = tl.maximum(capacity - sink, 1)
    cost = (tl.load(codes + head * 8 + 2) + tl.load(codes + head * 8 + 6)).to(tl.int32) + OVERHEAD
    chunk = _keys_per_tile(share, cost, BLOCK_N)
    # The sink's keys come first, then keys low to high - 1 of the ring's in reach.
    has_sink = (sunk > 0).to(tl.int32)
    low = (tile - first_tile - has_sink) * chunk
    high = tl.minimum(low + chunk, ringed)

    # Rows [BLOCK_M]: new tokens of one query head after the other.
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_at = length - NEW + row % NEW
    real = row < tl.where(live, ROWS, 0)
    result = tile.to(tl.int64) * ROWS + row
    query_rows = (mine.to(tl.int64) * ROWS + row) * HEAD_DIM
    since = oldest_key(row_at, sink, min_span, alpha, beta_256, sliding_window)

    if live & (low < 0):
        sink_row = head.to(tl.int64) * sink + batch * num_kv_heads * sink
        _attend(
            query, query_rows, key_sinks + sink_row * HEAD_DIM, key_scales, value_sinks + sink_row * HEAD_DIM,
            value_scales, back, back_sizes, means, order, angles,
            sunk_from, sunk_from, sink, 0, sunk, row_at, row_at - sliding_window + 1, real, scale,
            partial, tops, totals, result,
            NEW, HEAD_DIM, SOFTCAP, UPCAST, RADIX, 16, 16, 1, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for tier in tl.static_range(25):
        if (TIERS >> tier) & 1:
            _attend_tier(
                query, query_rows, back, back_sizes, means, order, angles, head,
                key_codes, value_codes, plain_keys, plain_values, key_scales, value_scales,
                key_codes_stride, value_codes_stride, key_scales_stride, value_scales_stride,
                codes + head * 8, batch,
                ring_from, (ring_from - sink) % ring, ring, low, high, row_at, since, real, live & (low >= 0), scale,
                partial, tops, totals, result,
                NEW, HEAD_DIM, ITEMSIZE, SOFTCAP, RADIX, UPCAST, tier, STAGES, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip


@triton.jit
def _attend_tier(
    query, query_rows, back, back_sizes, means, order, angles, head,
    key_codes, value_codes, plain_keys, plain_values, key_scales, value_scales,
    key_codes_stride, value_codes_stride, key_scales_stride, value_scales_stride,
    table, batch,
    first_at, first_slot, ring, low, high, row_at, since, real, live, scale,
    partial, tops, totals, result,
    NEW: tl.constexpr, HEAD_DIM: tl.constexpr, ITEMSIZE: tl.constexpr, SOFTCAP: tl.constexpr,
    RADIX: tl.constexpr, UPCAST: tl.constexpr, TIER: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a program does if it is live and its head's tier is TIER, a bit of `tier_mask`."""
    KEYS: tl.constexpr = TIER // 5
    VALUES: tl.constexpr = TIER % 5
    KEY_BITS: tl.constexpr = 16 if KEYS == 0 else (8 if KEYS == 1 else 6 - KEYS)
    VALUE_BITS: tl.constexpr = 16 if VALUES == 0 else (8 if VALUES == 1 else 6 - VALUES)
    if live & (tl.load(table) == KEY_BITS) & (tl.load(table + 4) == VALUE_BITS):
        # Where this head's rows begin, in bytes, or in plain numbers.
        key_base = batch * key_codes_stride + tl.multiple_of(tl.load(table + 1), 16)
        value_base = batch * value_codes_stride + tl.multiple_of(tl.load(table + 5), 16)
        if KEY_BITS == 16:
            keys = plain_keys + tl.multiple_of(key_base // ITEMSIZE, 16 // ITEMSIZE)
        else:
            keys = key_codes + key_base
        if VALUE_BITS == 16:
            values = plain_values + tl.multiple_of(value_base // ITEMSIZE, 16 // ITEMSIZE)
        else:
            values = value_codes + value_base
        _attend(
            query, query_rows, keys, key_scales + batch * key_scales_stride + tl.load(table + 3),
            values, value_scales + batch * value_scales_stride + tl.load(table + 7),
            back + head.to(tl.int64) * HEAD_DIM * HEAD_DIM, back_sizes + head, means + head * HEAD_DIM, order, angles,
            first_at, first_slot, ring, low, high, row_at, since, real, scale,
            partial, tops, totals, result,
            NEW, HEAD_DIM, SOFTCAP, UPCAST, RADIX, KEY_BITS, VALUE_BITS, STAGES,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def merge_kernel(
    partial, tops, totals, ends, lens, layout, spans, sink_logits, plain, coded, lse,
    sliding_window, num_kv_heads, batch,
    GROUP: tl.constexpr, NEW: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per row of a pair: the partial results of its tiles, always in the same order.

    The first tile's is plain where the pair reaches sink keys. Writes ``plain`` and ``coded``, both [kv_heads, batch,
    rows, HEAD_DIM].
    """
    ROWS: tl.constexpr = GROUP * NEW
    program = tl.program_id(0)
    pair = program // ROWS
    row = program % ROWS
    head = pair % num_kv_heads
    sample = pair // num_kv_heads
    length = tl.load(lens + sample).to(tl.int32)
    sink, capacity, min_span, alpha, beta_256 = _rules(layout, spans, head, True)
    _, sunk, _, _ = _in_reach(length, sink, capacity, min_span, alpha, beta_256, sliding_window, NEW)
    first = tl.load(ends + pair - 1, mask=pair > 0, other=0)
    end = tl.load(ends + pair)
    column = tl.arange(0, BLOCK_D)
    within = column < HEAD_DIM
    # Vectors of one element: scalars carried through a loop differ between versions of Triton.
    top = tl.full([1], MASKED, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    sink_acc = tl.zeros([BLOCK_D], tl.float32)
    has_sink = (sunk > 0) & (end > first)
    sink_source = first.to(tl.int64) * ROWS + row
    if has_sink:
        top = tl.load(tops + sink_source + tl.arange(0, 1))
        total = tl.load(totals + sink_source + tl.arange(0, 1))
        sink_acc = tl.load(partial + sink_source * HEAD_DIM + column, mask=within, other=0.0)
    for start in tl.range(first + has_sink.to(tl.int32), end, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        there = tile < end
        source = tile.to(tl.int64) * ROWS + row
        tile_top = tl.load(tops + source, mask=there, other=MASKED)
        tile_total = tl.load(totals + source, mask=there, other=0.0)
        block = tl.load(
            partial + source[:, None] * HEAD_DIM + column[None, :], mask=there[:, None] & within[None, :], other=0.0
        )
        # All partial results to one maximum, then added up.
        higher = tl.maximum(top, tl.max(tile_top, 0))
        weight = tl.math.exp2(tile_top - higher)
        shrink = tl.math.exp2(top - higher)
        total = total * shrink + tl.sum(tile_total * weight, 0)
        acc = acc * shrink + tl.sum(block * weight[:, None], 0)
        sink_acc = sink_acc * shrink
        top = higher
    sink_logit = top
    if HAS_SINK_LOGITS:
        sink_logit = tl.load(sink_logits + head * GROUP + row // NEW).to(tl.float32) * LOG2E
    factor, row_lse = close_softmax(top, total, sink_logit, HAS_SINK_LOGITS)
    tl.store(lse + program + tl.arange(0, 1), row_lse)
    target = ((head.to(tl.int64) * batch + sample) * ROWS + row) * HEAD_DIM + column
    tl.store(plain + target, sink_acc * factor, mask=within)
    tl.store(coded + target, acc * factor, mask=within)
