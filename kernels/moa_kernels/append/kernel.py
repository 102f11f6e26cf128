"""The Triton kernel that stores new keys and values: copies, whatever the type."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _copy(source, source_row, target, target_row, kept, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy rows of DIM elements where ``kept``; rows are offsets in elements."""
    column = tl.arange(0, BLOCK_D)
    mask = kept[:, None] & (column < DIM)[None, :]
    rows = tl.load(source + source_row[:, None] + column[None, :], mask=mask)
    tl.store(target + target_row[:, None] + column[None, :], rows, mask=mask)


@triton.jit
def append_kernel(
    keys, values, new_keys, new_values, lens, counts, layout, num_new, num_kv_heads,
    keys_batch_stride, keys_slot_stride, values_batch_stride, values_slot_stride,
    new_keys_batch_stride, new_keys_head_stride, new_keys_token_stride,
    new_values_batch_stride, new_values_head_stride, new_values_token_stride,
    HAS_COUNTS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per KV head, sample and BLOCK_T new tokens."""
    # Heads of a token next to each other, as projections write them.
    program = tl.program_id(0)
    head = program % num_kv_heads
    blocks = tl.cdiv(num_new, BLOCK_T)
    batch = (program // num_kv_heads // blocks).to(tl.int64)
    token = (program // num_kv_heads % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)

    # Where the head's slots are, and what its sample holds already.
    offset = tl.load(layout + head * 3)
    sink = tl.load(layout + head * 3 + 1)
    capacity = tl.load(layout + head * 3 + 2)
    length = tl.load(lens + batch).to(tl.int32)
    # Tokens from the count on are padding.
    count = num_new
    if HAS_COUNTS:
        count = tl.minimum(tl.load(counts + batch), num_new).to(tl.int32)

    # Positions [BLOCK_T] and their slots within the head.
    ring = tl.maximum(capacity - sink, 1)
    position = length + token
    slot = tl.where(position < sink, position, sink + (position - sink) % ring)
    # Of all positions that map to a slot, only the last one is written: no two programs write one slot.
    kept = (token < count) & ((position < sink) | (position >= length + count - ring)) & (slot < capacity)

    # Offsets of large caches don't fit into 32 bits.
    token = token.to(tl.int64)
    slot = (offset + slot).to(tl.int64)
    _copy(
        new_keys,
        batch * new_keys_batch_stride + head.to(tl.int64) * new_keys_head_stride + token * new_keys_token_stride,
        keys, batch * keys_batch_stride + slot * keys_slot_stride, kept, KEY_DIM, BLOCK_K,
    )  # fmt: skip
    _copy(
        new_values,
        batch * new_values_batch_stride + head.to(tl.int64) * new_values_head_stride + token * new_values_token_stride,
        values, batch * values_batch_stride + slot * values_slot_stride, kept, VALUE_DIM, BLOCK_V,
    )  # fmt: skip
