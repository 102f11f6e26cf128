"""The prefill kernel's work: which program does which tile, longest first, and where a tile's keys are shared out."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_kernels.spans import HeadSpans

SECTION_BYTES = 2**25
"""Keys and values of the KV heads that are worked on together: they should fit the L2 cache of a large GPU."""

LONGEST_SHARE = 0.5
"""An item may take this share of the time that all work would take if spread evenly; longer ones are divided."""

FEWEST_TILES = 8
"""Tiles of keys below which dividing an item costs more than it gains."""

MOST_SHARES = 64


@dataclass(frozen=True)
class Work:
    """What the programs of one launch do.

    Attributes:
        items: int32 ``[items, 5]``: sample * heads + head, row tile, share, shares, workspace slot (-1 if unshared).
        shared: int32 ``[tiles, 4]``: sample * heads + head, row tile, first workspace slot, shares.
        slots: Workspace slots.
    """

    items: Tensor
    shared: Tensor
    slots: int


@functools.lru_cache(maxsize=512)
def plan_work(
    spans: HeadSpans,
    *,
    batch: int,
    group: int,
    queries: int,
    keys: int,
    token_bytes: int,
    block_m: int,
    block_n: int,
    processors: int,
    device: torch.device,
) -> Work:
    """Work for full-length samples; shorter ones leave some of it empty.

    Args:
        spans: Rules of the layer.
        batch: Samples.
        group: Query heads per KV head.
        queries: Query rows per sample.
        keys: Keys per sample.
        token_bytes: Of one token's key and value in one head.
        block_m: Rows per tile.
        block_n: Keys per tile.
        processors: Programs that run at once.
        device: Where the tables go.
    """
    cost = tiles_per_item(spans, queries, keys, block_m, block_n)  # [kv_heads, tiles]
    kv_heads, tiles = cost.shape
    section = _sections(cost, keys, block_n, token_bytes)
    # Head and row tile of every item: [kv_heads * tiles].
    kv_head, block = (x.flatten() for x in torch.meshgrid(torch.arange(kv_heads), torch.arange(tiles), indexing="ij"))
    cost = cost.flatten()
    # Longest first within a section; equally long ones by head and place, so that neighbours read the same keys.
    order = torch.argsort(section[kv_head] * (int(cost.max()) + 1) + cost.max() - cost, stable=True)
    shares = _shares(cost, batch * group, processors)

    # Samples and query heads of an item next to each other: they read the same keys.
    each = torch.arange(batch * group)
    place = order.repeat_interleave(batch * group)
    sample, member = each.repeat(len(order)) // group, each.repeat(len(order)) % group
    sample_head = (sample * kv_heads + kv_head[place]) * group + member
    # Divided items: a slot of the workspace per share, and a row for `merge_kernel`.
    count = shares[place]
    divided = count > 1
    slot = torch.where(divided, (count * divided).cumsum(0) - count, -1)
    shared = torch.stack([sample_head, block[place], slot, count], 1)[divided]
    # One row per share: [items, 5].
    item = torch.arange(len(place)).repeat_interleave(count)
    share = torch.arange(len(item)) - (count.cumsum(0) - count)[item]
    own_slot = torch.where(divided[item], slot[item] + share, -1)
    items = torch.stack([sample_head[item], block[place][item], share, count[item], own_slot], 1)
    return Work(
        items.int().to(device, non_blocking=True),
        shared.int().to(device, non_blocking=True),
        int((count * divided).sum()),
    )


def tiles_per_item(spans: HeadSpans, queries: int, keys: int, block_m: int, block_n: int) -> Tensor:
    """Tiles of keys that each tile of rows reads, int64 ``[kv_heads, row tiles]``."""
    # First row of each tile, as a column: [tiles].
    first = torch.arange(keys - queries, keys, block_m)
    reach = (first + block_m).clamp(max=keys)
    sink = torch.tensor([head[0] for head in spans.heads])[:, None]
    sink_from = (first - spans.sliding_window + 1).clamp(min=0)
    sink_tiles = _ceil(torch.minimum(sink, reach), block_n) - sink_from // block_n
    sink_tiles = torch.where(sink > sink_from, sink_tiles.clamp(min=0), 0)
    window_from = torch.maximum(spans.oldest_key(first).clamp(min=0) // block_n, sink_from // block_n + sink_tiles)
    return sink_tiles + (_ceil(reach, block_n) - window_from).clamp(min=0)


def _sections(cost: Tensor, keys: int, block_n: int, token_bytes: int) -> Tensor:
    """For each KV head the section in which it is worked on, those with much work first."""
    most = (cost.amax(1) * block_n).clamp(max=keys) * token_bytes
    order = torch.argsort(cost.sum(1), descending=True, stable=True)
    section = torch.empty_like(order)
    section[order] = (most[order].cumsum(0) - most[order]) // SECTION_BYTES
    return section


def _shares(cost: Tensor, repeats: int, processors: int) -> Tensor:
    """Into how many items each tile of rows is divided, so that no item outlasts the rest."""
    even = float(cost.sum()) * repeats / processors
    longest = max(int(even * LONGEST_SHARE), FEWEST_TILES)
    return _ceil(cost, longest).clamp(min=1, max=MOST_SHARES)


def _ceil(amount: Tensor, unit: int) -> Tensor:
    return -(-amount // unit)
