"""Triton kernels that give plain vectors: new tokens as codes give them back, and what a cache holds."""

from __future__ import annotations

import triton
import triton.language as tl

from moa_kernels.coded.vector_kernel import from_levels, to_levels, vector_at


@triton.jit
def see_kernel(
    keys, values, seen_keys, seen_values, positions, codes, key_into, value_into, key_back, value_back, mean, order,
    angles, digits, digit_sizes, tokens, num_kv_heads, sink,
    keys_batch_stride, keys_head_stride, keys_token_stride, values_batch_stride, values_head_stride,
    values_token_stride, positions_stride,
    WIDTH: tl.constexpr, RADIX: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program per sample, token, KV head, and side: keys, then values."""
    program = tl.program_id(0)
    is_key = program % 2 == 0
    head = program // 2 % num_kv_heads
    token = program // (2 * num_kv_heads) % tokens
    batch = (program // (2 * num_kv_heads * tokens)).to(tl.int64)
    position = tl.load(positions + batch * positions_stride + token).to(tl.int32)
    row = ((batch * num_kv_heads + head) * tokens + token) * WIDTH
    bits = tl.load(codes + head * 8 + tl.where(is_key, 0, 4)).to(tl.int32)
    if is_key:
        source = vector_at(keys, batch, head, token, keys_batch_stride, keys_head_stride, keys_token_stride)
        target, into, back = seen_keys + row, key_into, key_back
    else:
        source = vector_at(values, batch, head, token, values_batch_stride, values_head_stride, values_token_stride)
        target, into, back = seen_values + row, value_into, value_back
    if (bits == 16) | (position < sink):
        column = tl.arange(0, BLOCK_D)
        tl.store(target + column, tl.load(source + column, mask=column < WIDTH), mask=column < WIDTH)
    else:
        l0, l1, l2, l3, l4, l5, l6, l7, scale = to_levels(
            source, into, mean, order, angles, digits, digit_sizes, head, position, bits, is_key,
            WIDTH, RADIX, BLOCK_E, BLOCK_R,
        )  # fmt: skip
        from_levels(
            target, l0, l1, l2, l3, l4, l5, l6, l7, scale.to(tl.float32),
            back, mean, order, angles, head, position, bits, is_key, WIDTH, RADIX, BLOCK_E, BLOCK_R,
        )  # fmt: skip


@triton.jit
def _place(raw, low, PLACE: tl.constexpr, PART: tl.constexpr, bits):
    """The level of a part whose code is at a place of ``raw``, and with 3 bits has its lowest bit in ``low``."""
    wide = (1 << bits) - 1
    plane = tl.where(bits == 3, 2, bits)
    found = (raw >> (PLACE * plane)) & ((1 << plane) - 1)
    found = tl.where(bits == 3, found * 2 + ((low >> PART) & 1), found)
    return found.to(tl.float32) - wide.to(tl.float32) * 0.5


@triton.jit
def stored_kernel(
    out_keys, out_values, key_codes, value_codes, plain_keys, plain_values, key_scales, value_scales,
    key_sinks, value_sinks, lens, layout, codes, key_back, value_back, mean, order, angles,
    longest, slots, num_kv_heads,
    key_codes_stride, value_codes_stride, key_scales_stride, value_scales_stride,
    WIDTH: tl.constexpr, ITEMSIZE: tl.constexpr, RADIX: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program per sample, slot of a KV head, and side."""
    program = tl.program_id(0)
    is_key = program % 2 == 0
    head = program // 2 % num_kv_heads
    slot = program // (2 * num_kv_heads) % longest
    batch = (program // (2 * num_kv_heads * longest)).to(tl.int64)
    first = tl.load(layout + head * 3)
    sink = tl.load(layout + head * 3 + 1)
    capacity = tl.load(layout + head * 3 + 2)
    last = tl.load(lens + batch).to(tl.int32) - 1
    ring = tl.maximum(capacity - sink, 1)
    # The newest position that falls on the slot, if any does.
    position = tl.where(slot < sink, slot, last - (tl.maximum(last - slot, 0) % ring))
    held = (slot < capacity) & (slot <= last)
    table = codes + head * 8 + tl.where(is_key, 0, 4)
    bits = tl.load(table).to(tl.int32)
    at = tl.load(table + 1) + (slot - sink).to(tl.int64) * tl.load(table + 2)
    scale_at = tl.load(table + 3) + (slot - sink)
    row = (batch * slots + first + slot) * WIDTH
    sunk = (head.to(tl.int64) + batch * num_kv_heads) * sink * WIDTH + slot.to(tl.int64) * WIDTH
    if is_key:
        target, back, scales = out_keys + row, key_back, key_scales + batch * key_scales_stride
        sinks, coded, plain = key_sinks + sunk, key_codes + batch * key_codes_stride + at, plain_keys
        at = batch * key_codes_stride + at
    else:
        target, back, scales = out_values + row, value_back, value_scales + batch * value_scales_stride
        sinks, coded, plain = value_sinks + sunk, value_codes + batch * value_codes_stride + at, plain_values
        at = batch * value_codes_stride + at
    column = tl.arange(0, BLOCK_D)
    if slot < capacity:
        if (bits == 16) | (slot < sink) | (slot > last):
            plainly = tl.load(sinks + column, mask=column < tl.where(held & (slot < sink), WIDTH, 0), other=0.0)
            plain_ring = held & (slot >= sink) & (bits == 16)
            ringed = tl.load(plain + at // ITEMSIZE + column, mask=column < tl.where(plain_ring, WIDTH, 0), other=0.0)
            tl.store(target + column, tl.where(slot < sink, plainly, ringed), mask=column < WIDTH)
        else:
            EIGHTH: tl.constexpr = WIDTH // 8
            part = tl.arange(0, BLOCK_E)
            within = part < EIGHTH
            r0 = tl.load(coded + part, mask=within, other=0).to(tl.int32)
            r1 = tl.load(coded + EIGHTH + part, mask=within, other=0).to(tl.int32)
            r2 = tl.load(coded + 2 * EIGHTH + part, mask=part < tl.where(bits > 2, EIGHTH, 0), other=0).to(tl.int32)
            r3 = tl.load(coded + 3 * EIGHTH + part, mask=part < tl.where(bits > 3, EIGHTH, 0), other=0).to(tl.int32)
            if bits == 8:
                l0, l1 = r0.to(tl.float32) - 127.5, r1.to(tl.float32) - 127.5
                l2, l3 = r2.to(tl.float32) - 127.5, r3.to(tl.float32) - 127.5
                l4 = tl.load(coded + 4 * EIGHTH + part, mask=within, other=0).to(tl.float32) - 127.5
                l5 = tl.load(coded + 5 * EIGHTH + part, mask=within, other=0).to(tl.float32) - 127.5
                l6 = tl.load(coded + 6 * EIGHTH + part, mask=within, other=0).to(tl.float32) - 127.5
                l7 = tl.load(coded + 7 * EIGHTH + part, mask=within, other=0).to(tl.float32) - 127.5
            elif bits == 4:
                l0, l4 = _place(r0, r0, 0, 0, bits), _place(r0, r0, 1, 4, bits)
                l1, l5 = _place(r1, r1, 0, 1, bits), _place(r1, r1, 1, 5, bits)
                l2, l6 = _place(r2, r2, 0, 2, bits), _place(r2, r2, 1, 6, bits)
                l3, l7 = _place(r3, r3, 0, 3, bits), _place(r3, r3, 1, 7, bits)
            else:
                l0, l2 = _place(r0, r2, 0, 0, bits), _place(r0, r2, 1, 2, bits)
                l4, l6 = _place(r0, r2, 2, 4, bits), _place(r0, r2, 3, 6, bits)
                l1, l3 = _place(r1, r2, 0, 1, bits), _place(r1, r2, 1, 3, bits)
                l5, l7 = _place(r1, r2, 2, 5, bits), _place(r1, r2, 3, 7, bits)
            scale = tl.load(scales + scale_at).to(tl.float32)
            from_levels(
                target, l0, l1, l2, l3, l4, l5, l6, l7, scale, back, mean, order, angles, head, position, bits, is_key,
                WIDTH, RADIX, BLOCK_E, BLOCK_R,
            )  # fmt: skip
