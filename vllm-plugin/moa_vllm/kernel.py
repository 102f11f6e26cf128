"""Attention over the pages of single KV heads, in Triton: one launch per layer, prefill and decoding mixed.

The heads of a layer lie in different groups, so their pages and block tables are different tensors. Their addresses
come in small tables, which stay the same from step to step. The grid depends on the padded numbers of tokens and
requests alone, and nothing is read back, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from moa_kernels.device import LOG2E, MASKED, oldest_key

FAR = tl.constexpr(2**30)
"""No window of the model's own."""


@triton.jit
def store_kernel(
    keys, values, pages, slots, key_stride, value_stride, page_stride, cell_stride,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One new token of one KV head into its cell; a negative slot is padding."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(tl.load(slots + head).to(tl.pointer_type(tl.int64)) + token)
    if slot >= 0:
        width = tl.arange(0, BLOCK_D)
        real = width < HEAD_DIM
        key = tl.load(keys + token * key_stride + head * HEAD_DIM + width, mask=real)
        value = tl.load(values + token * value_stride + head * HEAD_DIM + width, mask=real)
        cell = tl.load(pages + head).to(tl.pointer_type(keys.dtype.element_ty))
        cell += (slot // PAGE) * page_stride + (slot % PAGE) * cell_stride
        tl.store(cell + width, key, mask=real)
        tl.store(cell + HEAD_DIM + width, value, mask=real)


@triton.jit
def _request_of(block, starts, requests, QUERIES: tl.constexpr):
    """The request whose new tokens this block of queries belongs to: each begins a block of its own."""
    low, high = 0, requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // QUERIES + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def attend_kernel(
    output, partial, tops, totals, query, starts, lengths, pages, tables, table_strides, rules, shares,
    requests, sink, min_span, scale, query_stride, output_stride, page_stride, cell_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """QUERIES new tokens of one request, the query heads of one KV head, one part of their keys.

    ``shares`` says for each program of a block of queries: its KV head, which part it takes, and of how many.
    """
    block, program = tl.program_id(0), tl.program_id(1)
    head, part = tl.load(shares + program * 3), tl.load(shares + program * 3 + 1)
    parts = tl.load(shares + program * 3 + 2)
    request = _request_of(block, starts, requests, QUERIES)
    begin = tl.load(starts + request)
    new = tl.load(starts + request + 1) - begin
    at = (block - (begin // QUERIES + request)) * QUERIES
    if at >= new:
        return
    length = tl.load(lengths + request)
    alpha, beta_256 = tl.load(rules + head * 2), tl.load(rules + head * 2 + 1)
    cells = tl.multiple_of(tl.load(pages + head), 16).to(tl.pointer_type(query.dtype.element_ty))
    cells = tl.multiple_of(cells, 16)  # so that keys are copied 16 bytes at a time
    table = tl.load(tables + head).to(tl.pointer_type(tl.int32))
    table += tl.cast(request, tl.int64) * tl.load(table_strides + head)

    # A row is a new token and a query head: [ROWS].
    row = tl.arange(0, ROWS)
    token = at + row // GROUP
    real = (token < new) & (row < QUERIES * GROUP)
    position = length - new + token
    first = tl.maximum(oldest_key(position, sink, min_span, alpha, beta_256, FAR), sink)
    width = tl.arange(0, BLOCK_D)
    wide = width < HEAD_DIM
    query_head = head * GROUP + row % GROUP
    place = (begin + token).to(tl.int64) * query_stride + query_head * HEAD_DIM
    q = tl.load(query + place[:, None] + width[None, :], mask=real[:, None] & wide[None, :], other=0.0)

    # Sink tiles, then the window's from that of the oldest row on; what lies between isn't even looked up.
    last = tl.minimum(length - new + at + QUERIES, length)
    lowest = tl.maximum(oldest_key(length - new + at, sink, min_span, alpha, beta_256, FAR), sink)
    sunk = tl.cdiv(tl.minimum(sink, last), TILE)
    window = tl.maximum(lowest // TILE, sunk)
    tiles = sunk + tl.maximum(tl.cdiv(last, TILE) - window, 0)
    share = tl.cdiv(tiles, parts)
    top = tl.full([ROWS], MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for tile in range(part * share, tl.minimum(part * share + share, tiles)):
        key = tl.where(tile < sunk, tile, window + tile - sunk) * TILE + tl.arange(0, TILE)
        seen = (key < last) & ((key < sink) | (key >= lowest))
        page = tl.load(table + key // PAGE, mask=seen, other=0).to(tl.int64)
        cell = cells + page * page_stride + (key % PAGE) * cell_stride
        k = tl.load(cell[None, :] + width[:, None], mask=seen[None, :] & wide[:, None], other=0.0)
        v = tl.load(cell[:, None] + HEAD_DIM + width[None, :], mask=seen[:, None] & wide[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)
        attended = (key[None, :] <= position[:, None]) & ((key < sink)[None, :] | (key[None, :] >= first[:, None]))
        attended = attended & seen[None, :]
        scores = tl.where(attended, scores, MASKED)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(attended, tl.math.exp2(scores - higher[:, None]), 0.0)
        faded = tl.math.exp2(top - higher)
        total = total * faded + tl.sum(weights, 1)
        sums = sums * faded[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    stored = real[:, None] & wide[None, :]
    if not SPLIT:
        place = (begin + token).to(tl.int64) * output_stride + query_head * HEAD_DIM
        answer = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(output + place[:, None] + width[None, :], answer.to(output.dtype.element_ty), mask=stored)
    else:
        index = ((begin + token).to(tl.int64) * GROUP + row % GROUP) * tl.num_programs(1) + program
        tl.store(tops + index, top, mask=real)
        tl.store(totals + index, total, mask=real)
        there = stored & (total > 0.0)[:, None]
        tl.store(partial + index[:, None] * HEAD_DIM + width[None, :], sums, mask=there)


@triton.jit
def merge_kernel(
    output, partial, tops, totals, starts, parts, requests, programs, output_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MOST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The parts of one new token and query head; ``parts`` says which is a KV head's first, and how many it has."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if token >= tl.load(starts + requests):
        return  # padding
    first, count = tl.load(parts + head // GROUP * 2), tl.load(parts + head // GROUP * 2 + 1)
    base = (token * GROUP + head % GROUP) * programs + first
    part = tl.arange(0, MOST)
    top = tl.load(tops + base + part, mask=part < count, other=MASKED)
    total = tl.load(totals + base + part, mask=part < count, other=0.0)
    highest = tl.max(top, 0)
    whole = tl.sum(total * tl.math.exp2(top - highest), 0)
    width = tl.arange(0, BLOCK_D)
    wide = width < HEAD_DIM
    answer = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, count, STEP):
        some = begin + tl.arange(0, STEP)
        there = tl.load(totals + base + some, mask=some < count, other=0.0) > 0.0  # other parts have stored no sums
        factor = tl.math.exp2(tl.load(tops + base + some, mask=there, other=MASKED) - highest)
        sums = partial + (base + some)[:, None] * HEAD_DIM + width[None, :]
        answer += tl.sum(tl.load(sums, mask=there[:, None] & wide[None, :], other=0.0) * factor[:, None], 0)
    answer = answer / tl.where(whole == 0.0, 1.0, whole)
    place = output + token * output_stride + head * HEAD_DIM
    tl.store(place + width, answer.to(output.dtype.element_ty), mask=wide)
