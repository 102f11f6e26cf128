"""The operations of `moa_kernels` by the library: same arguments, same results as their torch references."""

from __future__ import annotations

from ctypes import byref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moa_kernels.cpu.calls import LayerCall, place_rings, rows_contiguous, strided
from moa_kernels.cpu.coded import append_codes, decode_codes, see_tokens, stored_states
from moa_kernels.cpu.library import DTYPES, Call, Influence, Strided, library

__all__ = [
    "append_codes",
    "append_tokens",
    "coded_changes",
    "decode_codes",
    "influence_totals",
    "see_tokens",
    "span_decode",
    "span_prefill",
    "stored_states",
]

if TYPE_CHECKING:
    from moa_kernels.append.reference import Append
    from moa_kernels.coded_influence.reference import CodedInfluence
    from moa_kernels.decode.reference import Decode
    from moa_kernels.influence.reference import Influence as InfluenceCall
    from moa_kernels.prefill.reference import Prefill


def span_prefill(call: Prefill) -> tuple[Tensor, Tensor]:
    """As `moa_kernels.prefill.span_prefill`."""
    query, key = call.query, call.key
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
    run = LayerCall(
        query, call.spans, scale=call.scale, softcap=call.softcap, sink_logits=call.sink_logits, out=out
    )  # fmt: skip
    run.new_tokens(key, call.value)
    run.log_sum_exp(lse)
    if call.starts is not None or call.ends is not None:
        batch, keys = len(query), key.shape[2]
        starts = query.new_zeros(batch, dtype=torch.int64) if call.starts is None else call.starts.long()
        ends = torch.full_like(starts, keys) if call.ends is None else call.ends.long().clamp(max=keys)
        first = starts.clamp(min=0)
        run.real((ends - first).clamp(min=0), first[:, None] + torch.arange(keys))
        run.before((-starts).clamp(min=0))  # tokens that positions count, and whose keys aren't here
    run.run("prefill")
    return out, lse


def span_decode(call: Decode) -> tuple[Tensor, Tensor]:
    """As `moa_kernels.decode.span_decode`."""
    query = call.query
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
    run = LayerCall(
        query, call.spans, scale=call.scale, softcap=call.softcap, sink_logits=call.sink_logits, out=out
    )  # fmt: skip
    run.rings(call.keys, call.values, call.layout)
    run.before(call.lens.contiguous())
    run.log_sum_exp(lse)
    run.run("decode")
    return out, lse


def append_tokens(call: Append) -> None:
    """As `moa_kernels.append.append_tokens`, for types of any size."""
    new_keys, new_values = (rows_contiguous(states) for states in (call.new_keys, call.new_values))
    struct = Call(key=strided(new_keys), value=strided(new_values))
    struct.batch, struct.kv_heads, struct.new_keys, struct.dim = new_keys.shape
    struct.value_dim, struct.item_bytes = new_values.shape[3], new_keys.itemsize
    place_rings(struct, call.keys, call.values)
    lens, rings = call.lens.contiguous(), call.layout.tensor(call.keys.device)
    counts = None if call.counts is None else call.counts.contiguous()
    struct.lens, struct.rings = lens.data_ptr(), rings.data_ptr()
    struct.counts = None if counts is None else counts.data_ptr()
    library().moa_append(byref(struct))


def coded_changes(call: CodedInfluence) -> Tensor:
    """As `moa_kernels.coded_influence.reference.coded_changes`, for types of at most 32 bits."""
    gains = call.query.new_empty(call.query.shape[:2], dtype=torch.float32)
    plain = influence_totals(call.plain, row_gains=gains)[:2]
    calls = [call.plain._replace(key=key) for key in call.keys[1:]]
    calls += [call.plain._replace(value=value) for value in call.values[1:]]
    return torch.stack([influence_totals(coded, origins=gains)[:2] - plain for coded in calls], -1)


def influence_totals(call: InfluenceCall, *, origins: Tensor | None = None, row_gains: Tensor | None = None) -> Tensor:
    """As `moa_kernels.influence.reference.influence_totals`, for types of at most 32 bits.

    Args:
        call: The arguments.
        origins: ``D`` of each row, ``[heads, N]``, where it is that of other keys or values.
        row_gains: Where this attention's own ``D`` goes, ``[heads, N]``.
    """
    query, key, value, grad_out = (rows_contiguous(x) for x in (call.query, call.key, call.value, call.grad_out))
    scale = call.scale
    if scale <= 0:
        query, scale = (-query, -scale) if scale < 0 else (torch.zeros_like(query), 1.0)
    kv_heads, window_count = key.shape[0], len(call.windows)
    totals = query.new_empty(5, kv_heads, call.row_buckets, window_count, dtype=torch.float32)
    windows = torch.tensor([min(window, 2**30) for window in call.windows], dtype=torch.int32)
    logits = None if call.sink_logits is None else call.sink_logits.detach().float().contiguous()
    struct = Influence(*(Strided(x.data_ptr(), 0, *x.stride()[:2]) for x in (query, grad_out, key, value)))
    struct.windows, struct.totals = windows.data_ptr(), totals.data_ptr()
    struct.sink_logits = None if logits is None else logits.data_ptr()
    struct.origins = None if origins is None else origins.data_ptr()
    struct.row_gains = None if row_gains is None else row_gains.data_ptr()
    struct.heads, struct.rows, struct.dim = query.shape
    struct.kv_heads, struct.sink, struct.window_count = kv_heads, call.sink, window_count
    struct.buckets, struct.bucket_rows = call.row_buckets, call.bucket_rows
    struct.scale, struct.softcap = scale, call.softcap or 0.0
    struct.dtype, struct.threads = DTYPES[query.dtype], torch.get_num_threads()
    library().moa_influence(byref(struct))
    return totals
