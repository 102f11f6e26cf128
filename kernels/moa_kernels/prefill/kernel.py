"""The Triton prefill kernel: one program per work item (a tile of query rows of one head, or a share of its keys)."""

from __future__ import annotations

import triton
import triton.language as tl

from moa_kernels.device import LOG2E, MASKED, close_softmax, oldest_key, scores_of

__all__ = ["merge_kernel", "prefill_kernel"]


@triton.jit
def _load_tile(states, mask, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr):
    """Keys or values; ``mask`` says what to read where ``MASK``, else only which dimensions exist."""
    tile = tl.load(states, mask=mask, other=0.0) if MASK or BLOCK_D != DIM else tl.load(states)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _accumulate(acc, total, top, scores, v, PRECISION: tl.constexpr):
    """A tile's scores, in units of log 2, into the running softmax: ``acc`` and ``total`` stand for ``2 ** top``."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.math.exp2(scores - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def _finish(acc, total, top, valid, Logits, head, HAS_LOGITS: tl.constexpr):
    """Output rows and their log-sum-exp; rows that aren't ``valid`` attend nothing."""
    logit = tl.load(Logits + head).to(tl.float32) * LOG2E if HAS_LOGITS else 0.0
    top, total = tl.where(valid, top, MASKED), tl.where(valid, total, 0.0)
    factor, lse = close_softmax(top, total, logit, HAS_LOGITS)
    return tl.where(valid[:, None], acc * factor[:, None], 0.0), lse


@triton.jit
def _valid(offs_t, start, end, queries, keys):
    """Whether rows are tokens of their sample."""
    row = keys - queries + offs_t
    return (offs_t < queries) & (row >= start) & (row < end)


@triton.jit
def prefill_kernel(
    Query,
    Key,
    Value,
    Out,
    Lse,
    PartialAcc,
    PartialTotal,
    PartialTop,
    Work,
    Spans,
    Starts,
    Ends,
    Logits,
    scale,
    sliding_window,
    queries,
    keys,
    heads,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_ob,
    stride_oh,
    stride_ot,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAP: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``Work`` is ``[items, 5]``: sample * heads + head, row tile, share, shares, workspace slot (-1 if unshared)."""
    item = Work + tl.program_id(0) * 5
    sample_head = tl.load(item)
    block = tl.load(item + 1)
    sample = sample_head // heads
    head = sample_head % heads
    kv_head = head // GROUP
    sink = tl.load(Spans + kv_head * 4)
    min_span = tl.load(Spans + kv_head * 4 + 1)
    alpha = tl.load(Spans + kv_head * 4 + 2)
    beta_256 = tl.load(Spans + kv_head * 4 + 3)
    start = tl.load(Starts + sample).to(tl.int32) if HAS_STARTS else sample * 0
    end = tl.minimum(tl.load(Ends + sample).to(tl.int32), keys) if HAS_ENDS else keys

    # Columns are indices of keys; a key's position is its column less start, which lies before the keys at hand
    # where earlier tokens are elsewhere.
    first = tl.maximum(start, 0)
    offs_t = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = _valid(offs_t, first, end, queries, keys)
    row = keys - queries + offs_t
    top_row = keys - queries + block * BLOCK_M
    row_first = tl.maximum(top_row, first)
    row_last = tl.minimum(top_row + BLOCK_M, end) - 1
    oldest = start + oldest_key(tl.maximum(row, first) - start, sink, min_span, alpha, beta_256, sliding_window)
    oldest_first = start + oldest_key(row_first - start, sink, min_span, alpha, beta_256, sliding_window)
    oldest_last = start + oldest_key(row_last - start, sink, min_span, alpha, beta_256, sliding_window)
    sink_end = start + sink

    # Tiles of keys: those with sink tokens, then those of the window; within each, the ones that no mask cuts.
    alive = row_first <= row_last
    reach = row_last + 1
    sink_first = tl.maximum(first, row_first - sliding_window + 1)
    sink_from = sink_first // BLOCK_N
    sink_to = tl.maximum((tl.minimum(sink_end, reach) + BLOCK_N - 1) // BLOCK_N, sink_from)
    sink_to = tl.where(sink_end > sink_first, sink_to, sink_from)
    window_from = tl.maximum(tl.maximum(oldest_first, first) // BLOCK_N, sink_to)
    window_to = tl.maximum((reach + BLOCK_N - 1) // BLOCK_N, window_from)
    causal = (row_first + 1) // BLOCK_N
    sink_last = tl.maximum(first, row_last - sliding_window + 1)
    sink_whole_from = tl.minimum((sink_last + BLOCK_N - 1) // BLOCK_N, sink_to)
    sink_whole_to = tl.maximum(tl.minimum(tl.maximum(sink_end, 0) // BLOCK_N, causal), sink_whole_from)
    sink_whole_to = tl.minimum(sink_whole_to, sink_to)
    whole_from = tl.maximum((tl.maximum(oldest_last, first) + BLOCK_N - 1) // BLOCK_N, window_from)
    whole_from = tl.minimum(whole_from, window_to)
    whole_to = tl.minimum(tl.maximum(causal, whole_from), window_to)
    sink_whole = sink_whole_to - sink_whole_from
    whole = sink_whole + whole_to - whole_from
    after_diagonal = window_to - whole_to
    after_edge = after_diagonal + whole_from - window_from
    after_sink = after_edge + sink_to - sink_whole_to
    cut = after_sink + sink_whole_from - sink_from
    cut_begin, cut_end = 0, tl.where(alive, cut, 0)
    whole_begin, whole_end = 0, tl.where(alive, whole, 0)
    if SPLIT:
        share = tl.load(item + 2)
        shares = tl.load(item + 3)
        cut_begin, cut_end = cut_end * share // shares, cut_end * (share + 1) // shares
        whole_begin, whole_end = whole_end * share // shares, whole_end * (share + 1) // shares

    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    sample64 = sample.to(tl.int64)
    kv_head64 = kv_head.to(tl.int64)
    Key += sample64 * stride_kb + kv_head64 * stride_kh
    Value += sample64 * stride_vb + kv_head64 * stride_vh
    key_tile = offs_d[:, None] + offs_n[None, :] * stride_kt
    value_tile = offs_n[:, None] * stride_vt + offs_d[None, :]
    Query += sample64 * stride_qb + head.to(tl.int64) * stride_qh
    query_mask = valid[:, None] & (offs_d < DIM)[None, :]
    query = tl.load(Query + offs_t.to(tl.int64)[:, None] * stride_qt + offs_d[None, :], mask=query_mask, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    top = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    offs_d_real = offs_d < DIM
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
        key_mask, value_mask = offs_d_real[:, None] & real[None, :], real[:, None] & offs_d_real[None, :]
        k = _load_tile(Key + at * stride_kt + key_tile, key_mask, DIM, BLOCK_D, True, UPCAST)
        v = _load_tile(Value + at * stride_vt + value_tile, value_mask, DIM, BLOCK_D, True, UPCAST)
        scores = scores_of(tl.dot(query, k, input_precision=PRECISION), scale, CAP)
        seen = (column[None, :] >= oldest[:, None]) | (
            (column < sink_end)[None, :] & (column[None, :] > row[:, None] - sliding_window)
        )
        scores = tl.where(seen & (column[None, :] <= row[:, None]) & real[None, :], scores, MASKED)
        acc, total, top = _accumulate(acc, total, top, scores, v, PRECISION)

    # The next tile's scores are computed while this one's softmax runs: their products keep the tensor cores busy.
    if whole_begin < whole_end:
        key_block = tl.where(whole_begin < sink_whole, sink_whole_from, whole_from - sink_whole) + whole_begin
        at = (key_block * BLOCK_N).to(tl.int64)
        k = _load_tile(Key + at * stride_kt + key_tile, offs_d_real[:, None], DIM, BLOCK_D, False, UPCAST)
        scores = tl.dot(query, k, input_precision=PRECISION)
        for index in tl.range(whole_begin, whole_end, num_stages=STAGES):
            following = tl.minimum(index + 1, whole_end - 1)
            next_block = tl.where(following < sink_whole, sink_whole_from, whole_from - sink_whole) + following
            next_at = (next_block * BLOCK_N).to(tl.int64)
            k = _load_tile(Key + next_at * stride_kt + key_tile, offs_d_real[:, None], DIM, BLOCK_D, False, UPCAST)
            next_scores = tl.dot(query, k, input_precision=PRECISION)
            v = _load_tile(Value + at * stride_vt + value_tile, offs_d_real[None, :], DIM, BLOCK_D, False, UPCAST)
            acc, total, top = _accumulate(acc, total, top, scores_of(scores, scale, CAP), v, PRECISION)
            scores = next_scores
            at = next_at

    if SPLIT:
        slot = tl.load(item + 4)
        if slot >= 0:
            rows = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(PartialAcc + rows[:, None] * BLOCK_D + offs_d[None, :], acc)
            tl.store(PartialTotal + rows, total)
            tl.store(PartialTop + rows, top)
            return
    out, lse = _finish(acc, total, top, valid, Logits, head, HAS_LOGITS)
    Out += sample64 * stride_ob + head.to(tl.int64) * stride_oh
    stored = (offs_t < queries)[:, None] & (offs_d < DIM)[None, :]
    tl.store(
        Out + offs_t.to(tl.int64)[:, None] * stride_ot + offs_d[None, :], out.to(Out.dtype.element_ty), mask=stored
    )
    tl.store(Lse + sample_head.to(tl.int64) * queries + offs_t, lse, mask=offs_t < queries)


@triton.jit
def merge_kernel(
    PartialAcc,
    PartialTotal,
    PartialTop,
    Out,
    Lse,
    Shared,
    Starts,
    Ends,
    Logits,
    queries,
    keys,
    heads,
    stride_ob,
    stride_oh,
    stride_ot,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
):
    """Shares of one row tile into its output, ``ROWS`` rows a program.

    ``Shared`` is ``[tiles, 4]``: sample * heads + head, row tile, first workspace slot, shares.
    """
    item = Shared + tl.program_id(0) * 4
    sample_head = tl.load(item)
    slot = tl.load(item + 2).to(tl.int64)
    shares = tl.load(item + 3)
    sample = sample_head // heads
    head = sample_head % heads
    start = tl.maximum(tl.load(Starts + sample).to(tl.int32), 0) if HAS_STARTS else 0
    end = tl.minimum(tl.load(Ends + sample).to(tl.int32), keys) if HAS_ENDS else keys
    within = tl.program_id(1) * ROWS
    offs_t = tl.load(item + 1) * BLOCK_M + within + tl.arange(0, ROWS)
    valid = _valid(offs_t, start, end, queries, keys)
    offs_d = tl.arange(0, BLOCK_D)
    top = tl.full([ROWS], MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for share in range(0, shares):
        rows = (slot + share) * BLOCK_M + within + tl.arange(0, ROWS)
        share_top = tl.load(PartialTop + rows)
        new_top = tl.maximum(top, share_top)
        old, new = tl.math.exp2(top - new_top), tl.math.exp2(share_top - new_top)
        acc = acc * old[:, None] + tl.load(PartialAcc + rows[:, None] * BLOCK_D + offs_d[None, :]) * new[:, None]
        total = total * old + tl.load(PartialTotal + rows) * new
        top = new_top
    out, lse = _finish(acc, total, top, valid, Logits, head, HAS_LOGITS)
    Out += sample.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    stored = (offs_t < queries)[:, None] & (offs_d < DIM)[None, :]
    tl.store(
        Out + offs_t.to(tl.int64)[:, None] * stride_ot + offs_d[None, :], out.to(Out.dtype.element_ty), mask=stored
    )
    tl.store(Lse + sample_head.to(tl.int64) * queries + offs_t, lse, mask=offs_t < queries)
