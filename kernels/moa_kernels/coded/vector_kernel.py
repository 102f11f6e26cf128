"""One vector at a time in Triton: to levels and back.

All that leads to levels is computed in float64, as the reference does it: a vector's bytes depend on nothing but the
vector and its position, so that what is coded token by token equals what was coded with its prompt. A vector is in
eight parts of neighbouring channels, so that every place of every plane (`moa_kernels.codes.packing`) is one of them,
or two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa_kernels.codes.levels import NORMAL_STEPS

STEP_4, STEP_3, STEP_2 = (tl.constexpr(NORMAL_STEPS[bits]) for bits in (4, 3, 2))


@triton.jit
def vector_at(states, batch, head, token, batch_stride, head_stride, token_stride):
    """Where a token's vector of a KV head begins."""
    return states + batch * batch_stride + head.to(tl.int64) * head_stride + token.to(tl.int64) * token_stride


@triton.jit
def _add_part(y, a, b, into, row, there, PART: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr):
    """A part of ``y = x @ into``, with what some pairs ``a`` and ``b`` of x add to it: float64 [BLOCK_E]."""
    column = PART * (WIDTH // 8) + tl.arange(0, BLOCK_E)
    mask = there[:, None] & (tl.arange(0, BLOCK_E) < WIDTH // 8)[None, :]
    place = into + row[:, None] * WIDTH + column[None, :]
    first = tl.load(place, mask=mask, other=0.0)
    second = tl.load(place + (WIDTH // 2) * WIDTH, mask=mask, other=0.0)
    return y + tl.sum(a[:, None] * first + b[:, None] * second, 0)


@triton.jit
def _level(y, step, bits, count, PART: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr):
    """The level that a number is sorted into, in steps; anything where the step is 0 or no number."""
    place = PART * (WIDTH // 8) + tl.arange(0, BLOCK_E)
    half = (1 << (tl.where(place < 2 * count, 2 * bits, bits) - 1)).to(tl.float64)
    level = tl.floor(y / tl.where(step > 0, step, 1.0))
    return tl.minimum(tl.maximum(level, -half), half - 1) + 0.5


@triton.jit
def _weighed(product, count, weight, PART: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr):
    """Products of a part's numbers as often as they count in sums: those of two digits once, by their weight."""
    place = PART * (WIDTH // 8) + tl.arange(0, BLOCK_E)
    return product * tl.where(place < count, weight, tl.where(place < 2 * count, 0.0, 1.0))


@triton.jit
def _sum_weighed(
    p0, p1, p2, p3, p4, p5, p6, p7, count, weight, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """The sum of the products of all eight parts, as `_weighed`."""
    sums = _weighed(p0, count, weight, 0, WIDTH, BLOCK_E)
    sums += _weighed(p1, count, weight, 1, WIDTH, BLOCK_E)
    sums += _weighed(p2, count, weight, 2, WIDTH, BLOCK_E)
    sums += _weighed(p3, count, weight, 3, WIDTH, BLOCK_E)
    sums += _weighed(p4, count, weight, 4, WIDTH, BLOCK_E)
    sums += _weighed(p5, count, weight, 5, WIDTH, BLOCK_E)
    sums += _weighed(p6, count, weight, 6, WIDTH, BLOCK_E)
    sums += _weighed(p7, count, weight, 7, WIDTH, BLOCK_E)
    return tl.sum(sums, 0)


@triton.jit
def _digit_of(level, bits, count, PART: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr):
    """The level of a place's digit, float32: the high one's, the low one's, or the number's itself."""
    place = PART * (WIDTH // 8) + tl.arange(0, BLOCK_E)
    wide = tl.where(place < 2 * count, 2 * bits, bits)
    number = (level + ((1 << wide) - 1).to(tl.float64) * 0.5).to(tl.int32)
    mask = (1 << bits) - 1
    digit = tl.where(place < count, number >> bits, number & mask)
    return digit.to(tl.float32) - mask.to(tl.float32) * 0.5


@triton.jit
def code(level, bits, within):
    """The code of a level, int32; 0 in padding."""
    return tl.where(within, (level + (((1 << bits) - 1).to(tl.float32)) * 0.5).to(tl.int32), 0)


@triton.jit
def to_levels(
    source, into, mean, order, angles, digits, digit_sizes, head, position, bits, is_key,
    WIDTH: tl.constexpr, RADIX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The levels of a vector's eight parts, in steps, float32 [BLOCK_E], and the step, its scale, float16.

    Levels are of digits where numbers have two (`moa_kernels.codes.levels.Digits`).
    """
    part = tl.arange(0, BLOCK_E)
    within = part < WIDTH // 8
    y0 = tl.zeros([BLOCK_E], tl.float64)
    y1, y2, y3, y4, y5, y6, y7 = y0, y0, y0, y0, y0, y0, y0
    if bits == 8:
        y0 = tl.load(source + part, mask=within, other=0.0).to(tl.float64)
        y1 = tl.load(source + WIDTH // 8 + part, mask=within, other=0.0).to(tl.float64)
        y2 = tl.load(source + 2 * (WIDTH // 8) + part, mask=within, other=0.0).to(tl.float64)
        y3 = tl.load(source + 3 * (WIDTH // 8) + part, mask=within, other=0.0).to(tl.float64)
        y4 = tl.load(source + 4 * (WIDTH // 8) + part, mask=within, other=0.0).to(tl.float64)
        y5 = tl.load(source + 5 * (WIDTH // 8) + part, mask=within, other=0.0).to(tl.float64)
        y6 = tl.load(source + 6 * (WIDTH // 8) + part, mask=within, other=0.0).to(tl.float64)
        y7 = tl.load(source + 7 * (WIDTH // 8) + part, mask=within, other=0.0).to(tl.float64)
    else:
        into = into + head.to(tl.int64) * WIDTH * WIDTH
        for start in range(0, WIDTH // 2, BLOCK_R):
            pair = start + tl.arange(0, BLOCK_R)
            there = pair < WIDTH // 2
            # Keys by pairs of their rotary embedding, which is undone; values by halves.
            turns = pair < tl.where(is_key, WIDTH // 2, 0)
            first = tl.load(order + pair, mask=turns, other=0) + tl.where(is_key, 0, pair)
            second = tl.load(order + WIDTH // 2 + pair, mask=turns, other=0) + tl.where(is_key, 0, WIDTH // 2 + pair)
            a = tl.load(source + first, mask=there, other=0.0).to(tl.float64)
            b = tl.load(source + second, mask=there, other=0.0).to(tl.float64)
            cos, sin = turn(angles, position, pair, turns, WIDTH, RADIX)
            a, b = a * cos + b * sin, b * cos - a * sin
            a -= tl.load(mean + head * WIDTH + pair, mask=turns, other=0.0)
            b -= tl.load(mean + head * WIDTH + WIDTH // 2 + pair, mask=turns, other=0.0)
            y0 = _add_part(y0, a, b, into, pair, there, 0, WIDTH, BLOCK_E)
            y1 = _add_part(y1, a, b, into, pair, there, 1, WIDTH, BLOCK_E)
            y2 = _add_part(y2, a, b, into, pair, there, 2, WIDTH, BLOCK_E)
            y3 = _add_part(y3, a, b, into, pair, there, 3, WIDTH, BLOCK_E)
            y4 = _add_part(y4, a, b, into, pair, there, 4, WIDTH, BLOCK_E)
            y5 = _add_part(y5, a, b, into, pair, there, 5, WIDTH, BLOCK_E)
            y6 = _add_part(y6, a, b, into, pair, there, 6, WIDTH, BLOCK_E)
            y7 = _add_part(y7, a, b, into, pair, there, 7, WIDTH, BLOCK_E)
    # As `moa_kernels.codes.levels.quantise`. A vector with a number that is none has such a sum of squares.
    turned = is_key & (bits < 8)
    count = tl.load(digits + head, mask=turned, other=0).to(tl.int32)
    weight = tl.load(digit_sizes + 2 * head, mask=turned, other=1.0)
    norm = tl.load(digit_sizes + 2 * head + 1, mask=turned, other=WIDTH * 1.0)
    squares = _sum_weighed(
        y0 * y0, y1 * y1, y2 * y2, y3 * y3, y4 * y4, y5 * y5, y6 * y6, y7 * y7, count, weight, WIDTH, BLOCK_E
    )  # fmt: skip
    normal = tl.where(bits == 4, STEP_4, tl.where(bits == 3, STEP_3, STEP_2)).to(tl.float64)
    step = tl.sqrt(squares / norm) * normal
    if bits == 8:
        largest = tl.maximum(tl.maximum(tl.abs(y0), tl.abs(y1)), tl.maximum(tl.abs(y2), tl.abs(y3)))
        others = tl.maximum(tl.maximum(tl.abs(y4), tl.abs(y5)), tl.maximum(tl.abs(y6), tl.abs(y7)))
        step = tl.max(tl.maximum(largest, others), 0) * (2.0 / 255)
    l0 = _level(y0, step, bits, count, 0, WIDTH, BLOCK_E)
    l1 = _level(y1, step, bits, count, 1, WIDTH, BLOCK_E)
    l2 = _level(y2, step, bits, count, 2, WIDTH, BLOCK_E)
    l3 = _level(y3, step, bits, count, 3, WIDTH, BLOCK_E)
    l4 = _level(y4, step, bits, count, 4, WIDTH, BLOCK_E)
    l5 = _level(y5, step, bits, count, 5, WIDTH, BLOCK_E)
    l6 = _level(y6, step, bits, count, 6, WIDTH, BLOCK_E)
    l7 = _level(y7, step, bits, count, 7, WIDTH, BLOCK_E)
    along = _sum_weighed(
        y0 * l0, y1 * l1, y2 * l2, y3 * l3, y4 * l4, y5 * l5, y6 * l6, y7 * l7, count, weight, WIDTH, BLOCK_E
    )  # fmt: skip
    l0 = _digit_of(l0, bits, count, 0, WIDTH, BLOCK_E)
    l1 = _digit_of(l1, bits, count, 1, WIDTH, BLOCK_E)
    l2 = _digit_of(l2, bits, count, 2, WIDTH, BLOCK_E)
    l3 = _digit_of(l3, bits, count, 3, WIDTH, BLOCK_E)
    l4 = _digit_of(l4, bits, count, 4, WIDTH, BLOCK_E)
    l5 = _digit_of(l5, bits, count, 5, WIDTH, BLOCK_E)
    l6 = _digit_of(l6, bits, count, 6, WIDTH, BLOCK_E)
    l7 = _digit_of(l7, bits, count, 7, WIDTH, BLOCK_E)
    ratio = tl.where(step > 0, squares / tl.where(step > 0, along, 1.0), squares)
    ratio = ratio.to(tl.float32).to(tl.float16)  # by way of float32, as PyTorch does it
    ratio = tl.where(tl.abs(ratio.to(tl.float32)) <= 65504.0, ratio, float("nan"))
    return l0, l1, l2, l3, l4, l5, l6, l7, ratio


@triton.jit
def _add_back(a, b, level, back, pair, there, PART: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr):
    """Some pairs of ``levels @ back``, with what a part adds to them: float32, [pairs] twice."""
    row = PART * (WIDTH // 8) + tl.arange(0, BLOCK_E)
    mask = (tl.arange(0, BLOCK_E) < WIDTH // 8)[:, None] & there[None, :]
    place = back + row[:, None] * WIDTH + pair[None, :]
    first = tl.load(place, mask=mask, other=0.0)
    second = tl.load(place + WIDTH // 2, mask=mask, other=0.0)
    return a + tl.sum(level[:, None] * first, 0), b + tl.sum(level[:, None] * second, 0)


@triton.jit
def _store_part(target, level, scale, within, PART: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr):
    tl.store(target + PART * (WIDTH // 8) + tl.arange(0, BLOCK_E), level * scale, mask=within)


@triton.jit
def from_levels(
    target, l0, l1, l2, l3, l4, l5, l6, l7, scale, back, mean, order, angles, head, position, bits, is_key,
    WIDTH: tl.constexpr, RADIX: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write the vector that levels, float32, stand for."""
    within = tl.arange(0, BLOCK_E) < WIDTH // 8
    if bits == 8:
        _store_part(target, l0, scale, within, 0, WIDTH, BLOCK_E)
        _store_part(target, l1, scale, within, 1, WIDTH, BLOCK_E)
        _store_part(target, l2, scale, within, 2, WIDTH, BLOCK_E)
        _store_part(target, l3, scale, within, 3, WIDTH, BLOCK_E)
        _store_part(target, l4, scale, within, 4, WIDTH, BLOCK_E)
        _store_part(target, l5, scale, within, 5, WIDTH, BLOCK_E)
        _store_part(target, l6, scale, within, 6, WIDTH, BLOCK_E)
        _store_part(target, l7, scale, within, 7, WIDTH, BLOCK_E)
    else:
        back = back + head.to(tl.int64) * WIDTH * WIDTH
        for start in range(0, WIDTH // 2, BLOCK_R):
            pair = start + tl.arange(0, BLOCK_R)
            there = pair < WIDTH // 2
            a = tl.zeros([BLOCK_R], tl.float32)
            b = tl.zeros([BLOCK_R], tl.float32)
            a, b = _add_back(a, b, l0, back, pair, there, 0, WIDTH, BLOCK_E)
            a, b = _add_back(a, b, l1, back, pair, there, 1, WIDTH, BLOCK_E)
            a, b = _add_back(a, b, l2, back, pair, there, 2, WIDTH, BLOCK_E)
            a, b = _add_back(a, b, l3, back, pair, there, 3, WIDTH, BLOCK_E)
            a, b = _add_back(a, b, l4, back, pair, there, 4, WIDTH, BLOCK_E)
            a, b = _add_back(a, b, l5, back, pair, there, 5, WIDTH, BLOCK_E)
            a, b = _add_back(a, b, l6, back, pair, there, 6, WIDTH, BLOCK_E)
            a, b = _add_back(a, b, l7, back, pair, there, 7, WIDTH, BLOCK_E)
            # Keys by pairs of their rotary embedding, values by halves, which have neither mean nor turn.
            turns = pair < tl.where(is_key, WIDTH // 2, 0)
            first = tl.load(order + pair, mask=turns, other=0) + tl.where(is_key, 0, pair)
            second = tl.load(order + WIDTH // 2 + pair, mask=turns, other=0) + tl.where(is_key, 0, WIDTH // 2 + pair)
            a = a * scale + tl.load(mean + head * WIDTH + pair, mask=turns, other=0.0).to(tl.float32)
            b = b * scale + tl.load(mean + head * WIDTH + WIDTH // 2 + pair, mask=turns, other=0.0).to(tl.float32)
            cos, sin = turn(angles, position, pair, turns, WIDTH, RADIX)
            cos, sin = cos.to(tl.float32), sin.to(tl.float32)
            tl.store(target + first, a * cos - b * sin, mask=there)
            tl.store(target + second, b * cos + a * sin, mask=there)


@triton.jit
def digit(angles, row, pair, there, WIDTH: tl.constexpr):
    """Cosines and sines of a row of the table; 1 and 0 where not ``there``."""
    place = angles + row * WIDTH + pair
    return tl.load(place, mask=there, other=1.0), tl.load(place + WIDTH // 2, mask=there, other=0.0)


@triton.jit
def turn(angles, position, pair, there, WIDTH: tl.constexpr, RADIX: tl.constexpr):
    """Cosines and sines of a position, from those of its three digits; 1 and 0 where not ``there``."""
    cos, sin = digit(angles, position % RADIX, pair, there, WIDTH)
    cos_1, sin_1 = digit(angles, RADIX + position // RADIX % RADIX, pair, there, WIDTH)
    cos, sin = cos * cos_1 - sin * sin_1, sin * cos_1 + cos * sin_1
    cos_2, sin_2 = digit(angles, 2 * RADIX + position // (RADIX * RADIX), pair, there, WIDTH)
    return cos * cos_2 - sin * sin_2, sin * cos_2 + cos * sin_2
