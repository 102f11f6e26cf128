"""The Triton prefill kernel: one program per work item (a tile of query rows of one head, or a share of its keys)."""

from __future__ import annotations

import triton
import triton.language as tl

from moa_kernels.device import LOG2E, MASKED, close_softmax, oldest_key, scores_of


@triton.jit
def _load_tile(states, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr):
    """Keys or values; ``mask`` says what to read where ``MASK``, else only which dimensions exist."""
    # Whole tiles are loaded without a mask.
    tile = tl.load(states, mask=mask, other=0.0) if MASK or BLOCK_D != HEAD_DIM else tl.load(states)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _accumulate(acc, total, top, scores, v, PRECISION: tl.constexpr):
    """A tile's scores, in units of log 2, into the running softmax: ``acc`` and ``total`` stand for ``2 ** top``."""
    # scores: [BLOCK_M, BLOCK_N], v: [BLOCK_N, BLOCK_D], acc: [BLOCK_M, BLOCK_D]
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.math.exp2(scores - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def _finish(acc, total, top, valid, sink_logits, head, HAS_SINK_LOGITS: tl.constexpr):
    """Output rows and their log-sum-exp; rows that aren't ``valid`` attend nothing."""
    logit = tl.load(sink_logits + head).to(tl.float32) * LOG2E if HAS_SINK_LOGITS else 0.0
    top, total = tl.where(valid, top, MASKED), tl.where(valid, total, 0.0)
    factor, lse = close_softmax(top, total, logit, HAS_SINK_LOGITS)
    return tl.where(valid[:, None], acc * factor[:, None], 0.0), lse


@triton.jit
def _valid(offs_t, start, end, num_queries, num_keys):
    """Whether rows are tokens of their sample."""
    row = num_keys - num_queries + offs_t
    return (offs_t < num_queries) & (row >= start) & (row < end)


@triton.jit
def prefill_kernel(
    query, key, value, output, lse, partial, totals, tops, work, spans, starts, ends, sink_logits,
    scale, sliding_window, num_queries, num_keys, num_heads,
    query_batch_stride, query_head_stride, query_token_stride,
    key_batch_stride, key_head_stride, key_token_stride,
    value_batch_stride, value_head_stride, value_token_stride,
    output_batch_stride, output_head_stride, output_token_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr,
    SPLIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``work`` is ``[items, 5]``: sample * heads + head, row tile, share, shares, workspace slot (-1 if unshared)."""
    # Which rows of which head, and what that head attends.
    item = work + tl.program_id(0) * 5
    sample_head = tl.load(item)
    block = tl.load(item + 1)
    sample = sample_head // num_heads
    head = sample_head % num_heads
    kv_head = head // GROUP
    sink = tl.load(spans + kv_head * 4)
    min_span = tl.load(spans + kv_head * 4 + 1)
    alpha = tl.load(spans + kv_head * 4 + 2)
    beta_256 = tl.load(spans + kv_head * 4 + 3)
    # Real keys of the sample: columns start to end - 1, of which those below 0 are elsewhere.
    start = tl.load(starts + sample).to(tl.int32) if HAS_STARTS else sample * 0
    end = tl.minimum(tl.load(ends + sample).to(tl.int32), num_keys) if HAS_ENDS else num_keys

    # Columns are indices of keys; a key's position is its column less start, which lies before the keys at hand
    # where earlier tokens are elsewhere.
    first = tl.maximum(start, 0)
    # Rows of the tile [BLOCK_M], by place in `query` (offs_t) and by column of their own key (row).
    offs_t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = _valid(offs_t, first, end, num_queries, num_keys)
    row = num_keys - num_queries + offs_t
    top_row = num_keys - num_queries + block * BLOCK_M
    row_first = tl.maximum(top_row, first)
    row_last = tl.minimum(top_row + BLOCK_M, end) - 1
    # Where windows start: of every row, and of the first and the last real one, which bound the others.
    oldest = start + oldest_key(tl.maximum(row, first) - start, sink, min_span, alpha, beta_256, sliding_window)
    oldest_first = start + oldest_key(row_first - start, sink, min_span, alpha, beta_256, sliding_window)
    oldest_last = start + oldest_key(row_last - start, sink, min_span, alpha, beta_256, sliding_window)
    sink_end = start + sink

    # Tiles of keys: those with sink tokens, then those of the window; within each, the ones that no mask cuts.
    # Nothing newer than the last row is read.
    alive = row_first <= row_last
    reach = row_last + 1
    # The model's own window may hide sink tokens from the first row on.
    sink_first = tl.maximum(first, row_first - sliding_window + 1)
    sink_from = sink_first // BLOCK_N
    sink_to = tl.maximum((tl.minimum(sink_end, reach) + BLOCK_N - 1) // BLOCK_N, sink_from)
    sink_to = tl.where(sink_end > sink_first, sink_to, sink_from)
    # Tiles of the window begin where the first row's does; none is visited twice.
    window_from = tl.maximum(tl.maximum(oldest_first, first) // BLOCK_N, sink_to)
    window_to = tl.maximum((reach + BLOCK_N - 1) // BLOCK_N, window_from)
    # Tiles before this one are seen by every row: the diagonal cuts none of them.
    causal = (row_first + 1) // BLOCK_N
    sink_last = tl.maximum(first, row_last - sliding_window + 1)
    sink_whole_from = tl.minimum((sink_last + BLOCK_N - 1) // BLOCK_N, sink_to)
    sink_whole_to = tl.maximum(tl.minimum(tl.maximum(sink_end, 0) // BLOCK_N, causal), sink_whole_from)
    sink_whole_to = tl.minimum(sink_whole_to, sink_to)
    whole_from = tl.maximum((tl.maximum(oldest_last, first) + BLOCK_N - 1) // BLOCK_N, window_from)
    whole_from = tl.minimum(whole_from, window_to)
    whole_to = tl.minimum(tl.maximum(causal, whole_from), window_to)
    # Whole tiles are counted through, sink first; cut ones from the diagonal outwards.
    sink_whole = sink_whole_to - sink_whole_from
    whole = sink_whole + whole_to - whole_from
    after_diagonal = window_to - whole_to
    after_edge = after_diagonal + whole_from - window_from
    after_sink = after_edge + sink_to - sink_whole_to
    cut = after_sink + sink_whole_from - sink_from
    cut_begin, cut_end = 0, tl.where(alive, cut, 0)
    whole_begin, whole_end = 0, tl.where(alive, whole, 0)
    if SPLIT:
        # This program's share of both kinds of tiles.
        share = tl.load(item + 2)
        shares = tl.load(item + 3)
        cut_begin, cut_end = cut_end * share // shares, cut_end * (share + 1) // shares
        whole_begin, whole_end = whole_end * share // shares, whole_end * (share + 1) // shares

    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    sample64 = sample.to(tl.int64)
    kv_head64 = kv_head.to(tl.int64)
    # Where this head's first tile of keys lies, transposed [BLOCK_D, BLOCK_N], and of values [BLOCK_N, BLOCK_D].
    key += sample64 * key_batch_stride + kv_head64 * key_head_stride
    value += sample64 * value_batch_stride + kv_head64 * value_head_stride
    key_tile = key + offs_d[:, None] + offs_n[None, :] * key_token_stride
    value_tile = value + offs_n[:, None] * value_token_stride + offs_d[None, :]
    query += sample64 * query_batch_stride + head.to(tl.int64) * query_head_stride
    q_mask = valid[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_M, BLOCK_D]
    q = tl.load(query + offs_t.to(tl.int64)[:, None] * query_token_stride + offs_d[None, :], mask=q_mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    # Running softmax of the rows.
    top = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # weighted sum of values

    real_d = offs_d < HEAD_DIM
    # Tiles that a mask cuts.
    for index in tl.range(cut_begin, cut_end, num_stages=STAGES):
        key_block = tl.where(
            index < after_diagonal,
            whole_to + index,
            tl.where(
                index < after_edge,
                window_from + index - after_diagonal,
                tl.where(index < after_sink, sink_whole_to + index - after_edge, sink_from + index - after_sink),
            ),
        )
        column = key_block * BLOCK_N + offs_n
        at = (key_block * BLOCK_N).to(tl.int64)
        # A key that no row may read can hold NaN, and 0 * NaN would reach the output.
        real = (column >= first) & (column < reach)
        key_mask, value_mask = real_d[:, None] & real[None, :], real[:, None] & real_d[None, :]
        k = _load_tile(key_tile + at * key_token_stride, key_mask, HEAD_DIM, BLOCK_D, True, UPCAST)
        v = _load_tile(value_tile + at * value_token_stride, value_mask, HEAD_DIM, BLOCK_D, True, UPCAST)
        scores = scores_of(tl.dot(q, k, input_precision=PRECISION), scale, SOFTCAP)
        # In the window, or in the sink as far as the model's own window reaches: [BLOCK_M, BLOCK_N].
        seen = (column[None, :] >= oldest[:, None]) | (
            (column < sink_end)[None, :] & (column[None, :] > row[:, None] - sliding_window)
        )
        scores = tl.where(seen & (column[None, :] <= row[:, None]) & real[None, :], scores, MASKED)
        acc, total, top = _accumulate(acc, total, top, scores, v, PRECISION)

    # The next tile's scores are computed while this one's softmax runs: their products keep the tensor cores busy.
    if whole_begin < whole_end:
        key_block = tl.where(whole_begin < sink_whole, sink_whole_from, whole_from - sink_whole) + whole_begin
        at = (key_block * BLOCK_N).to(tl.int64)
        k = _load_tile(key_tile + at * key_token_stride, real_d[:, None], HEAD_DIM, BLOCK_D, False, UPCAST)
        scores = tl.dot(q, k, input_precision=PRECISION)
        for index in tl.range(whole_begin, whole_end, num_stages=STAGES):
            following = tl.minimum(index + 1, whole_end - 1)
            next_block = tl.where(following < sink_whole, sink_whole_from, whole_from - sink_whole) + following
            next_at = (next_block * BLOCK_N).to(tl.int64)
            k = _load_tile(key_tile + next_at * key_token_stride, real_d[:, None], HEAD_DIM, BLOCK_D, False, UPCAST)
            next_scores = tl.dot(q, k, input_precision=PRECISION)
            v = _load_tile(value_tile + at * value_token_stride, real_d[None, :], HEAD_DIM, BLOCK_D, False, UPCAST)
            acc, total, top = _accumulate(acc, total, top, scores_of(scores, scale, SOFTCAP), v, PRECISION)
            scores = next_scores
            at = next_at

    if SPLIT:
        slot = tl.load(item + 4)
        if slot >= 0:
            # A share: `merge_kernel` will close the softmax.
            rows = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(partial + rows[:, None] * BLOCK_D + offs_d[None, :], acc)
            tl.store(totals + rows, total)
            tl.store(tops + rows, top)
            return
    result, row_lse = _finish(acc, total, top, valid, sink_logits, head, HAS_SINK_LOGITS)
    output += sample64 * output_batch_stride + head.to(tl.int64) * output_head_stride
    stored = (offs_t < num_queries)[:, None] & (offs_d < HEAD_DIM)[None, :]
    target = output + offs_t.to(tl.int64)[:, None] * output_token_stride + offs_d[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=stored)
    tl.store(lse + sample_head.to(tl.int64) * num_queries + offs_t, row_lse, mask=offs_t < num_queries)


@triton.jit
def merge_kernel(
    partial, totals, tops, output, lse, shared, starts, ends, sink_logits, num_queries, num_keys, num_heads,
    output_batch_stride, output_head_stride, output_token_stride,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """Shares of one row tile into its output, ``ROWS`` rows a program.

    ``shared`` is ``[tiles, 4]``: sample * heads + head, row tile, first workspace slot, shares.
    """
    item = shared + tl.program_id(0) * 4
    sample_head = tl.load(item)
    slot = tl.load(item + 2).to(tl.int64)
    shares = tl.load(item + 3)
    sample = sample_head // num_heads
    head = sample_head % num_heads
    start = tl.maximum(tl.load(starts + sample).to(tl.int32), 0) if HAS_STARTS else 0
    end = tl.minimum(tl.load(ends + sample).to(tl.int32), num_keys) if HAS_ENDS else num_keys
    within = tl.program_id(1) * ROWS
    offs_t = tl.load(item + 1) * BLOCK_M + within + tl.arange(0, ROWS)
    valid = _valid(offs_t, start, end, num_queries, num_keys)
    offs_d = tl.arange(0, BLOCK_D)
    # Shares in order, so that runs give equal bits.
    top = tl.full([ROWS], MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for share in range(0, shares):
        rows = (slot + share) * BLOCK_M + within + tl.arange(0, ROWS)
        share_top = tl.load(tops + rows)
        new_top = tl.maximum(top, share_top)
        old, new = tl.math.exp2(top - new_top), tl.math.exp2(share_top - new_top)
        acc = acc * old[:, None] + tl.load(partial + rows[:, None] * BLOCK_D + offs_d[None, :]) * new[:, None]
        total = total * old + tl.load(totals + rows) * new
        top = new_top
    result, row_lse = _finish(acc, total, top, valid, sink_logits, head, HAS_SINK_LOGITS)
    output += sample.to(tl.int64) * output_batch_stride + head.to(tl.int64) * output_head_stride
    stored = (offs_t < num_queries)[:, None] & (offs_d < HEAD_DIM)[None, :]
    target = output + offs_t.to(tl.int64)[:, None] * output_token_stride + offs_d[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=stored)
    tl.store(lse + sample_head.to(tl.int64) * num_queries + offs_t, row_lse, mask=offs_t < num_queries)
