"""Influence of shorter windows and coded keys and values together: the pass of `reference`, for pairs of codecs.

What a row keeps comes back from a codec, but for the sink. With ``A~_ij`` the attention over coded keys and ``g~_ij =
dO_i . v~_j`` over coded values, the loss changes to first order by

    delta_i(S) = dO_i . (o~_i(S) - o_i) = (sum_S A~_ij g~_ij) / (sum_S A~_ij) - D_i,    D_i = dO_i . o_i

so each pair of codecs takes two running sums more, and each codec one product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moa_kernels.backends import Backend, Impl, choose
from moa_kernels.influence.reference import Influence, _attention, _chunks, _narrow_products, _product

CODED_STATISTICS = ("squared", "signed")

UNIT = 64
"""Keys summed at once where every window keeps everything."""


def coded_influence(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    grad_out: Tensor,
    *,
    windows: Sequence[int],
    row_buckets: int,
    bucket_rows: int,
    sink: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> dict[str, Tensor]:
    """What every candidate window would cost under every pair of codecs, from one layer's tensors.

    Memory is linear in N. Accumulates in float32, or float64 for float64 inputs. Fastest where the windows have a
    common divisor of some dozens.

    Args:
        query: ``[heads, N, head_dim]``.
        keys: ``[key_codec, kv_heads, N, head_dim]``: first as the model has them, then as each codec gives them back,
            the sink's tokens untouched (`moa_kernels.codes.Codec.seen`).
        values: ``[value_codec, kv_heads, N, head_dim]``, likewise.
        grad_out: Gradient of the attention's output, ``[heads, N, head_dim]``.
        windows: As for `influence_statistics`, like everything that follows.
        row_buckets: Number of slices of the rows.
        bucket_rows: Rows per slice.
        sink: First tokens that are always kept.
        scale: Factor of the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        sink_logits: ``[heads]``.

    Returns:
        `CODED_STATISTICS`, each ``[kv_heads, bucket, window, key_codec, value_codec]`` in the accumulation type, summed
        over the rows of the bucket and the query heads of the KV head. The first codecs' pair is what
        `influence_statistics` gives.

    Raises:
        ValueError: Shapes or sizes don't fit together.
    """
    windows = tuple(windows)
    _check(query, keys, values, grad_out, windows, row_buckets, bucket_rows, sink, sink_logits)
    kv_heads, n, wide = keys.shape[1], query.shape[1], torch.promote_types(query.dtype, torch.float32)
    group = query.shape[0] // kv_heads
    pairs = (len(keys), len(values))
    totals = query.new_zeros(len(CODED_STATISTICS), kv_heads, row_buckets, len(windows) * math.prod(pairs), dtype=wide)
    logits = None if sink_logits is None else sink_logits.to(wide).view(kv_heads, group, 1, 1)
    sizes = torch.tensor(windows, device=query.device)
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
    shaped = totals.unflatten(-1, (len(windows), *pairs))
    return dict(zip(CODED_STATISTICS, shaped.unbind(), strict=True))


def coded_changes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    grad_out: Tensor,
    *,
    windows: Sequence[int],
    row_buckets: int,
    bucket_rows: int,
    sink: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: Impl = "auto",
) -> dict[str, Tensor]:
    """What coding keys alone, and values alone, adds to the influence of every window.

    Args:
        query: As for `coded_influence`, like all that follows.
        keys: ``[key_codec, kv_heads, N, head_dim]``, the first plain.
        values: ``[value_codec, kv_heads, N, head_dim]``, the first plain.
        grad_out: ``[heads, N, head_dim]``.
        windows: Candidate windows in tokens.
        row_buckets: Number of slices of the rows.
        bucket_rows: Rows per slice.
        sink: First tokens that are always kept.
        scale: Factor of the scores.
        softcap: Soft cap of the scores.
        sink_logits: ``[heads]``.
        impl: ``"cpu"``, ``"torch"``, or ``"auto"``: the CPU library where it runs. There is no Triton kernel yet, so
            ``"triton"`` is torch here.

    Returns:
        `CODED_STATISTICS`, each ``[kv_heads, bucket, window, codec]``, less those of the plain pair; first the key
        codecs but the plain one, then the value codecs but the plain one.

    Raises:
        ValueError: Shapes or sizes don't fit together, or ``impl`` is unknown.
        BackendUnavailableError: What ``impl`` names can't run.
    """
    _check(query, keys, values, grad_out, tuple(windows), row_buckets, bucket_rows, sink, sink_logits)
    plain = Influence(
        query, keys[0], values[0], grad_out, tuple(windows), row_buckets, bucket_rows, sink, scale, softcap, sink_logits
    )
    if choose(impl, *plain[:4], head_dim=keys.shape[-1]) == Backend.CPU:
        from moa_kernels.cpu import ops

        totals = ops.coded_changes(plain, keys[1:], values[1:])
        return dict(zip(CODED_STATISTICS, totals.unbind(), strict=True))
    pairs = coded_influence(
        query,
        keys,
        values,
        grad_out,
        windows=windows,
        row_buckets=row_buckets,
        bucket_rows=bucket_rows,
        sink=sink,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    return {
        name: torch.cat([both[..., 1:, 0], both[..., 0, 1:]], -1) - both[..., :1, 0] for name, both in pairs.items()
    }


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


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    grad_out: Tensor,
    windows: tuple[int, ...],
    row_buckets: int,
    bucket_rows: int,
    sink: int,
    sink_logits: Tensor | None,
) -> None:
    if query.ndim != 3 or keys.ndim != 4 or query.shape[0] % keys.shape[1] or query.shape[1:] != keys.shape[2:]:
        raise ValueError(
            f"query {tuple(query.shape)} must be [heads, N, head_dim] and keys {tuple(keys.shape)} [key_codec, "
            "kv_heads, N, head_dim], with kv_heads a divisor of heads"
        )
    heads, n, _ = query.shape
    if values.ndim != 4 or values.shape[1:] != keys.shape[1:] or grad_out.shape != query.shape:
        raise ValueError(
            f"values are {tuple(values.shape)} and grad_out {tuple(grad_out.shape)}; beside this query and keys they "
            f"must be [value_codec, {', '.join(map(str, keys.shape[1:]))}] and {tuple(query.shape)}"
        )
    if sink_logits is not None and sink_logits.shape != (heads,):
        raise ValueError(f"sink_logits are {tuple(sink_logits.shape)}; they must be ({heads},)")
    if not windows or windows[0] < 1 or any(a >= b for a, b in pairwise(windows)):
        raise ValueError(f"windows are {windows}; they must be positive and increasing")
    if bucket_rows < 1 or row_buckets * bucket_rows < n:
        raise ValueError(f"{row_buckets} buckets of {bucket_rows} rows don't hold {n} rows")
    if sink < 0:
        raise ValueError(f"sink is {sink}; it can't be negative")
