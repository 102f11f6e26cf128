"""The pass in torch for pairs of codecs, chunked over rows: runs anywhere, and what kernels are tested against."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moa_kernels.influence.reference import Influence, _attention, _chunks, _narrow_products, _product

CODED_STATISTICS = ("squared", "signed")

UNIT = 64
"""Keys summed at once where every window keeps everything."""


class CodedInfluence(NamedTuple):
    """Checked arguments of `moa_kernels.coded_influence.coded_changes`, which describes them."""

    query: Tensor
    keys: Tensor
    values: Tensor
    grad_out: Tensor
    windows: Sequence[int]
    row_buckets: int
    bucket_rows: int
    sink: int
    scale: float
    softcap: float | None
    sink_logits: Tensor | None

    @property
    def plain(self) -> Influence:
        """Of the first keys and values alone."""
        return Influence(self.query, self.keys[0], self.values[0], *self[3:])


def coded_changes(call: CodedInfluence) -> Tensor:
    """Changes as one tensor ``[statistic, kv_heads, bucket, window, codec]``, in float32 or wider."""
    pairs = pair_totals(call)
    return torch.cat([pairs[..., 1:, 0], pairs[..., 0, 1:]], -1) - pairs[..., :1, 0]


def pair_totals(call: CodedInfluence) -> Tensor:
    """`CODED_STATISTICS` of every pair of codecs, ``[statistic, kv_heads, bucket, window, key_codec, value_codec]``.

    The first codecs' pair is what `moa_kernels.influence` gives.
    """
    query, keys, values, grad_out, windows, row_buckets, bucket_rows, sink, scale, softcap, sink_logits = call
    kv_heads, n, wide = keys.shape[1], query.shape[1], torch.promote_types(query.dtype, torch.float32)
    group = query.shape[0] // kv_heads
    pairs = (len(keys), len(values))
    totals = query.new_zeros(len(CODED_STATISTICS), kv_heads, row_buckets, len(windows) * math.prod(pairs), dtype=wide)
    logits = None if sink_logits is None else sink_logits.to(wide).view(kv_heads, group, 1, 1)
    sizes = _sizes(tuple(windows), query.device)
    unit = math.gcd(*(window for window in windows if window < n)) or min(n, UNIT)
    matrices = 1 + sum(pairs) + 1
    # A GPU's chunks are as large as three matrices of theirs may be; here more of them share that memory.
    share = 1 if query.device.type == "cpu" else -(-matrices // 3)
    chunks = _chunks(n, group * share, query.device.type)
    most = max(group * (stop - start) * _width(stop, unit) for start, stop in chunks)
    scratch = query.new_empty(matrices, most, dtype=wide)
    for head in range(kv_heads):
        shared = slice(head * group, (head + 1) * group)
        queries, grads = query[shared].to(wide), grad_out[shared].to(wide)
        turned_keys, turned_values = (_turned(x[:, head].to(wide), unit) for x in (keys, values))
        for start, stop in chunks:
            shape = (group, stop - start, _width(stop, unit))
            rooms = scratch[:, : math.prod(shape)].view(-1, *shape)
            scores, attention, gains = rooms[0], rooms[1 : 1 + len(keys)], rooms[1 + len(keys) :]
            near = slice(n - stop, n - stop + shape[2])  # keys stop-1, stop-2, ..., 0, then padding
            kept: list[Tensor | float] = []
            with _narrow_products(query):
                for key, room in zip(turned_keys, attention, strict=True):
                    _product(queries[:, start:stop], key[:, near], scores).mul_(scale)
                    if softcap is not None:
                        scores.div_(softcap).tanh_().mul_(softcap)
                    scores[..., stop:] = -torch.inf
                    kept.append(_attention(scores, None, None if logits is None else logits[head], room)[1])
                for value, room in zip(turned_values, gains, strict=False):
                    _product(grads[:, start:stop], value[:, near], room)
            gains[-1] = 1  # the sum of A is that of A g with g = 1
            delta = _deltas(attention, gains, kept, start, stop, sink, sizes, unit)
            by_row = torch.stack([delta.square().sum(0), delta.sum(0)]).flatten(2)  # [statistic, row, window * pairs]
            first, last = start // bucket_rows, (stop - 1) // bucket_rows + 1
            bucket = torch.arange(start, stop, device=query.device) // bucket_rows
            member = (bucket == torch.arange(first, last, device=query.device)[:, None]).to(wide)
            totals[:, head, first:last] += member @ by_row
    shaped: Tensor = totals.unflatten(-1, (len(windows), *pairs))
    return shaped


@functools.lru_cache(maxsize=16)
def _sizes(windows: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once, so that a CUDA graph can capture the pass."""
    return torch.tensor(windows, device=device)


def _width(stop: int, unit: int) -> int:
    """Columns of a chunk's matrices: its keys, and padding up to one more than whole units."""
    return -(-stop // unit) * unit + 1


def _turned(x: Tensor, unit: int) -> Tensor:
    """``[codec, n, head_dim]`` as ``[codec, head_dim, column]``: column c is token n-1-c; zeros follow."""
    return torch.nn.functional.pad(x.flip(1), (0, 0, 0, unit + 1)).mT.contiguous()


def _deltas(
    attention: Tensor,
    gains: Tensor,
    kept: list[Tensor | float],
    start: int,
    stop: int,
    sink: int,
    sizes: Tensor,
    unit: int,
) -> Tensor:
    """``delta`` of every row, ``[group, row, window, key_codec, value_codec]``. Overwrites ``attention``.

    Args:
        attention: ``[key_codec, group, row, column]``.
        gains: ``g``, ``[value_codec + 1, group, row, column]``; the last are ones.
        kept: By key codec the weight of the sink logits, ``[group, row, 1]``.
        start: First row.
        stop: One past the last row.
        sink: First tokens that are always kept.
        sizes: Windows.
        unit: Divides every window but those that keep everything.
    """
    group, rows, width = attention.shape[1:]
    sunk = slice(max(0, stop - sink), stop)
    always = attention[..., sunk].permute(1, 2, 0, 3) @ gains[..., sunk].permute(1, 2, 3, 0)
    attention[..., sunk] = 0
    # Row r's key at distance d stands in column d + rows - 1 - r, and rows are one longer than whole units. So from
    # column rows - 1 of the first row on, memory is one unit of distances after the other, row by row: what runs over
    # a row's end are the masked zeros of the next.
    blocks = (width - 1) // unit
    span = slice(rows - 1, rows - 1 + rows * blocks * unit)
    attention, gains = (x.flatten(2)[..., span].unflatten(-1, (-1, unit)) for x in (attention, gains))
    by_block = attention.new_empty(group, rows * blocks, len(attention), len(gains))
    for head in range(group):  # [row * block, key_codec, unit] @ [row * block, unit, value_codec + 1]
        torch.bmm(attention[:, head].transpose(0, 1), gains[:, head].permute(1, 2, 0), out=by_block[head])
    sums = by_block.unflatten(1, (rows, blocks)).cumsum_(2)  # [group, row, block, key_codec, value_codec + 1]
    last = torch.div(sizes, unit, rounding_mode="floor").clamp_max(blocks) - 1
    whole = sizes > torch.arange(start, stop, device=sizes.device)[:, None] - sink
    sums = torch.where(whole[..., None, None], sums[:, :, -1:], sums.index_select(2, last.clamp_min(0)))
    sums = torch.cat([sums, by_block.unflatten(1, (rows, blocks))[:, :, -1:]], 2) + always[:, :, None]
    weights = sums[..., -1:]
    if isinstance(kept[0], Tensor):
        weights = weights + torch.stack([part for part in kept if isinstance(part, Tensor)], -2)[:, :, None]
    outcome = sums[..., :-1] / weights.clamp_min(torch.finfo(sums.dtype).tiny)  # dO . o~
    return outcome[:, :, :-1] - outcome[:, :, -1:, :1, :1]
