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

from moa_kernels.influence.reference import _attention, _chunks, _narrow_products, _product, _within

__all__ = ["CODED_STATISTICS", "coded_influence"]

CODED_STATISTICS = ("squared", "signed")


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
    unit = math.gcd(*(window for window in windows if window < n)) or n
    chunks = _chunks(n, group, query.device.type)
    most = max(group * (stop - start) * stop for start, stop in chunks)
    scratch = query.new_empty(3 + len(values), most, dtype=wide)
    for head in range(kv_heads):
        shared = slice(head * group, (head + 1) * group)
        queries, grads = query[shared].to(wide), grad_out[shared].to(wide)
        # Column c is key n-1-c: [codec, head_dim, n].
        turned_keys, turned_values = (x[:, head].to(wide).flip(1).mT.contiguous() for x in (keys, values))
        for start, stop in chunks:
            near = slice(n - stop, n)  # keys stop-1, stop-2, ..., 0
            rooms = [part[: group * (stop - start) * stop].view(group, stop - start, stop) for part in scratch]
            with _narrow_products(query):
                gains = [
                    _product(grads[:, start:stop], value[:, near], room)
                    for value, room in zip(turned_values, rooms[3:], strict=True)
                ]
            deltas = []
            row_gain = torch.empty(0)
            for codec, key in enumerate(turned_keys):
                with _narrow_products(query):
                    scores = _product(queries[:, start:stop], key[:, near], rooms[0]).mul_(scale)
                attention, kept = _attention(scores, softcap, None if logits is None else logits[head], rooms[1])
                if codec == 0:
                    row_gain = torch.mul(attention, gains[0], out=rooms[2]).sum(-1, keepdim=True)  # D
                deltas.append(_deltas(attention, gains, row_gain, kept, rooms[2], start, sink, sizes, unit))
            # [group, row, window, key_codec, value_codec] -> [statistic, row, window * pairs]
            delta = torch.stack(deltas, -2)
            by_row = torch.stack([delta.square().sum(0), delta.sum(0)]).flatten(2)
            first, last = start // bucket_rows, (stop - 1) // bucket_rows + 1
            bucket = torch.arange(start, stop, device=query.device) // bucket_rows
            member = (bucket == torch.arange(first, last, device=query.device)[:, None]).to(wide)
            totals[:, head, first:last] += member @ by_row
    shaped = totals.unflatten(-1, (len(windows), *pairs))
    return dict(zip(CODED_STATISTICS, shaped.unbind(), strict=True))


def _deltas(
    attention: Tensor,
    gains: list[Tensor],
    row_gain: Tensor,
    kept: Tensor | float,
    room: Tensor,
    start: int,
    sink: int,
    sizes: Tensor,
    unit: int,
) -> Tensor:
    """``delta`` of one key codec, ``[group, row, window, value_codec]``. Overwrites ``attention`` and ``room``."""
    stop = attention.shape[2]
    sunk = slice(max(0, stop - sink), stop)
    kept_gains, whole_gains = [], []
    for gain in gains:
        weighted = torch.mul(attention, gain, out=room)
        whole_gains.append(weighted.sum(-1, keepdim=True))
        sunk_gain = weighted[..., sunk].sum(-1, keepdim=True)
        kept_gains.append(_within(weighted, sunk, sizes, unit).add_(sunk_gain))
    mass = attention[..., sunk].sum(-1, keepdim=True)
    mass = mass + _within(attention, sunk, sizes, unit) + kept
    # Windows that keep everything aren't summed to their end; their weights, the sink logit's included, add up to 1.
    whole = (sizes > torch.arange(start, stop, device=sizes.device)[:, None] - sink)[..., None]
    partly = torch.stack(kept_gains, -1) / mass.clamp_min(torch.finfo(mass.dtype).tiny)[..., None]
    return torch.where(whole, torch.stack(whole_gains, -1), partly) - row_gain[..., None]


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
