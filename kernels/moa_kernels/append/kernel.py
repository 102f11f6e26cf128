"""Storing new keys and values by one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moa_kernels.launch import COMPILER_OPTIONS, rows_contiguous
from moa_kernels.rings import RingLayout

__all__ = ["append_kernel", "append_tokens"]

DECODE_TOKENS = 8
"""Tokens of a program's tile up to so many new ones, a few bytes per thread; `PREFILL_TOKENS` beyond."""

PREFILL_TOKENS = 64

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _copy(source, source_row, target, target_row, kept, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy rows of DIM elements where ``kept``; rows are offsets in elements."""
    column = tl.arange(0, BLOCK_D)
    mask = kept[:, None] & (column < DIM)[None, :]
    rows = tl.load(source + source_row[:, None] + column[None, :], mask=mask)
    tl.store(target + target_row[:, None] + column[None, :], rows, mask=mask)


@triton.jit
def append_kernel(
    keys, values, new_keys, new_values, lens, counts, layout, new, kv_heads,
    keys_batch_stride, keys_slot_stride, values_batch_stride, values_slot_stride,
    new_keys_batch_stride, new_keys_head_stride, new_keys_token_stride,
    new_values_batch_stride, new_values_head_stride, new_values_token_stride,
    HAS_COUNTS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per KV head, sample and BLOCK_T new tokens."""
    program = tl.program_id(0)
    head = program % kv_heads
    blocks = tl.cdiv(new, BLOCK_T)
    batch = (program // kv_heads // blocks).to(tl.int64)
    token = (program // kv_heads % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)

    offset = tl.load(layout + head * 3)
    sink = tl.load(layout + head * 3 + 1)
    capacity = tl.load(layout + head * 3 + 2)
    length = tl.load(lens + batch).to(tl.int32)
    count = new
    if HAS_COUNTS:
        count = tl.minimum(tl.load(counts + batch), new).to(tl.int32)

    ring = tl.maximum(capacity - sink, 1)
    position = length + token
    slot = tl.where(position < sink, position, sink + (position - sink) % ring)
    # Of all positions that map to a slot, only the last one is written: no two programs write one slot.
    kept = (token < count) & ((position < sink) | (position >= length + count - ring)) & (slot < capacity)

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


def append_tokens(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    lens: Tensor,
    layout: RingLayout,
    counts: Tensor | None,
) -> None:
    """As `moa_kernels.append.append_tokens`."""
    batch, kv_heads, new, key_dim = new_keys.shape
    value_dim = new_values.shape[-1]
    if new_keys.numel() + new_values.numel() == 0:
        return
    # Types don't matter to a copy, so that all of one width share a compiled kernel.
    keys, values, new_keys, new_values = (
        tensor.view(BITS[tensor.element_size()])
        for tensor in (keys, values, rows_contiguous(new_keys), rows_contiguous(new_values))
    )
    block_t = DECODE_TOKENS if new <= DECODE_TOKENS else PREFILL_TOKENS
    append_kernel[(batch * kv_heads * triton.cdiv(new, block_t),)](
        keys, values, new_keys, new_values, lens, counts, layout.tensor(keys.device), new, kv_heads,
        *keys.stride()[:2], *values.stride()[:2], *new_keys.stride()[:3], *new_values.stride()[:3],
        HAS_COUNTS=counts is not None, KEY_DIM=key_dim, VALUE_DIM=value_dim, BLOCK_T=block_t,
        BLOCK_K=triton.next_power_of_2(key_dim), BLOCK_V=triton.next_power_of_2(value_dim), **COMPILER_OPTIONS,
    )  # fmt: skip
