"""The profiling pass in Triton: every candidate window of every row, while keys stream by from near to far.

A program takes a tile of query rows of one head, first adds up the sink keys and then walks away from the diagonal.
Two products per tile of keys, ``Q K^T`` and ``dO V^T``, and three running sums per row: attention, attention times
``g``, and the single-entry effects since the last window. Where a row passes the end of a window, the first two say
what that window costs. Each sum over some rows has its own place in a buffer and is added up in float64 in a fixed
order: results are the same from run to run.

Attention is ``share_i * exp2(score_ij - shift_i)``, with scores in powers of two. Where ``shift`` is the row's largest
score, that is right to the last bits near 1; ``exp2(score - lse)`` would carry the rounding of ``lse``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa_kernels.device import LOG2E, MASKED, lane_sums, product, rows_of, scores_of
from moa_kernels.influence.reference import SMALLEST_COMPLEMENT, STATISTICS

EPSILON = tl.constexpr(SMALLEST_COMPLEMENT)

TINY = tl.constexpr(1.1754943508222875e-38)
"""Least normal number: what divides where all kept attention is below it."""

COUNT = tl.constexpr(len(STATISTICS))


@triton.jit
def _effect(attention, weighted, row_gain, share):
    """Single-entry effects ``|A (g - D) / (1 - A)|`` over ``share``, from ``A`` and ``A g``, both over ``share``."""
    # One rsqrt and two products are cheaper than a division.
    root = tl.math.rsqrt(tl.maximum(1.0 - attention * share[:, None], EPSILON))
    return tl.abs(weighted - attention * row_gain[:, None]) * (root * root)


@triton.jit
def _by_group(x, GROUPS: tl.constexpr):
    """Sums over consecutive rows, ``[GROUPS]``."""
    return tl.sum(tl.reshape(x, [GROUPS, x.shape[0] // GROUPS]), 1)


@triton.jit
def _store(place, bands, mask, delta, effect, recall, GROUPS: tl.constexpr):
    """Write `STATISTICS` of one window, summed over the rows of each group."""
    tl.store(place, _by_group(delta * delta, GROUPS), mask=mask)
    tl.store(place + bands, _by_group(delta, GROUPS), mask=mask)
    tl.store(place + 2 * bands, _by_group(tl.abs(delta), GROUPS), mask=mask)
    tl.store(place + 3 * bands, _by_group(effect, GROUPS), mask=mask)
    tl.store(place + 4 * bands, _by_group(recall, GROUPS), mask=mask)


@triton.jit
def row_statistics_kernel(
    query, key, value, grad_out, sink_logits, rows, n, num_heads, group, scale,
    query_head_stride, query_token_stride, key_head_stride, key_token_stride,
    value_head_stride, value_token_stride, grad_head_stride, grad_token_stride,
    SOFTCAP: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Shift, share and ``D_i`` of every row into ``rows[heads, 3, n]``, by online softmax."""
    # Last rows first: they have most keys.
    tile = tl.cdiv(n, BLOCK_M) - 1 - tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    own, shared = head.to(tl.int64), (head // group).to(tl.int64)
    i0 = tile * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    q = rows_of(query + own * query_head_stride, i0, n, query_token_stride, HEAD_DIM, BLOCK_D, BLOCK_M)
    grad = rows_of(grad_out + own * grad_head_stride, i0, n, grad_token_stride, HEAD_DIM, BLOCK_D, BLOCK_M)
    if HAS_SINK_LOGITS:
        shift = tl.zeros([BLOCK_M], tl.float32) + tl.load(sink_logits + head) * LOG2E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        shift = tl.full([BLOCK_M], MASKED, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, tl.minimum(i0 + BLOCK_M, n), BLOCK_N):
        k = rows_of(key + shared * key_head_stride, first, n, key_token_stride, HEAD_DIM, BLOCK_D, BLOCK_N)
        v = rows_of(value + shared * value_head_stride, first, n, value_token_stride, HEAD_DIM, BLOCK_D, BLOCK_N)
        # Scores and gains g_ij: [BLOCK_M, BLOCK_N].
        score = scores_of(product(q, k, UPCAST), scale, SOFTCAP)
        gain = product(grad, v, UPCAST)
        if first + BLOCK_N > i0:
            score = tl.where((first + tl.arange(0, BLOCK_N))[None, :] <= i[:, None], score, MASKED)
        # Online softmax: what was summed so far is scaled to the new maximum.
        larger = tl.maximum(shift, tl.max(score, 1))
        attention = tl.math.exp2(score - larger[:, None])
        decay = tl.math.exp2(shift - larger)
        total = total * decay + tl.sum(attention, 1)
        weighted = weighted * decay + tl.sum(attention * gain, 1)
        shift = larger
    # Attention is exp2(score - shift) * share; D_i is the gain's mean under it.
    place = rows + own * 3 * n + i
    tl.store(place, shift, mask=i < n)
    tl.store(place + n, 1.0 / total, mask=i < n)
    tl.store(place + 2 * n, weighted / total, mask=i < n)


@triton.jit
def _own_rows(n, num_heads, bucket_rows, bucket_tiles, tiles, BLOCK_M: tl.constexpr):
    """This program's tile and head, the tile's first row, and the row after its bucket's last.

    Long rows first; the query heads of a KV head at the same time, to share its keys in the cache.
    """
    tile = tiles - 1 - tl.program_id(0) // num_heads
    bucket = tile // bucket_tiles
    i0 = bucket * bucket_rows + (tile % bucket_tiles) * BLOCK_M
    return tile, tl.program_id(0) % num_heads, i0, tl.minimum((bucket + 1) * bucket_rows, n)


@triton.jit
def _row_tile(
    query, grad_out, rows, head, i0, stop, n,
    query_head_stride, query_token_stride, grad_head_stride, grad_token_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile's queries, gradients, shift, share and ``D_i``.

    Rows from ``stop`` on are all zeros, and so is all that they add to a statistic.
    """
    own = head.to(tl.int64)
    q = rows_of(query + own * query_head_stride, i0, stop, query_token_stride, HEAD_DIM, BLOCK_D, BLOCK_M)
    grad = rows_of(grad_out + own * grad_head_stride, i0, stop, grad_token_stride, HEAD_DIM, BLOCK_D, BLOCK_M)
    i = i0 + tl.arange(0, BLOCK_M)
    place = rows + own * 3 * n + i
    shift = tl.load(place, mask=i < stop, other=0.0)
    share = tl.load(place + n, mask=i < stop, other=0.0)
    row_gain = tl.load(place + 2 * n, mask=i < stop, other=0.0)
    return q, grad, shift, share, row_gain


@triton.jit
def _sunk(
    q, grad, shift, head_key, head_value, sink_logits, head, i, last, n, sink, scale,
    key_token_stride, value_token_stride,
    SOFTCAP: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention and gain of what is always kept, each ``[row, LANES]``: the sink keys and the sink logit."""
    mass = tl.zeros([i.shape[0], LANES], tl.float32)
    if HAS_SINK_LOGITS:
        # In equal parts. No row's shift is below the logit, save that of rows which aren't there.
        mass += tl.math.exp2(tl.minimum(tl.load(sink_logits + head) * LOG2E - shift, 0.0))[:, None] * (1.0 / LANES)
    gained = tl.zeros([i.shape[0], LANES], tl.float32)
    # Few keys: a pipeline wouldn't pay for its registers.
    for first in tl.range(0, tl.minimum(sink, last + 1), BLOCK_N, num_stages=1):
        k = rows_of(head_key, first, n, key_token_stride, HEAD_DIM, BLOCK_D, BLOCK_N)
        v = rows_of(head_value, first, n, value_token_stride, HEAD_DIM, BLOCK_D, BLOCK_N)
        score = scores_of(product(q, k, UPCAST), scale, SOFTCAP)
        gain = product(grad, v, UPCAST)
        j = (first + tl.arange(0, BLOCK_N))[None, :]
        attention = tl.where((j < sink) & (j <= i[:, None]), tl.math.exp2(score - shift[:, None]), 0.0)
        mass += lane_sums(attention, LANES)
        gained += lane_sums(attention * gain, LANES)
    return mass, gained


@triton.jit
def aligned_kernel(
    query, key, value, grad_out, sink_logits, rows, moved, passed, following, partial,
    n, num_heads, group, sink, scale, bucket_rows, bucket_tiles, tiles, bands,
    query_head_stride, query_token_stride, key_head_stride, key_token_stride,
    value_head_stride, value_token_stride, grad_head_stride, grad_token_stride,
    SOFTCAP: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr, HAS_MOVED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Statistics for windows that are multiples of BLOCK_N, which lets every pair of tiles be visited once.

    Tiles of keys are aligned to the tile of rows: number t holds the keys ``i0 + BLOCK_M - (t + 1) * BLOCK_N`` and
    on. Row ``r = BLOCK_N * g + rr`` is ``m * BLOCK_N + rr - column`` away from them, with ``m = t + g + 1 - GROUPS``.
    So it passes the end of window ``m * BLOCK_N`` within this very tile, the same for all rows of group g: columns
    above ``rr`` are nearer than it, the others farther.

    ``passed[t + g]`` is the number of windows below ``m * BLOCK_N``, ``following[t]`` the first tile from t on that a
    window ends in or that the diagonal crosses. ``partial[heads, tiles, GROUPS, COUNT, bands]``
    must hold zeros; its last band is what lies beyond the last window. Recall is that of rows which don't keep
    everything, the weight of the sink logit included. ``moved[heads, n]`` is added to delta.
    """
    GROUPS: tl.constexpr = BLOCK_M // BLOCK_N
    tile, head, i0, stop = _own_rows(n, num_heads, bucket_rows, bucket_tiles, tiles, BLOCK_M)
    if i0 >= stop:
        return
    last = tl.minimum(i0 + BLOCK_M, stop) - 1
    r, column, g = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)[None, :], tl.arange(0, GROUPS)
    i = i0 + r
    near = column > (r % BLOCK_N)[:, None]
    q, grad, shift, share, row_gain = _row_tile(
        query, grad_out, rows, head, i0, stop, n,
        query_head_stride, query_token_stride, grad_head_stride, grad_token_stride,
        HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    shared = (head // group).to(tl.int64)
    head_key, head_value = key + shared * key_head_stride, value + shared * value_head_stride
    mass, gained = _sunk(
        q, grad, shift, head_key, head_value, sink_logits, head, i, last, n, sink, scale,
        key_token_stride, value_token_stride,
        SOFTCAP, HAS_SINK_LOGITS, HEAD_DIM, BLOCK_D, BLOCK_N, LANES, UPCAST,
    )  # fmt: skip
    # Running sums of the rows: attention and gain since the sink, effects since the last window.
    effects = tl.zeros([BLOCK_M, LANES], tl.float32)
    place = partial + ((head * tiles + tile).to(tl.int64) * GROUPS + g) * COUNT * bands
    # Tiles of keys from the diagonal to the sink; those before `masked` need no masks.
    key_tiles = tl.maximum(tl.cdiv(i0 + BLOCK_M - sink, BLOCK_N), 0)
    sunk = (i0 + BLOCK_M - sink) // BLOCK_N
    nearest = (i0 + BLOCK_M - 1 - last) // BLOCK_N
    masked = nearest
    for t in tl.range(nearest, key_tiles):
        # The t-th tile from the diagonal, [BLOCK_N, BLOCK_D].
        first = i0 + (BLOCK_M - BLOCK_N) - t * BLOCK_N
        k = rows_of(head_key, first, n, key_token_stride, HEAD_DIM, BLOCK_D, BLOCK_N)
        v = rows_of(head_value, first, n, value_token_stride, HEAD_DIM, BLOCK_D, BLOCK_N)
        score = scores_of(product(q, k, UPCAST), scale, SOFTCAP)
        gain = product(grad, v, UPCAST)
        attention = tl.math.exp2(score - shift[:, None])
        # Triton 3.6 fails to compile branches that read a product of the matrix units itself.
        weighted = attention * gain
        if t == masked:
            masked = tl.maximum(t + 1, tl.minimum(tl.load(following + t + 1), sunk))
            # Sink keys were counted before.
            seen = (first + column <= i[:, None]) & (first + column >= sink)
            attention, weighted = tl.where(seen, attention, 0.0), tl.where(seen, weighted, 0.0)
            effect = _effect(attention, weighted, row_gain, share)
            # Both parts at once, so that the tile's registers are free for what follows.
            mass += lane_sums(tl.where(near, attention, 0.0), LANES)
            gained += lane_sums(tl.where(near, weighted, 0.0), LANES)
            effects += lane_sums(tl.where(near, effect, 0.0), LANES)
            far_mass = lane_sums(tl.where(near, 0.0, attention), LANES)
            far_gained = lane_sums(tl.where(near, 0.0, weighted), LANES)
            far_effects = lane_sums(tl.where(near, 0.0, effect), LANES)
            # Rows whose window reaches into the sink keep everything.
            cut = i0 + (GROUPS - 1 - t) * BLOCK_N + r % BLOCK_N >= sink
            row_mass = tl.sum(mass, 1)
            delta = tl.where(cut, tl.sum(gained, 1) / tl.maximum(row_mass, TINY) - row_gain, 0.0)
            if HAS_MOVED:
                delta += tl.load(moved + head.to(tl.int64) * n + i, mask=cut & (i < stop), other=0.0)
            recall = tl.where(cut, row_mass * share, 0.0)
            # Groups for which a window ends in this tile write what it costs.
            window = tl.load(passed + t + g)
            passing = tl.load(passed + t + g + 1) > window
            _store(place + window, bands, passing, delta, tl.sum(effects, 1) * share, recall, GROUPS)
            passing_row = tl.load(passed + t + r // BLOCK_N + 1) > tl.load(passed + t + r // BLOCK_N)
            # Then the farther part, which belongs to the next window.
            mass += far_mass
            gained += far_gained
            effects = tl.where(passing_row[:, None], 0.0, effects) + far_effects
        else:
            mass += lane_sums(attention, LANES)
            gained += lane_sums(weighted, LANES)
            effects += lane_sums(_effect(attention, weighted, row_gain, share), LANES)
    # What no window but the whole keeps.
    beyond = _by_group(tl.sum(effects, 1) * share, GROUPS)
    tl.store(place + 3 * bands + tl.load(passed + key_tiles + g), beyond)


@triton.jit
def banded_kernel(
    query, key, value, grad_out, sink_logits, rows, moved, windows, partial,
    n, num_heads, group, sink, scale, bucket_rows, bucket_tiles, tiles, bands,
    query_head_stride, query_token_stride, key_head_stride, key_token_stride,
    value_head_stride, value_token_stride, grad_head_stride, grad_token_stride,
    SOFTCAP: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr, HAS_MOVED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Statistics for any windows, band of distances by band: tiles that windows end in are visited on both sides.

    ``windows`` ends with one more, larger than any distance. ``partial[heads, tiles, 1, COUNT, bands]`` must hold
    zeros; its last band is what lies beyond the last window. Recall and ``moved`` are as in `aligned_kernel`.
    """
    tile, head, i0, stop = _own_rows(n, num_heads, bucket_rows, bucket_tiles, tiles, BLOCK_M)
    if i0 >= stop:
        return
    last = tl.minimum(i0 + BLOCK_M, stop) - 1
    i = i0 + tl.arange(0, BLOCK_M)
    q, grad, shift, share, row_gain = _row_tile(
        query, grad_out, rows, head, i0, stop, n,
        query_head_stride, query_token_stride, grad_head_stride, grad_token_stride,
        HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    shared = (head // group).to(tl.int64)
    head_key, head_value = key + shared * key_head_stride, value + shared * value_head_stride
    mass, gained = _sunk(
        q, grad, shift, head_key, head_value, sink_logits, head, i, last, n, sink, scale,
        key_token_stride, value_token_stride,
        SOFTCAP, HAS_SINK_LOGITS, HEAD_DIM, BLOCK_D, BLOCK_N, LANES, UPCAST,
    )  # fmt: skip
    place = partial + (head * tiles + tile).to(tl.int64) * COUNT * bands + tl.arange(0, 1)
    # Bands of distances, from the diagonal outwards.
    nearest = 0
    for band in range(bands):
        window = tl.load(windows + band)
        effects = tl.zeros([BLOCK_M, LANES], tl.float32)
        for first in tl.range(tl.maximum(i0 - window + 1, sink), last - nearest + 1, BLOCK_N):
            k = rows_of(head_key, first, n, key_token_stride, HEAD_DIM, BLOCK_D, BLOCK_N)
            v = rows_of(head_value, first, n, value_token_stride, HEAD_DIM, BLOCK_D, BLOCK_N)
            score = scores_of(product(q, k, UPCAST), scale, SOFTCAP)
            gain = product(grad, v, UPCAST)
            # Other bands' keys in these tiles don't count here.
            distance = i[:, None] - (first + tl.arange(0, BLOCK_N))[None, :]
            within = (distance >= nearest) & (distance < window)
            attention = tl.where(within, tl.math.exp2(score - shift[:, None]), 0.0)
            weighted = attention * gain
            mass += lane_sums(attention, LANES)
            gained += lane_sums(weighted, LANES)
            effects += lane_sums(_effect(attention, weighted, row_gain, share), LANES)
        # Rows whose window reaches into the sink keep everything; no window ends beyond the last.
        cut = i - window >= sink
        row_mass = tl.sum(mass, 1)
        delta = tl.where(cut, tl.sum(gained, 1) / tl.maximum(row_mass, TINY) - row_gain, 0.0)
        if HAS_MOVED:
            delta += tl.load(moved + head.to(tl.int64) * n + i, mask=cut & (i < stop), other=0.0)
        recall = tl.where(cut, row_mass * share, 0.0)
        _store(place + band, bands, tl.arange(0, 1) == 0, delta, tl.sum(effects, 1) * share, recall, 1)
        nearest = window
