"""Launches the Triton kernels over codes: decoding, storing new tokens, and what a prompt attends."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moa_kernels.backends import interpreting, multiprocessors
from moa_kernels.coded import reference
from moa_kernels.coded.append_kernel import append_kernel
from moa_kernels.coded.decode_kernel import merge_kernel, split_kernel
from moa_kernels.coded.reference import AppendCodes, DecodeCodes, SeeTokens, StoredStates
from moa_kernels.coded.states_kernel import see_kernel, stored_kernel
from moa_kernels.codes.codec import BITS
from moa_kernels.codes.turns import Turns
from moa_kernels.launch import COMPILER_OPTIONS, launch_config, padded, rows_contiguous

__all__ = ["append_codes", "decode_codes", "see_tokens", "stored_states"]

TILES_PER_MULTIPROCESSOR = 4
"""Fewer than `moa_kernels.decode.launch` makes: a program first fetches its head's transform. Measured on an H200."""

MERGED_AT_ONCE = 16
"""Partial results that a program of `merge_kernel` loads together: their latencies overlap."""

PLANNED_AT_ONCE = (128, 1024)
"""Pairs planned at once are a power of two: at least one per thread, and no more than registers hold."""

OVERHEAD_BYTES = 128
"""How many bytes of codes could be read while a key's arithmetic is done, by the count of instructions."""

ROWS_AT_ONCE = 16
"""Rows of a transform that a program of `append_kernel` multiplies together: registers hold no more in float64."""

RADIX = 1024
"""Positions below its cube, which all are, have three digits, and a row of angles for each."""


class Tables(NamedTuple):
    """A layer's transforms as kernels take them.

    Attributes:
        back: ``key_back`` by halves over its `size`, float16 ``[kv_heads, width, width]``.
        size: A power of two, float32 ``[kv_heads]``.
        mean: By halves, float32 ``[kv_heads, width]``.
        order: int32 ``[width]``.
        angles: Cosines, then sines, of the rotary embedding at each digit, float32 ``[3 * RADIX, width]``.
        value_back: Float32 ``[kv_heads, width, width]``.
        key_back: ``key_back`` by halves, float32 ``[kv_heads, width, width]``.
        into: ``key_into`` with its rows by halves, float64.
        exact_mean: By halves, float64.
        exact_angles: As ``angles``, float64.
    """

    back: Tensor
    size: Tensor
    mean: Tensor
    order: Tensor
    angles: Tensor
    value_back: Tensor
    key_back: Tensor
    into: Tensor
    exact_mean: Tensor
    exact_angles: Tensor


_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By `Turns.key_back`: what outlives the `Turns` that a compiled step makes anew."""


def tables(turns: Turns) -> Tables:
    """`Tables` of transforms, made once."""
    found: Tables | None = _tables.get(turns.key_back)
    if found is None:
        back = turns.back_by_halves
        size = torch.exp2(back.abs().amax((1, 2)).clamp(min=2.0**-100).log2().ceil())
        angles = _angles(tuple(turns.frequencies.tolist()), back.device)
        found = Tables(
            (back / size[:, None, None]).half(), size.float(), turns.mean_by_halves.float(), turns.order.int(),
            angles.float(), turns.value_back.float(), back.float().contiguous(),
            turns.key_into[:, turns.order].contiguous(), turns.mean_by_halves, angles,
        )  # fmt: skip
        _tables[turns.key_back] = found
    return found


@functools.lru_cache(maxsize=16)
def _angles(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    digits = torch.arange(RADIX, dtype=torch.float64)
    positions = torch.cat([digits, digits * RADIX, digits * RADIX**2])
    angles = positions[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return torch.cat([angles.cos(), angles.sin()], -1).to(device)


def tier_mask(tiers: Iterable[tuple[int, int]]) -> int:
    """A bit for each pair of bits of keys and of values: the kernel is made for those that a layer has."""
    return sum(1 << len(BITS) * BITS.index(keys) + BITS.index(values) for keys, values in set(tiers))


def _plain(codes: Tensor, like: Tensor) -> Tensor:
    """Bytes as plain numbers, which those of 16-bit heads are; without any bytes, anything."""
    return codes.view(like.dtype) if codes.numel() else like


def decode_codes(call: DecodeCodes) -> tuple[Tensor, Tensor]:
    """As `moa_kernels.coded.reference.decode_codes`."""
    query, stored, lens, layout, turns, spans, scale, softcap, sink_logits = call
    batch, heads, new, head_dim = query.shape
    device, kv_heads = query.device, len(spans.heads)
    pairs, group = batch * kv_heads, heads // kv_heads
    rows = group * new
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=device)
    if batch == 0:
        return torch.empty_like(query), lse
    query = query.contiguous()
    known = tables(turns)
    config = launch_config("coded_decode", device, head_dim, query.element_size())
    block_m = min(config.block_m, max(16, triton.next_power_of_2(rows)))
    target = TILES_PER_MULTIPROCESSOR * multiprocessors(device)
    # Rounding each pair up to whole tiles adds less than one for each, and a sink is one more.
    most_tiles = target + 2 * pairs
    partial = torch.empty(most_tiles, rows, head_dim, dtype=torch.float32, device=device)
    tops, totals = torch.empty(2, most_tiles, rows, dtype=torch.float32, device=device)
    fewest, most = PLANNED_AT_ONCE
    block_p = min(max(triton.next_power_of_2(pairs), fewest), most)
    # Where each pair's tiles end: written by the first kernel, read by the second.
    ends = torch.empty(pairs, dtype=torch.int32, device=device)
    reach = (lens, layout.rings.tensor(device), layout.tensor(device), spans.tensor(device))
    split_kernel[(most_tiles, triton.cdiv(rows, block_m))](
        query, known.back, known.size, known.mean, known.order, known.angles,
        stored.key_codes, stored.value_codes, _plain(stored.key_codes, query), _plain(stored.value_codes, query),
        stored.key_scales, stored.value_scales, stored.key_sinks, stored.value_sinks,
        *reach, partial, tops, totals, ends, scale, spans.sliding_window, pairs, kv_heads,
        layout.keys.nbytes, layout.values.nbytes, layout.keys.scale_slots, layout.values.scale_slots,
        TIERS=tier_mask(zip(layout.key_bits, layout.value_bits, strict=True)), TARGET_TILES=target,
        PLANS=triton.cdiv(pairs, block_p), OVERHEAD=OVERHEAD_BYTES, BLOCK_P=block_p, GROUP=group, NEW=new,
        HEAD_DIM=head_dim, ITEMSIZE=query.element_size(), SOFTCAP=softcap or 0.0, RADIX=RADIX,
        UPCAST=interpreting() and query.dtype == torch.bfloat16, STAGES=config.num_stages,
        BLOCK_M=block_m, BLOCK_N=config.block_n, BLOCK_D=padded(head_dim),
        num_warps=config.num_warps * (2 if block_m > 16 else 1), num_stages=config.num_stages, **COMPILER_OPTIONS,
    )  # fmt: skip
    # Sums over plain values and over coded ones, the latter to be turned back: [kv_heads, batch * rows, width].
    plain, coded = torch.empty(2, kv_heads, batch * rows, head_dim, dtype=torch.float32, device=device)
    merge_kernel[(pairs * rows,)](
        partial, tops, totals, ends, lens, reach[1], reach[3], sink_logits, plain, coded, lse,
        spans.sliding_window, kv_heads, batch,
        GROUP=group, NEW=new, HEAD_DIM=head_dim, HAS_SINK_LOGITS=sink_logits is not None,
        BLOCK_T=MERGED_AT_ONCE, BLOCK_D=padded(head_dim), **COMPILER_OPTIONS,
    )  # fmt: skip
    output = torch.baddbmm(plain, coded, known.value_back)
    by_sample = output.view(kv_heads, batch, group, new, head_dim).transpose(0, 1)
    return by_sample.reshape(query.shape).to(query.dtype), lse


def append_codes(call: AppendCodes) -> None:
    """As `moa_kernels.coded.reference.append_codes`, which does it for more tokens than a step has."""
    new_keys, new_values, stored, lens, layout, turns, counts = call
    batch, kv_heads, new, width = new_keys.shape
    if width % 8 or new_keys.dtype == torch.float64:
        reference.append_codes(call)
        return
    if batch * new == 0:
        return
    new_keys, new_values = rows_contiguous(new_keys), rows_contiguous(new_values)
    known, device = tables(turns), new_keys.device
    append_kernel[(batch * new * kv_heads * 2,)](
        new_keys, new_values, stored.key_codes, stored.value_codes,
        _plain(stored.key_codes, new_keys), _plain(stored.value_codes, new_keys), stored.key_scales,
        stored.value_scales, stored.key_sinks, stored.value_sinks, lens, counts, layout.rings.tensor(device),
        layout.tensor(device), known.into, turns.value_into, known.exact_mean, known.order, known.exact_angles,
        turns.digits, turns.digit_sizes, new, kv_heads, *new_keys.stride()[:3], *new_values.stride()[:3],
        layout.keys.nbytes, layout.values.nbytes, layout.keys.scale_slots, layout.values.scale_slots,
        HAS_COUNTS=counts is not None, WIDTH=width, ITEMSIZE=new_keys.element_size(), RADIX=RADIX,
        BLOCK_D=padded(width), BLOCK_E=padded(width) // 8, BLOCK_R=ROWS_AT_ONCE, **COMPILER_OPTIONS,
    )  # fmt: skip


def see_tokens(call: SeeTokens) -> tuple[Tensor, Tensor]:
    """As `moa_kernels.coded.reference.see_tokens`."""
    keys, values, positions, layout, turns = call
    batch, kv_heads, tokens, width = keys.shape
    if width % 8 or keys.dtype == torch.float64:
        return reference.see_tokens(call)
    keys, values = rows_contiguous(keys), rows_contiguous(values)
    seen_keys, seen_values = torch.empty(2, *keys.shape, dtype=keys.dtype, device=keys.device)
    if batch * tokens == 0:
        return seen_keys, seen_values
    known = tables(turns)
    see_kernel[(batch * tokens * kv_heads * 2,)](
        keys, values, seen_keys, seen_values, positions.contiguous(), layout.tensor(keys.device), known.into,
        turns.value_into, known.key_back, known.value_back, known.exact_mean, known.order, known.exact_angles,
        turns.digits, turns.digit_sizes, tokens, kv_heads, layout.sink, *keys.stride()[:3], *values.stride()[:3],
        tokens if len(positions) == batch else 0,
        WIDTH=width, RADIX=RADIX, BLOCK_D=padded(width), BLOCK_E=padded(width) // 8, BLOCK_R=ROWS_AT_ONCE,
        **COMPILER_OPTIONS,
    )  # fmt: skip
    return seen_keys, seen_values


def stored_states(call: StoredStates) -> tuple[Tensor, Tensor]:
    """As `moa_kernels.coded.reference.stored_states`."""
    lens, stored, layout, turns = call
    sinks, width, kv_heads = stored.key_sinks, layout.width, len(layout.key_bits)
    if width % 8 or sinks.dtype == torch.float64:
        return reference.stored_states(call)
    rings, device = layout.rings, sinks.device
    keys, values = torch.empty(2, len(lens), rings.slots, width, dtype=sinks.dtype, device=device)
    longest = max(rings.capacities)
    if len(lens) * longest == 0:
        return keys, values
    known = tables(turns)
    stored_kernel[(len(lens) * longest * kv_heads * 2,)](
        keys, values, stored.key_codes, stored.value_codes, _plain(stored.key_codes, sinks),
        _plain(stored.value_codes, sinks), stored.key_scales, stored.value_scales, stored.key_sinks, stored.value_sinks,
        lens, rings.tensor(device), layout.tensor(device), known.key_back, known.value_back, known.exact_mean,
        known.order, known.exact_angles, longest, rings.slots, kv_heads,
        layout.keys.nbytes, layout.values.nbytes, layout.keys.scale_slots, layout.values.scale_slots,
        WIDTH=width, ITEMSIZE=sinks.itemsize, RADIX=RADIX, BLOCK_D=padded(width), BLOCK_E=padded(width) // 8,
        BLOCK_R=ROWS_AT_ONCE, **COMPILER_OPTIONS,
    )  # fmt: skip
    return keys, values
