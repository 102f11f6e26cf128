"""Functions that several kernels call on the device."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

MASKED = tl.constexpr(-1.0e30)
"""Score of a hidden key: finite, so that a tile without any visible key makes no NaN."""


@triton.jit
def oldest_key(position, sink, min_span, alpha, beta_256, sliding_window):
    """`HeadSpans.oldest_key` in 32 bits; positions below 2**30, ``(beta_256 * n) >> 8`` without overflow."""
    n = position + 1
    span = tl.maximum(min_span, alpha + (n >> 8) * beta_256 + (((n & 255) * beta_256) >> 8))
    return n - tl.minimum(span - sink, sliding_window)


@triton.jit
def soft_cap(scores, SOFTCAP: tl.constexpr):
    """``SOFTCAP * tanh(scores / SOFTCAP)``, by exp2 alone: Triton's interpreter and all versions have it."""
    ratio = scores * (1.0 / SOFTCAP)
    decay = tl.math.exp2(tl.abs(ratio) * (LOG2E * -2.0))  # a constant stands on the right: the interpreter wants it so
    far = (1.0 - decay) / (1.0 + decay)
    far = tl.where(ratio < 0, -far, far)
    # Where tanh is nearly linear, 1 - decay would lose digits: its series, to half a unit in the last place.
    square = ratio * ratio
    near = ratio + ratio * square * (square * (square * (square * (62 / 2835) - 17 / 315) + 2 / 15) - 1 / 3)
    return tl.where(square < 0.0625, near, far) * SOFTCAP


@triton.jit
def scores_of(products, scale, SOFTCAP: tl.constexpr):
    """Scores in powers of two from products of queries and keys; SOFTCAP 0 means no soft cap."""
    return soft_cap(products * scale, SOFTCAP) * LOG2E if SOFTCAP > 0 else products * (scale * LOG2E)


@triton.jit
def close_softmax(top, total, sink_logit, HAS_SINK_LOGITS: tl.constexpr):
    """Factor on the weighted sum of values, and natural-log LSE, of rows.

    Args:
        top: Largest score so far, in powers of two; MASKED without any.
        total: Sum of exponentials below ``top``; 0 for a row that attends nothing.
        sink_logit: A further logit, in powers of two.
        HAS_SINK_LOGITS: Whether there is one.
    """
    factor = tl.full(top.shape, 1.0, tl.float32)
    if HAS_SINK_LOGITS:
        higher = tl.maximum(top, sink_logit)
        factor = tl.math.exp2(top - higher)
        total = total * factor + tl.math.exp2(sink_logit - higher)
        top = higher
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    lse = tl.where(dead, float("-inf"), (top + tl.math.log2(total)) * LN2)
    return factor / total, lse


@triton.jit
def rows_of(states, first, stop, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Rows ``first``, ``first + 1``, ... as ``[ROWS, BLOCK_D]``; zeros outside of ``0 <= row < stop`` and HEAD_DIM."""
    row, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    there = ((first + row >= 0) & (first + row < stop))[:, None]
    if HEAD_DIM < BLOCK_D:
        there = there & (d < HEAD_DIM)[None, :]
    start = states + tl.cast(first, tl.int64) * stride
    return tl.load(start + (row[:, None] * stride + d[None, :]), mask=there, other=0.0)


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """``a @ b.T`` in float32. The interpreter multiplies bfloat16 wrongly; UPCAST avoids it."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def lane_sums(x, LANES: tl.constexpr):
    """Sums over the columns ``2 * (LANES * a + lane) + b``, ``[row, LANES]``.

    With one lane for each thread that shares a row of the matrix units' results, these sums stay within threads.
    """
    parts = tl.reshape(x, [x.shape[0], x.shape[1] // (2 * LANES), LANES, 2])
    return tl.sum(tl.sum(parts, 3), 1)
