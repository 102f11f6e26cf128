"""Launches the profiling kernels and adds up what they leave."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from moa_kernels.backends import interpreting
from moa_kernels.influence.kernel import aligned_kernel, banded_kernel, row_statistics_kernel
from moa_kernels.influence.reference import STATISTICS, Influence
from moa_kernels.launch import COMPILER_OPTIONS, LaunchConfig, launch_config, padded, rows_contiguous
from moa_kernels.spans import FOREVER

MOST_BYTES = 2**28
"""Heads are done in slices where a temporary tensor would be larger."""

SMALLEST_TILE = 16
"""Triton's matrix products take no fewer rows or keys."""

MOST_REGISTERS = 255
"""Per thread."""

FEWEST_WARPS, WARP_GROUP_ROWS = 4, 64
"""Hopper's matrix units serve groups of four warps and tiles of 64 rows."""


@dataclass(frozen=True)
class Tiling:
    """How rows and keys are cut.

    Attributes:
        block_m: Rows of a tile.
        block_n: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Tiles of keys in flight.
        max_registers: Per thread, or None.
        aligned: Whether every window shorter than the sequence is a multiple of ``block_n``.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None
    aligned: bool

    @property
    def groups(self) -> int:
        """Parts of a tile of rows that windows end in at different tiles of keys."""
        return self.block_m // self.block_n if self.aligned else 1


def lanes(block_m: int, capability: int) -> int:
    """Threads that share a row of a product; another number is slower, not wrong.

    Args:
        block_m: Rows of a tile.
        capability: The device's major one. A warp group of Hopper's takes whole rows, warps before may halve them.
    """
    return 4 if capability >= 9 and block_m >= WARP_GROUP_ROWS else 8


def capability(device: torch.device) -> int:
    """A device's major one; what isn't a GPU counts as the newest."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def tiling(config: LaunchConfig, windows: Sequence[int], bucket_rows: int, *, capped: bool = False) -> Tiling:
    """Cut so that no tile of rows spans two buckets, and if possible that windows end with tiles of keys.

    Args:
        config: The largest tiles.
        windows: Those shorter than the sequence.
        bucket_rows: Rows per bucket.
        capped: Whether scores are soft-capped, which takes registers that ``config`` may not leave.
    """
    block_m = config.block_m
    while block_m >= 2 * max(SMALLEST_TILE, bucket_rows):
        block_m //= 2
    num_warps = max(min(FEWEST_WARPS, config.num_warps), config.num_warps * block_m // config.block_m)
    unit = math.gcd(*windows)
    block_n = min(config.block_n, block_m, unit & -unit)
    aligned = block_n >= SMALLEST_TILE
    block_n = block_n if aligned else config.block_n
    registers = None
    if config.max_registers is not None and not capped:
        registers = min(MOST_REGISTERS, config.max_registers * config.num_warps // num_warps)
    return Tiling(block_m, block_n, num_warps, config.num_stages, registers, aligned)


def influence_totals(call: Influence) -> Tensor:
    """As `moa_kernels.influence.reference.influence_totals`; always float32."""
    query, key, value, grad_out = (rows_contiguous(x) for x in call[:4])
    logits = None if call.sink_logits is None else call.sink_logits.float().contiguous()
    call = call._replace(query=query, key=key, value=value, grad_out=grad_out, sink_logits=logits)
    windows, row_buckets, bucket_rows = call.windows, call.row_buckets, call.bucket_rows
    (heads, n, _), kv_heads = query.shape, key.shape[0]
    group = heads // kv_heads
    rows = row_statistics(call)
    totals = query.new_zeros(len(STATISTICS), kv_heads, row_buckets, len(windows), dtype=torch.float32)
    shorter = tuple(window for window in windows if window < n)  # the others keep everything
    for shared, found in window_sums(call, rows, shorter):
        totals[:, shared, : found.shape[2], : len(shorter)] = found
    # What rows with all their keys recall was left out; the sink logit's weight isn't recall.
    totals[4] += group * _whole_rows(tuple(windows), row_buckets, bucket_rows, n, call.sink, query.device)
    if logits is not None:
        totals[4] -= _weight_of_logits(rows, logits, kv_heads, row_buckets, bucket_rows)
    return totals


def row_statistics(call: Influence) -> Tensor:
    """Shift, share and ``D_i`` of every row, ``[heads, 3, N]``; attention is ``share * 2 ** (score - shift)``."""
    heads, n, head_dim = call.query.shape
    config = launch_config("influence", call.query.device, head_dim, call.query.element_size())
    rows = call.query.new_empty(heads, 3, n, dtype=torch.float32)
    row_statistics_kernel[(triton.cdiv(n, config.block_m) * heads,)](
        *call[:4], call.sink_logits, rows, n, heads, heads // call.key.shape[0], call.scale,
        *_strides(call), **constants(call), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
        **COMPILER_OPTIONS,
    )  # fmt: skip
    return rows


def window_sums(
    call: Influence, rows: Tensor, shorter: tuple[int, ...], moved: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """KV heads by slices, and their `STATISTICS` in float64, ``[statistic, kv_heads, bucket, window]``.

    Recall is that of rows which don't keep everything, the weight of the sink logit included. Buckets without rows are
    left out.

    Args:
        call: Arguments, with rows contiguous and sink logits in float32.
        rows: As `row_statistics` gives them.
        shorter: Windows shorter than the sequence, which the others see whole.
        moved: ``[heads, N]``, added to delta where a row doesn't keep everything.
    """
    if not shorter:
        return
    (heads, n, head_dim), kv_heads, bucket_rows = call.query.shape, call.key.shape[0], call.bucket_rows
    group = heads // kv_heads
    config = launch_config("influence", call.query.device, head_dim, call.query.element_size())
    cut = tiling(config, shorter, bucket_rows, capped=call.softcap is not None)
    bucket_tiles = -(-bucket_rows // cut.block_m)
    tiles = -(-n // bucket_rows) * bucket_tiles
    shape = (tiles, cut.groups, len(STATISTICS), len(shorter) + 1)
    for shared in _slices(kv_heads, 4 * group * math.prod(shape)):
        own = slice(shared.start * group, shared.stop * group)
        partial = call.query.new_zeros(own.stop - own.start, *shape, dtype=torch.float32)
        part = call._replace(
            query=call.query[own], key=call.key[shared], value=call.value[shared], grad_out=call.grad_out[own],
            windows=shorter, sink_logits=None if call.sink_logits is None else call.sink_logits[own],
        )  # fmt: skip
        _launch(part, rows[own], None if moved is None else moved[own], partial, cut)
        # [kv_heads, group, bucket, tile and group of rows, statistic, window or beyond]
        by_tile = partial.view(-1, group, tiles // bucket_tiles, bucket_tiles * cut.groups, *shape[2:])
        summed = by_tile.sum((1, 3), dtype=torch.float64).permute(2, 0, 1, 3)  # [statistic, kv_heads, bucket, ...]
        # A window masks the bands beyond it. Not by cumsum, which may change from run to run on a GPU.
        summed[3] = summed[3] @ summed.new_ones(summed.shape[-1], summed.shape[-1]).tril(-1)
        yield shared, summed[..., :-1]


def _launch(call: Influence, rows: Tensor, moved: Tensor | None, partial: Tensor, cut: Tiling) -> None:
    """Fill ``partial[heads, tile, group of rows, statistic, window or beyond]``; all windows are shorter than N."""
    heads, n, _ = call.query.shape
    device, windows, bucket_rows = call.query.device, tuple(call.windows), call.bucket_rows
    tiles, bands = partial.shape[1], len(windows) + 1
    if cut.aligned:
        kernel, tables = aligned_kernel, [*_crossings(windows, n, cut.block_m, cut.block_n, device)]
    else:
        kernel, tables = banded_kernel, [_ended(windows, device)]
    kernel[(tiles * heads,)](
        *call[:4], call.sink_logits, rows, moved, *tables, partial,
        n, heads, heads // call.key.shape[0], min(call.sink, n), call.scale,
        bucket_rows, -(-bucket_rows // cut.block_m), tiles, bands,
        *_strides(call), **constants(call), HAS_MOVED=moved is not None, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n,
        LANES=lanes(cut.block_m, capability(device)),
        num_warps=cut.num_warps, num_stages=cut.num_stages, maxnreg=cut.max_registers,
        **COMPILER_OPTIONS,
    )  # fmt: skip


def constants(call: Influence) -> dict[str, Any]:
    """What kernels are made for."""
    head_dim = call.query.shape[-1]
    return {
        "SOFTCAP": call.softcap or 0.0,
        "HAS_SINK_LOGITS": call.sink_logits is not None,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded(head_dim),
        "UPCAST": interpreting() and call.query.dtype == torch.bfloat16,
    }


def _strides(call: Influence) -> list[int]:
    """Of heads and tokens, for query, key, value and gradient."""
    return [stride for tensor in call[:4] for stride in tensor.stride()[:2]]


def _slices(count: int, bytes_each: int) -> Iterator[slice]:
    """Cut ``range(count)`` into parts of at most `MOST_BYTES`."""
    step = max(1, MOST_BYTES // bytes_each)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


@functools.lru_cache(maxsize=64)
def _crossings(
    windows: tuple[int, ...], n: int, block_m: int, block_n: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`aligned_kernel`'s ``PASSED`` and ``NEXT``."""
    # Row group g of a tile reaches key tile t at distance (t + g + 1 - groups) * block_n.
    groups = block_m // block_n
    key_tiles = -(-(n + block_m) // block_n) + 1
    ends = torch.arange(1 - groups, key_tiles + 1) * block_n
    passed = torch.searchsorted(torch.tensor(windows), ends, out_int32=True)
    tile = torch.arange(key_tiles, dtype=torch.int32)
    crossed = (passed[groups:] > passed[:-groups]) | (tile < groups)
    ahead = torch.where(crossed, tile, key_tiles).flip(0).cummin(0).values.flip(0)
    return passed.to(device), ahead.int().to(device)


@functools.lru_cache(maxsize=64)
def _ended(windows: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([*windows, FOREVER], dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=64)
def _whole_rows(
    windows: tuple[int, ...], row_buckets: int, bucket_rows: int, n: int, sink: int, device: torch.device
) -> Tensor:
    """How many rows of each bucket keep all their keys, which their window and the sink cover; ``[bucket, window]``."""
    # Rows below window + sink keep everything: [bucket, window].
    starts = (torch.arange(row_buckets + 1) * bucket_rows).clamp(max=n)
    start, stop = starts[:-1, None], starts[1:, None]
    whole = torch.minimum(torch.maximum(torch.tensor(windows) + sink, start), stop)
    return (whole - start).to(device)


def _weight_of_logits(rows: Tensor, sink_logits: Tensor, kv_heads: int, row_buckets: int, bucket_rows: int) -> Tensor:
    """What the sink logits take of each bucket's attention, ``[kv_heads, bucket, 1]``."""
    # [heads, N]
    weight = rows[:, 1] * torch.exp2(sink_logits[:, None] * math.log2(math.e) - rows[:, 0])
    by_bucket = pad(weight, (0, row_buckets * bucket_rows - weight.shape[1])).view(
        kv_heads, -1, row_buckets, bucket_rows
    )
    return by_bucket.sum((1, 3), dtype=torch.float64)[..., None]
