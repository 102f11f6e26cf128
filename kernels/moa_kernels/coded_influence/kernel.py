"""What rows gain when they see every key, under several codecs at once, in Triton.

A program takes a tile of query rows of one head and walks over the keys, tile by tile, and at every tile over pairs of
a key codec and a value codec, the plain ones first. So each step takes two products, ``Q K^T`` and ``dO V^T``, and two
tiles of shared memory, as in `moa_kernels.influence.kernel`; the plain tile's attention and gains stay in registers and
serve all codecs of the other side.

Running sums, and the largest scores that they are relative to, are kept per pair and per thread of a row (see
`moa_kernels.device.lane_sums`); threads of a row meet once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa_kernels.device import LOG2E, MASKED, product, rows_of, soft_cap

LOWEST = tl.constexpr(-1.0e20)
"""Largest score of no key: above `MASKED`, so that hidden keys weigh nothing beside it, and below any other."""


@triton.jit
def coded_rows_kernel(
    query, keys, values, grad_out, sink_logits, rows,
    n, num_heads, group, scale, skipped, key_codecs, value_codecs,
    query_head_stride, query_token_stride, keys_codec_stride, keys_head_stride, keys_token_stride,
    values_codec_stride, values_head_stride, values_token_stride, grad_head_stride, grad_token_stride,
    SOFTCAP: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, PADDED: tl.constexpr, LANES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Shift, share, and ``D_i`` by coded keys and by coded values, of every row and pair: ``rows[PAIRS, heads, 4, n]``.

    Pair 0 is plain, pair c has the codecs ``skipped + c`` of both sides, or the last where a side has fewer. PADDED is
    a power of two, at least PAIRS.
    """
    # Last rows first: they have most keys. Query heads of a KV head at the same time, to share its keys in the cache.
    tile = tl.cdiv(n, BLOCK_M) - 1 - tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    own, shared = head.to(tl.int64), (head // group).to(tl.int64)
    i0 = tile * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    q = rows_of(query + own * query_head_stride, i0, n, query_token_stride, HEAD_DIM, BLOCK_D, BLOCK_M)
    grad = rows_of(grad_out + own * grad_head_stride, i0, n, grad_token_stride, HEAD_DIM, BLOCK_D, BLOCK_M)
    head_keys, head_values = keys + shared * keys_head_stride, values + shared * values_head_stride
    unit = LOG2E if SOFTCAP > 0 else scale * LOG2E  # of scores, in powers of two
    # By row, pair and thread of the row.
    pair = tl.arange(0, PADDED)[None, :, None]
    top = tl.full([BLOCK_M, PADDED, LANES], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M, PADDED, LANES], tl.float32)
    by_key = tl.zeros([BLOCK_M, PADDED, LANES], tl.float32)
    by_value = tl.zeros([BLOCK_M, PADDED, LANES], tl.float32)
    # The plain tile's, with columns as in `lane_sums`: [row, part, thread, 2].
    PARTS: tl.constexpr = BLOCK_N // (2 * LANES)
    attention = tl.zeros([BLOCK_M, PARTS, LANES, 2], tl.float32)
    gain = tl.zeros([BLOCK_M, PARTS, LANES, 2], tl.float32)
    for step in tl.range(0, tl.cdiv(tl.minimum(i0 + BLOCK_M, n), BLOCK_N) * PAIRS):
        c = step % PAIRS
        first = step // PAIRS * BLOCK_N
        codec = tl.where(c == 0, 0, skipped + c)
        key = head_keys + tl.minimum(codec, key_codecs).to(tl.int64) * keys_codec_stride
        value = head_values + tl.minimum(codec, value_codecs).to(tl.int64) * values_codec_stride
        k = rows_of(key, first, n, keys_token_stride, HEAD_DIM, BLOCK_D, BLOCK_N)
        v = rows_of(value, first, n, values_token_stride, HEAD_DIM, BLOCK_D, BLOCK_N)
        score, coded_gain = product(q, k, UPCAST), product(grad, v, UPCAST)
        coded_gain = tl.reshape(coded_gain, [BLOCK_M, PARTS, LANES, 2])
        if SOFTCAP > 0:
            score = soft_cap(score * scale, SOFTCAP)
        if first + BLOCK_N > i0:
            score = tl.where((first + tl.arange(0, BLOCK_N))[None, :] <= i[:, None], score, MASKED)
        score = tl.reshape(score, [BLOCK_M, PARTS, LANES, 2])
        # Online softmax: what was summed so far is scaled to the new maximum.
        before = tl.max(tl.where(pair == c, top, LOWEST), 1)
        larger = tl.maximum(before, tl.max(tl.max(score, 3), 1))
        coded_attention = tl.math.exp2(score * unit - (larger * unit)[:, None, :, None])
        decay = tl.math.exp2((before - larger) * unit)[:, None, :]
        attention, gain = tl.where(c == 0, coded_attention, attention), tl.where(c == 0, coded_gain, gain)
        mass = tl.sum(tl.sum(coded_attention, 3), 1)[:, None, :]
        key_gain = tl.sum(tl.sum(coded_attention * gain, 3), 1)[:, None, :]
        value_gain = tl.sum(tl.sum(attention * coded_gain, 3), 1)[:, None, :]
        top = tl.where(pair == c, larger[:, None, :], top)
        own_decay = tl.where(pair == c, decay, 1.0)
        total = total * own_decay + tl.where(pair == c, mass, 0.0)
        by_key = by_key * own_decay + tl.where(pair == c, key_gain, 0.0)
        # All value codecs go with plain keys.
        by_value = by_value * tl.where(c == 0, decay, 1.0) + tl.where(pair == c, value_gain, 0.0)
    # Threads of a row: [row, pair].
    highest = tl.max(top, 2) * unit
    if HAS_SINK_LOGITS:
        logit = tl.load(sink_logits + head) * LOG2E
        highest = tl.maximum(highest, logit)
    factor = tl.math.exp2(top * unit - highest[:, :, None])
    totals = tl.sum(total * factor, 2)
    if HAS_SINK_LOGITS:
        totals += tl.math.exp2(logit - highest)
    plain = tl.arange(0, PADDED)[None, :] == 0
    plain_factor = tl.sum(tl.where(pair == 0, factor, 0.0), 1)
    plain_total = tl.sum(tl.where(plain, totals, 0.0), 1)
    # Attention is exp2(score - shift) * share; D_i is the gain's mean under it.
    c = tl.arange(0, PADDED)[None, :]
    place = rows + (c * num_heads + own) * 4 * n + i[:, None]
    there = (i[:, None] < n) & (c < PAIRS)
    totals = tl.where(c < PAIRS, totals, 1.0)
    tl.store(place, highest, mask=there)
    tl.store(place + n, 1.0 / totals, mask=there)
    tl.store(place + 2 * n, tl.sum(by_key * factor, 2) / totals, mask=there)
    tl.store(place + 3 * n, tl.sum(by_value * plain_factor[:, None, :], 2) / plain_total[:, None], mask=there)
