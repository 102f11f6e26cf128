"""The profiling pass in torch, chunked over rows: runs anywhere, and what the Triton kernels are tested against."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

STATISTICS = ("squared", "signed", "absolute", "elementwise", "recall")

CPU_SCORES, GPU_SCORES = 2**20, 2**26
"""Scores held at once: a few megabytes stay in a CPU's cache, a GPU wants large products."""

MOST_ROWS = 256

SMALLEST_COMPLEMENT = 1e-6
"""Lower bound of ``1 - A`` in the single-entry effect: the first row has A = 1, giving 0 / 0."""


class Influence(NamedTuple):
    """Checked arguments of `moa_kernels.influence.influence_statistics`, which describes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    windows: Sequence[int]
    row_buckets: int
    bucket_rows: int
    sink: int
    scale: float
    softcap: float | None
    sink_logits: Tensor | None


def influence_totals(call: Influence) -> Tensor:
    """`STATISTICS` as one tensor ``[statistic, kv_heads, bucket, window]``, in float32 or wider.

    Fastest where the windows have a common divisor of some dozens.
    """
    query, key, value, grad_out, windows, row_buckets, bucket_rows, sink, scale, softcap, sink_logits = call
    kv_heads, n, wide = key.shape[0], query.shape[1], torch.promote_types(query.dtype, torch.float32)
    group = query.shape[0] // kv_heads
    totals = query.new_zeros(len(STATISTICS), kv_heads, row_buckets, len(windows), dtype=wide)
    logits = None if sink_logits is None else sink_logits.to(wide).view(kv_heads, group, 1, 1)
    # Windows that all are multiples of a unit: sums by blocks of so many keys give every one.
    sizes = torch.tensor(windows, device=query.device)
    unit = math.gcd(*(window for window in windows if window < n)) or n
    chunks = _chunks(n, group, query.device.type)
    most = max(group * (stop - start) * stop for start, stop in chunks)
    scratch = query.new_empty(3, most, dtype=wide)  # fresh memory for each product would cost more than the product
    for head in range(kv_heads):
        shared = slice(head * group, (head + 1) * group)
        # [group, N, head_dim]; keys and values [head_dim, N], newest first
        queries, grads = query[shared].to(wide), grad_out[shared].to(wide)
        keys, values = (x[head].to(wide).flip(0).mT.contiguous() for x in (key, value))  # column c is key n-1-c
        for start, stop in chunks:
            near = slice(n - stop, n)  # keys stop-1, stop-2, ..., 0
            room = [part[: group * (stop - start) * stop].view(group, stop - start, stop) for part in scratch]
            with _narrow_products(query):
                scores = _product(queries[:, start:stop], keys[:, near], room[0]).mul_(scale)
                attention, kept = _attention(scores, softcap, None if logits is None else logits[head], room[1])
                weighted = _product(grads[:, start:stop], values[:, near], room[0]).mul_(attention)
            by_row = _window_statistics(
                attention, weighted, room[2], kept, start=start, sink=sink, sizes=sizes, unit=unit
            )
            # Rows to buckets, by a product with who belongs where: [buckets, rows] @ [statistic, rows, window].
            first, last = start // bucket_rows, (stop - 1) // bucket_rows + 1
            bucket = torch.arange(start, stop, device=query.device) // bucket_rows
            member = (bucket == torch.arange(first, last, device=query.device)[:, None]).to(wide)
            totals[:, head, first:last] += member @ by_row
    return totals


def _chunks(n: int, group: int, device: str) -> list[tuple[int, int]]:
    """First and last row (exclusive) of each chunk."""
    scores = CPU_SCORES if device == "cpu" else GPU_SCORES
    chunks, start = [], 0
    while start < n:
        rows = min(MOST_ROWS, max(16, scores // (group * (start + MOST_ROWS)) // 16 * 16))
        chunks.append((start, min(start + rows, n)))
        start += rows
    return chunks


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` for ``[group, rows, x]`` and ``[x, columns]`` as one matrix product, into ``out``."""
    torch.mm(a.reshape(-1, a.shape[2]), b, out=out.flatten(0, 1))
    return out


@contextlib.contextmanager
def _narrow_products(inputs: Tensor) -> Iterator[None]:
    """Let matrix units for narrow types multiply the float32 copies of ``inputs``: exact, since they fit, and faster.

    bfloat16 fits the bfloat16 unit of a CPU, and with float16 the TF32 unit of a GPU; sums stay float32.
    """
    on_cpu = inputs.device.type == "cpu"
    fits = (torch.bfloat16,) if on_cpu else (torch.bfloat16, torch.float16)
    unit: Any = torch.backends.mkldnn if on_cpu else torch.backends.cuda
    unit = getattr(unit, "matmul", None)
    if inputs.dtype not in fits or not hasattr(unit, "fp32_precision"):  # torch < 2.9
        yield
        return
    before = unit.fp32_precision
    unit.fp32_precision = "bf16" if on_cpu else "tf32"
    try:
        yield
    finally:
        unit.fp32_precision = before


def _attention(
    scores: Tensor, softcap: float | None, logits: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor | float]:
    """Attention ``[group, rows, keys]``, in ``out``, and the weight of the sink logits. Overwrites ``scores``."""
    rows = scores.shape[1]
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    row, column = torch.arange(rows, device=scores.device)[:, None], torch.arange(rows, device=scores.device)
    scores[..., :rows].masked_fill_(column < rows - 1 - row, float("-inf"))
    attention = torch.softmax(scores, -1, out=out)
    if logits is None:
        return attention, 0.0
    share = torch.sigmoid(torch.logsumexp(scores, -1, keepdim=True) - logits)
    return attention.mul_(share), 1 - share


def _window_statistics(
    attention: Tensor,
    weighted: Tensor,
    effect: Tensor,
    kept: Tensor | float,
    *,
    start: int,
    sink: int,
    sizes: Tensor,
    unit: int,
) -> Tensor:
    """`STATISTICS` of every row and window, ``[statistic, row, window]``. Overwrites its first three arguments."""
    stop, device = attention.shape[2], attention.device
    sunk = slice(max(0, stop - sink), stop)
    # D_i, then what the sink keeps: [group, rows, 1].
    row_gain = weighted.sum(-1, keepdim=True)
    mass, gain = (x[..., sunk].sum(-1, keepdim=True) for x in (attention, weighted))
    near_gain = _within(weighted, sunk, sizes, unit)
    # |A (g - D) / (1 - A)|, in place of tensors that aren't needed any more.
    effect = torch.addcmul(weighted, attention, row_gain, value=-1, out=effect)
    complement = torch.sub(attention.new_ones(()), attention, out=weighted).clamp_min_(SMALLEST_COMPLEMENT)
    effect.div_(complement).abs_()
    near_mass, near_effect = (_within(matrix, sunk, sizes, unit) for matrix in (attention, effect))
    # Rows that see all their keys lose nothing, exactly.
    position = torch.arange(start, stop, device=device)[:, None]
    whole = sizes > position - sink
    kept_mass, kept_gain = mass + near_mass, gain + near_gain
    smallest = torch.finfo(kept_mass.dtype).tiny
    delta = (kept_gain / (kept_mass + kept).clamp_min(smallest)).sub_(row_gain).masked_fill_(whole, 0)
    beyond = (effect.sum(-1, keepdim=True) - near_effect).clamp_min_(0).masked_fill_(whole, 0)
    recall = torch.where(whole, mass.new_ones(()) - kept, kept_mass)
    return torch.stack([delta * delta, delta, delta.abs(), beyond, recall]).sum(1)


def _within(matrix: Tensor, sunk: slice, sizes: Tensor, unit: int) -> Tensor:
    """Sums of ``matrix[..., row, column]`` over the distances below each window, ``[group, row, window]``.

    The ``sunk`` columns don't count and are set to zero; ``unit`` divides every window but those that keep all.

    Row r's key at distance d stands in column ``d + rows - 1 - r``, so a view whose row stride is one less
    than the width lines up equal distances; entries past a row's first key fall on masked zeros of the next.
    The view ends one short of the width, so a window that spans every row isn't summed to its end: such rows
    keep everything, and no one asks for their sum.
    """
    matrix[..., sunk] = 0
    group, rows, width = matrix.shape
    blocks = (width - 1) // unit
    if blocks == 0:
        return matrix.new_zeros(group, rows, len(sizes))
    shape, strides = (group, rows, blocks, unit), (rows * width, width - 1, unit, 1)
    # [group, rows, blocks]
    by_block = matrix.as_strided(shape, strides, matrix.storage_offset() + rows - 1).sum(-1)
    last = torch.div(sizes, unit, rounding_mode="floor").clamp_max(blocks) - 1
    return by_block.cumsum_(-1).index_select(-1, last)
