"""Launches the Triton kernel that stores new keys and values."""

from __future__ import annotations

import torch
import triton

from moa_kernels.append.kernel import append_kernel
from moa_kernels.append.reference import Append
from moa_kernels.launch import COMPILER_OPTIONS, rows_contiguous

DECODE_TOKENS = 8
"""Tokens of a program's tile up to so many new ones, a few bytes per thread; `PREFILL_TOKENS` beyond."""

PREFILL_TOKENS = 64

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def append_tokens(call: Append) -> None:
    """As `moa_kernels.append.reference.append_tokens`."""
    keys, values, new_keys, new_values, lens, layout, counts = call
    batch, kv_heads, new, key_dim = new_keys.shape
    value_dim = new_values.shape[-1]
    if new_keys.numel() + new_values.numel() == 0:
        return
    # Types don't matter to a copy, so that all of one width share a compiled kernel.
    keys, values, new_keys, new_values = (
        tensor.view(BITS[tensor.element_size()])
        for tensor in (keys, values, rows_contiguous(new_keys), rows_contiguous(new_values))
    )
    # One new token needs no more than a small tile.
    block_t = DECODE_TOKENS if new <= DECODE_TOKENS else PREFILL_TOKENS
    append_kernel[(batch * kv_heads * triton.cdiv(new, block_t),)](
        keys, values, new_keys, new_values, lens, counts, layout.tensor(keys.device), new, kv_heads,
        *keys.stride()[:2], *values.stride()[:2], *new_keys.stride()[:3], *new_values.stride()[:3],
        HAS_COUNTS=counts is not None, KEY_DIM=key_dim, VALUE_DIM=value_dim, BLOCK_T=block_t,
        BLOCK_K=triton.next_power_of_2(key_dim), BLOCK_V=triton.next_power_of_2(value_dim), **COMPILER_OPTIONS,
    )  # fmt: skip
