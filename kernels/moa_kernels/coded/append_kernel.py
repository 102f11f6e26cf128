"""The Triton kernel that encodes new tokens and stores them, a step of decoding or a prompt, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from moa_kernels.coded.vector_kernel import code, to_levels, vector_at


@triton.jit
def _store_byte(target, byte, within):
    tl.store(target, byte.to(tl.uint8), mask=within)


@triton.jit
def append_kernel(
    new_keys, new_values, key_codes, value_codes, plain_keys, plain_values, key_scales, value_scales,
    key_sinks, value_sinks, lens, counts, layout, codes, key_into, value_into, mean, order, angles,
    digits, digit_sizes, num_new, num_kv_heads,
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
        source = vector_at(new_keys, batch, head, token, keys_batch_stride, keys_head_stride, keys_token_stride)
        row_codes, row_plain = key_codes + batch * key_codes_stride + at, plain_keys
        scale = key_scales + batch * key_scales_stride + scale_at
        sinks, into = key_sinks, key_into
        at = batch * key_codes_stride + at
    else:
        source = vector_at(new_values, batch, head, token, values_batch_stride, values_head_stride, values_token_stride)
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
        within = tl.arange(0, BLOCK_E) < WIDTH // 8
        l0, l1, l2, l3, l4, l5, l6, l7, ratio = to_levels(
            source, into, mean, order, angles, digits, digit_sizes, head, position, bits, is_key,
            WIDTH, RADIX, BLOCK_E, BLOCK_R,
        )  # fmt: skip
        tl.store(scale, ratio)
        c0, c1, c2, c3 = code(l0, bits, within), code(l1, bits, within), code(l2, bits, within), code(l3, bits, within)
        c4, c5, c6, c7 = code(l4, bits, within), code(l5, bits, within), code(l6, bits, within), code(l7, bits, within)
        EIGHTH: tl.constexpr = WIDTH // 8
        target = row_codes + tl.arange(0, BLOCK_E)
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
