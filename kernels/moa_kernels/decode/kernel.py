"""Decode attention in Triton: even tiles of keys on a fixed grid, then a merge.

The grid depends on the batch and the device alone. Every program of `split_kernel` plans for itself, from ``lens``:
it counts the keys in reach of each (sample, KV head), a *pair*, cuts them into tiles of one size such that all pairs
together make about ``TARGET_TILES``, and finds the tile that is its own. Keys are walked by position (visible sink
tokens, then the window), not by slot: spare and stale slots cost nothing and tiles hold equally many visible keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa_kernels.device import LOG2E, MASKED, close_softmax, oldest_key, scores_of


@triton.jit
def _in_reach(length, sink, capacity, min_span, alpha, beta_256, sliding_window, NEW: tl.constexpr):
    """Positions that any of the NEW last rows of a sample attends, as two ranges.

    A row's window never starts before its predecessor's, and each row attends itself: all rows together attend what
    the first one does, and all that follows.

    Returns:
        First sink position, number of sink positions, first ring position, number of ring positions.
    """
    # The oldest of the new tokens reaches farthest back.
    row = tl.maximum(length - NEW, 0)
    sunk_from = tl.maximum(row + 1 - sliding_window, 0)
    sunk = tl.maximum(tl.minimum(tl.minimum(sink, capacity), length) - sunk_from, 0)
    window_from = tl.maximum(oldest_key(row, sink, min_span, alpha, beta_256, sliding_window), sink)
    ring_from = tl.maximum(window_from, length - (capacity - sink))
    return sunk_from, sunk, ring_from, tl.maximum(length - ring_from, 0)


@triton.jit
def _rules(layout, spans, head, mask):
    """Sink, capacity, min_span, alpha and beta_256 of heads."""
    sink = tl.load(layout + head * 3 + 1, mask=mask, other=0)
    capacity = tl.load(layout + head * 3 + 2, mask=mask, other=0)
    min_span = tl.load(spans + head * 4 + 1, mask=mask, other=1)
    alpha = tl.load(spans + head * 4 + 2, mask=mask, other=0)
    beta_256 = tl.load(spans + head * 4 + 3, mask=mask, other=0)
    return sink, capacity, min_span, alpha, beta_256


@triton.jit
def _planned_reach(
    lens, layout, spans, start, pairs, num_kv_heads, sliding_window, NEW: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Keys in reach of pairs ``start`` to ``start + BLOCK_P``, 0 for those that don't exist."""
    # A pair is a sample and a KV head.
    pair = start + tl.arange(0, BLOCK_P)
    known = pair < pairs
    length = tl.load(lens + pair // num_kv_heads, mask=known, other=0).to(tl.int32)
    sink, capacity, min_span, alpha, beta_256 = _rules(layout, spans, pair % num_kv_heads, known)
    _, sunk, _, ringed = _in_reach(length, sink, capacity, min_span, alpha, beta_256, sliding_window, NEW)
    return sunk + ringed


@triton.jit
def split_kernel(
    query, keys, values, lens, layout, spans, sink_logits, output, lse, partial, tops, totals, ends,
    scale, sliding_window, pairs, num_kv_heads,
    query_batch_stride, query_head_stride, query_token_stride,
    keys_batch_stride, keys_slot_stride, values_batch_stride, values_slot_stride,
    TARGET_TILES: tl.constexpr, PLANS: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr, NEW: tl.constexpr,
    HEAD_DIM: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys of a pair, and per BLOCK_M of its rows (query heads by new tokens).

    Writes partial results, or, for a pair of one tile, the final ones; and where each pair's tiles end.
    """
    tile = tl.program_id(0)
    ROWS: tl.constexpr = GROUP * NEW

    # The plan, the same in every program: first the size of tiles, then where each pair's tiles end.
    # Keys in reach of all pairs; so many to a tile that TARGET_TILES hold them, in whole blocks.
    everything = tl.zeros([], tl.int64)
    for start in tl.range(0, PLANS * BLOCK_P, BLOCK_P):
        reach = _planned_reach(lens, layout, spans, start, pairs, num_kv_heads, sliding_window, NEW, BLOCK_P)
        everything += tl.sum(reach.to(tl.int64))
    chunk = (tl.cdiv(tl.cdiv(everything, TARGET_TILES), BLOCK_N) * BLOCK_N).to(tl.int32)
    chunk = tl.maximum(chunk, BLOCK_N)
    # Pairs whose tiles end before this one: how many (its own number), and where the last of them ends.
    planned = tl.zeros([], tl.int32)
    mine = tl.zeros([], tl.int32)
    first_tile = tl.zeros([], tl.int32)
    for start in tl.range(0, PLANS * BLOCK_P, BLOCK_P):
        reach = _planned_reach(lens, layout, spans, start, pairs, num_kv_heads, sliding_window, NEW, BLOCK_P)
        tiles = tl.cdiv(reach, chunk)
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
    offset = tl.load(layout + head * 3)
    sink, capacity, min_span, alpha, beta_256 = _rules(layout, spans, head, True)
    sunk_from, sunk, ring_from, ringed = _in_reach(
        length, sink, capacity, min_span, alpha, beta_256, sliding_window, NEW
    )
    # Keys low to high - 1 in reach are this program's, counted from the first sink token on.
    ring = tl.maximum(capacity - sink, 1)
    ring_slot = (ring_from - sink) % ring
    low = (tile - first_tile) * chunk
    high = tl.where(live, tl.minimum(low + chunk, sunk + ringed), low)

    # Rows [BLOCK_M]: new tokens of one query head after the other.
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_head = head * GROUP + row // NEW
    row_at = length - NEW + row % NEW
    real = row < tl.where(live, ROWS, 0)
    column = tl.arange(0, BLOCK_D)
    within = column < HEAD_DIM
    q = tl.load(
        query + batch * query_batch_stride + query_head.to(tl.int64)[:, None] * query_head_stride
        + (row % NEW)[:, None] * query_token_stride + column[None, :],
        mask=real[:, None] & within[None, :], other=0.0,
    )  # fmt: skip
    if UPCAST:
        q = q.to(tl.float32)
    oldest = oldest_key(row_at, sink, min_span, alpha, beta_256, sliding_window)

    # First slot of this head.
    key_base = keys + batch * keys_batch_stride + offset.to(tl.int64) * keys_slot_stride
    value_base = values + batch * values_batch_stride + offset.to(tl.int64) * values_slot_stride
    top = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(low, high, BLOCK_N):
        # From the place in reach to the slot: sink tokens as they lie, then around the ring.
        index = start + tl.arange(0, BLOCK_N)
        there = index < high
        sunken = index < sunk
        later = index - sunk
        wrapped = ring_slot + later
        wrapped = tl.where(wrapped >= ring, wrapped - ring, wrapped)
        slot = tl.where(sunken, sunk_from + index, sink + wrapped).to(tl.int64)
        # What isn't in reach may be NaN, and 0 * NaN is NaN: it isn't loaded at all.
        k = tl.load(
            key_base + slot[None, :] * keys_slot_stride + column[:, None],
            mask=there[None, :] & within[:, None], other=0.0,
        )  # fmt: skip
        v = tl.load(
            value_base + slot[:, None] * values_slot_stride + column[None, :],
            mask=there[:, None] & within[None, :], other=0.0,
        )  # fmt: skip
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        # [BLOCK_M, BLOCK_N]
        scores = scores_of(tl.dot(q, k, input_precision="ieee"), scale, SOFTCAP)
        visible = there[None, :]
        if NEW > 1:
            # One new token sees all in reach; of several, each has its own window and its own past.
            at = tl.where(sunken, sunk_from + index, ring_from + later)[None, :]
            near = (at >= oldest[:, None]) | ((at < sink) & (at > row_at[:, None] - sliding_window))
            visible = visible & near & (at <= row_at[:, None])
        scores = tl.where(visible, scores, MASKED)
        higher = tl.maximum(top, tl.max(scores, 1))
        # Again, since a row that has seen no key yet has its maximum at MASKED.
        p = tl.where(visible, tl.math.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.math.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher

    # Final results, or what `merge_kernel` puts together.
    written = real[:, None] & within[None, :]
    if sunk + ringed <= chunk:  # the pair's only tile
        sink_logit = top
        if HAS_SINK_LOGITS:
            sink_logit = tl.load(sink_logits + query_head, mask=real, other=0.0).to(tl.float32) * LOG2E
        factor, row_lse = close_softmax(top, total, sink_logit, HAS_SINK_LOGITS)
        result = mine.to(tl.int64) * ROWS + row
        tl.store(lse + result, row_lse, mask=real)
        tl.store(
            output + result[:, None] * HEAD_DIM + column[None, :],
            (acc * factor[:, None]).to(output.dtype.element_ty), mask=written,
        )  # fmt: skip
    else:
        result = tile.to(tl.int64) * ROWS + row
        tl.store(tops + result, top, mask=real)
        tl.store(totals + result, total, mask=real)
        tl.store(partial + result[:, None] * HEAD_DIM + column[None, :], acc, mask=written)


@triton.jit
def merge_kernel(
    partial, tops, totals, ends, sink_logits, output, lse, num_kv_heads,
    ROWS: tl.constexpr, NEW: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per row of a pair: the partial results of its tiles, always in the same order."""
    program = tl.program_id(0)
    pair = program // ROWS
    row = program % ROWS
    # Tiles of the pair; a single one has written its result itself.
    first = tl.load(ends + pair - 1, mask=pair > 0, other=0)
    end = tl.load(ends + pair)
    if end - first == 1:
        return
    column = tl.arange(0, BLOCK_D)
    within = column < HEAD_DIM
    # Vectors of one element: scalars carried through a loop differ between versions of Triton.
    top = tl.full([1], MASKED, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(first, end, BLOCK_T):
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
        top = higher
    sink_logit = top
    if HAS_SINK_LOGITS:
        sink_logit = tl.load(sink_logits + pair % num_kv_heads * (ROWS // NEW) + row // NEW).to(tl.float32) * LOG2E
    factor, row_lse = close_softmax(top, total, sink_logit, HAS_SINK_LOGITS)
    result = program.to(tl.int64)
    tl.store(lse + result + tl.arange(0, 1), row_lse)
    tl.store(output + result * HEAD_DIM + column, (acc * factor).to(output.dtype.element_ty), mask=within)
