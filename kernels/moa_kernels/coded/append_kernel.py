"""The Triton kernel that encodes new tokens and stores them: a step of decoding in one launch.

All is computed in float64, as the reference does it: a vector's bytes depend on nothing but the vector and its
position, so that what is coded token by token equals what was coded with its prompt. A vector is in eight parts of
neighbouring channels, so that every place of every plane (`moa_kernels.codes.packing`) is one of them, or two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa_kernels.codes.levels import NORMAL_STEPS

STEP_4, STEP_3, STEP_2 = (tl.constexpr(NORMAL_STEPS[bits]) for bits in (4, 3, 2))


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
def _level(y, step, bits):
    """The level that a number is sorted into, in steps; anything where the step is 0 or no number."""
    half = (1 << (bits - 1)).to(tl.float64)
    level = tl.floor(y / tl.where(step > 0, step, 1.0))
    return tl.minimum(tl.maximum(level, -half), half - 1) + 0.5


@triton.jit
def _code(level, bits, within):
    """The code of a level, int32; 0 in padding."""
    return tl.where(within, (level + (((1 << bits) - 1).to(tl.float64)) * 0.5).to(tl.int32), 0)


@triton.jit
def _store_byte(target, byte, within):
    tl.store(target, byte.to(tl.uint8), mask=within)


@triton.jit
def append_kernel(
    new_keys, new_values, key_codes, value_codes, plain_keys, plain_values, key_scales, value_scales,
    key_sinks, value_sinks, lens, counts, layout, codes, key_into, value_into, mean, order, angles,
    num_new, num_kv_heads,
    keys_batch_stride, keys_head_stride, keys_token_stride, values_batch_stride, values_head_stride,
    values_token_stride, key_codes_stride, value_codes_stride, key_scales_stride, value_scales_stride,
    HAS_COUNTS: tl.constexpr, WIDTH: tl.constexpr, ITEMSIZE: tl.constexpr, RADIX: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program per sample, new token, KV head, and side: keys, then values."""
    program = tl.program_id(0)
    is_key = program % 2 == 0
    head = program // 2 % num_kv_heads
    token = program // (2 * num_kv_heads) % num_new
    batch = (program // (2 * num_kv_heads * num_new)).to(tl.int64)
    sink = tl.load(layout + head * 3 + 1)
    capacity = tl.load(layout + head * 3 + 2)
    length = tl.load(lens + batch).to(tl.int32)
    count = num_new
    if HAS_COUNTS:
        count = tl.minimum(tl.load(counts + batch), num_new).to(tl.int32)
    position = length + token
    ring = capacity - sink
    # Of all positions that map to a slot, only the last one is written: no two programs write one slot.
    ringed = (token < count) & (position >= sink) & (ring > 0) & (position >= length + count - ring)
    slot = ((position - sink) % tl.maximum(ring, 1)).to(tl.int64)

    table = codes + head * 8 + tl.where(is_key, 0, 4)
    bits = tl.load(table).to(tl.int32)
    at = tl.load(table + 1) + slot * tl.load(table + 2)
    scale_at = tl.load(table + 3) + slot
    if is_key:
        source = new_keys + batch * keys_batch_stride + head.to(tl.int64) * keys_head_stride + token * keys_token_stride
        row_codes, row_plain = key_codes + batch * key_codes_stride + at, plain_keys
        scale = key_scales + batch * key_scales_stride + scale_at
        sinks, into = key_sinks, key_into
        at = batch * key_codes_stride + at
    else:
        source = (
            new_values + batch * values_batch_stride + head.to(tl.int64) * values_head_stride
            + token * values_token_stride
        )  # fmt: skip
        row_codes, row_plain = value_codes + batch * value_codes_stride + at, plain_values
        scale = value_scales + batch * value_scales_stride + scale_at
        sinks, into = value_sinks, value_into
        at = batch * value_codes_stride + at

    # Numbers that stay as they are: the sink's, and those of 16 bits.
    column = tl.arange(0, BLOCK_D)
    numbers = tl.load(source + column, mask=column < WIDTH)
    sunk = (token < count) & (position < sink)
    tl.store(
        sinks + ((batch * num_kv_heads + head) * sink + position) * WIDTH + column, numbers,
        mask=column < tl.where(sunk, WIDTH, 0),
    )  # fmt: skip
    tl.store(row_plain + at // ITEMSIZE + column, numbers, mask=column < tl.where(ringed & (bits == 16), WIDTH, 0))

    if ringed & (bits < 16):
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
                second = tl.load(order + WIDTH // 2 + pair, mask=turns, other=0) + tl.where(
                    is_key, 0, WIDTH // 2 + pair
                )
                a = tl.load(source + first, mask=there, other=0.0).to(tl.float64)
                b = tl.load(source + second, mask=there, other=0.0).to(tl.float64)
                cos, sin = _turn(angles, position, pair, turns, WIDTH, RADIX)
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
        squares = tl.sum(y0 * y0 + y1 * y1 + y2 * y2 + y3 * y3 + y4 * y4 + y5 * y5 + y6 * y6 + y7 * y7, 0)
        normal = tl.where(bits == 4, STEP_4, tl.where(bits == 3, STEP_3, STEP_2)).to(tl.float64)
        step = tl.sqrt(squares * (1.0 / WIDTH)) * normal
        if bits == 8:
            largest = tl.maximum(tl.maximum(tl.abs(y0), tl.abs(y1)), tl.maximum(tl.abs(y2), tl.abs(y3)))
            others = tl.maximum(tl.maximum(tl.abs(y4), tl.abs(y5)), tl.maximum(tl.abs(y6), tl.abs(y7)))
            step = tl.max(tl.maximum(largest, others), 0) * (2.0 / 255)
        l0, l1, l2, l3 = _level(y0, step, bits), _level(y1, step, bits), _level(y2, step, bits), _level(y3, step, bits)
        l4, l5, l6, l7 = _level(y4, step, bits), _level(y5, step, bits), _level(y6, step, bits), _level(y7, step, bits)
        along = tl.sum(y0 * l0 + y1 * l1 + y2 * l2 + y3 * l3 + y4 * l4 + y5 * l5 + y6 * l6 + y7 * l7, 0)
        ratio = tl.where(step > 0, squares / tl.where(step > 0, along, 1.0), squares)
        ratio = ratio.to(tl.float32).to(tl.float16)  # by way of float32, as PyTorch does it
        ratio = tl.where(tl.abs(ratio.to(tl.float32)) <= 65504.0, ratio, float("nan"))
        tl.store(scale, ratio)
        c0, c1, c2, c3 = (
            _code(l0, bits, within),
            _code(l1, bits, within),
            _code(l2, bits, within),
            _code(l3, bits, within),
        )
        c4, c5, c6, c7 = (
            _code(l4, bits, within),
            _code(l5, bits, within),
            _code(l6, bits, within),
            _code(l7, bits, within),
        )
        EIGHTH: tl.constexpr = WIDTH // 8
        target = row_codes + part
        if bits == 8:
            _store_byte(target, c0, within)
            _store_byte(target + EIGHTH, c1, within)
            _store_byte(target + 2 * EIGHTH, c2, within)
            _store_byte(target + 3 * EIGHTH, c3, within)
            _store_byte(target + 4 * EIGHTH, c4, within)
            _store_byte(target + 5 * EIGHTH, c5, within)
            _store_byte(target + 6 * EIGHTH, c6, within)
            _store_byte(target + 7 * EIGHTH, c7, within)
        elif bits == 4:
            _store_byte(target, c0 | (c4 << 4), within)
            _store_byte(target + EIGHTH, c1 | (c5 << 4), within)
            _store_byte(target + 2 * EIGHTH, c2 | (c6 << 4), within)
            _store_byte(target + 3 * EIGHTH, c3 | (c7 << 4), within)
        else:
            below = bits - 2  # bits in the plane of low ones
            _store_byte(
                target, (c0 >> below) | (c2 >> below << 2) | (c4 >> below << 4) | (c6 >> below << 6), within
            )  # fmt: skip
            _store_byte(
                target + EIGHTH, (c1 >> below) | (c3 >> below << 2) | (c5 >> below << 4) | (c7 >> below << 6), within
            )  # fmt: skip
            if bits == 3:
                low = (c0 & 1) | ((c1 & 1) << 1) | ((c2 & 1) << 2) | ((c3 & 1) << 3)
                low |= ((c4 & 1) << 4) | ((c5 & 1) << 5) | ((c6 & 1) << 6) | ((c7 & 1) << 7)
                _store_byte(target + 2 * EIGHTH, low, within)


@triton.jit
def _digit(angles, row, pair, there, WIDTH: tl.constexpr):
    place = angles + row * WIDTH + pair
    return tl.load(place, mask=there, other=1.0), tl.load(place + WIDTH // 2, mask=there, other=0.0)


@triton.jit
def _turn(angles, position, pair, there, WIDTH: tl.constexpr, RADIX: tl.constexpr):
    """Cosines and sines of a position, from those of its three digits; 1 and 0 where not ``there``."""
    cos, sin = _digit(angles, position % RADIX, pair, there, WIDTH)
    cos_1, sin_1 = _digit(angles, RADIX + position // RADIX % RADIX, pair, there, WIDTH)
    cos, sin = cos * cos_1 - sin * sin_1, sin * cos_1 + cos * sin_1
    cos_2, sin_2 = _digit(angles, 2 * RADIX + position // (RADIX * RADIX), pair, there, WIDTH)
    return cos * cos_2 - sin * sin_2, sin * cos_2 + cos * sin_2
