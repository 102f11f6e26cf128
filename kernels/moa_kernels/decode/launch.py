"""Launches the Triton decode kernels: tiles of keys on a fixed grid, then the merge of their partial results."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moa_kernels.backends import interpreting, multiprocessors
from moa_kernels.decode.kernel import merge_kernel, split_kernel
from moa_kernels.decode.reference import Decode
from moa_kernels.launch import COMPILER_OPTIONS, LaunchConfig, launch_config, padded, rows_contiguous

TILES_PER_MULTIPROCESSOR = 6
"""Two or three programs fit in a multiprocessor; two or three rounds of them even out tiles cut short.

Each pair's last tile is short. Simulated with programs that can draw twice their share of the bandwidth, ragged
batches of 8 to 512 pairs keep 80 % of the device busy with one round, 92 % with two, 95 % with three. More tiles mean
more partial results to write and merge.
"""

MERGED_AT_ONCE = 16
"""Partial results that a program of `merge_kernel` loads together: their latencies overlap."""

PLANNED_AT_ONCE = (128, 1024)
"""Pairs planned at once are a power of two: at least one per thread, and no more than registers hold."""


def rows_and_warps(config: LaunchConfig, rows: int, itemsize: int) -> tuple[int, int]:
    """Rows of a tile and warps of a program, for pairs of so many rows and elements of so many bytes.

    Twice the warps for more rows than a tensor core's 16, and for float32, which uses none: or registers spill.
    """
    block_m = min(config.block_m, max(16, triton.next_power_of_2(rows)))
    return block_m, config.num_warps * (2 if block_m > 16 or itemsize > 2 else 1)


def span_decode(call: Decode) -> tuple[Tensor, Tensor]:
    """As `moa_kernels.decode.reference.span_decode`."""
    query, keys, values, lens, layout, spans, scale, softcap, sink_logits = call
    batch, heads, new, head_dim = query.shape
    device = query.device
    output = torch.empty(query.shape, dtype=query.dtype, device=device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=device)
    if batch == 0:
        return output, lse
    query = rows_contiguous(query)
    kv_heads = len(spans.heads)
    pairs, group = batch * kv_heads, heads // kv_heads
    rows = group * new
    config = launch_config("decode", device, head_dim, query.element_size())
    block_m, num_warps = rows_and_warps(config, rows, query.element_size())
    target = TILES_PER_MULTIPROCESSOR * multiprocessors(device)
    # Rounding each pair up to whole tiles adds less than one for each.
    most_tiles = target + pairs
    # Partial results of every tile and row: weighted sum, maximum, total.
    partial = torch.empty(most_tiles, rows, head_dim, dtype=torch.float32, device=device)
    tops, totals = torch.empty(2, most_tiles, rows, dtype=torch.float32, device=device)
    fewest, most = PLANNED_AT_ONCE
    block_p = min(max(triton.next_power_of_2(pairs), fewest), most)
    # Where each pair's tiles end: written by the first kernel, read by the second.
    ends = torch.empty(pairs, dtype=torch.int32, device=device)
    split_kernel[(most_tiles, triton.cdiv(rows, block_m))](
        query, keys, values, lens, layout.tensor(device), spans.tensor(device), sink_logits,
        output, lse, partial, tops, totals, ends, scale, spans.sliding_window, pairs, kv_heads,
        *query.stride()[:3], *keys.stride()[:2], *values.stride()[:2],
        TARGET_TILES=target, PLANS=triton.cdiv(pairs, block_p), BLOCK_P=block_p, GROUP=group, NEW=new,
        HEAD_DIM=head_dim, SOFTCAP=softcap or 0.0, HAS_SINK_LOGITS=sink_logits is not None,
        UPCAST=interpreting() and query.dtype == torch.bfloat16,
        BLOCK_M=block_m, BLOCK_N=config.block_n, BLOCK_D=padded(head_dim),
        num_warps=num_warps, num_stages=config.num_stages, **COMPILER_OPTIONS,
    )  # fmt: skip
    merge_kernel[(pairs * rows,)](
        partial, tops, totals, ends, sink_logits, output, lse, kv_heads,
        ROWS=rows, NEW=new, HEAD_DIM=head_dim, HAS_SINK_LOGITS=sink_logits is not None,
        BLOCK_T=MERGED_AT_ONCE, BLOCK_D=padded(head_dim), **COMPILER_OPTIONS,
    )  # fmt: skip
    return output, lse
