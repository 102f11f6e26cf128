"""Launches the kernels for coded keys and values and adds up what they leave."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from moa_kernels.coded_influence.kernel import coded_rows_kernel
from moa_kernels.coded_influence.reference import CODED_STATISTICS, CodedInfluence
from moa_kernels.influence.launch import capability, constants, lanes, window_sums
from moa_kernels.influence.reference import Influence
from moa_kernels.launch import COMPILER_OPTIONS, launch_config, rows_contiguous

MOST_CODECS = 3
"""Of a side in one launch: each takes registers for its sums, and with the plain pair they are a power of two."""

SHIFT, SHARE, BY_KEY, BY_VALUE = range(4)
"""What `coded_rows_kernel` leaves of a row."""


def coded_changes(call: CodedInfluence) -> Tensor:
    """As `moa_kernels.coded_influence.reference.coded_changes`; always float32."""
    query, keys, values, grad_out = (rows_contiguous(x) for x in call[:4])
    logits = None if call.sink_logits is None else call.sink_logits.float().contiguous()
    call = call._replace(query=query, keys=keys, values=values, grad_out=grad_out, sink_logits=logits)
    n, kv_heads, sides = query.shape[1], keys.shape[1], (len(keys) - 1, len(values) - 1)
    rows = row_statistics(call)
    plain = rows[0, :, BY_KEY]
    # What a row loses where it sees everything, [codec, heads, N].
    moved = torch.cat([rows[1 : 1 + sides[0], :, BY_KEY], rows[1 : 1 + sides[1], :, BY_VALUE]]) - plain
    totals = query.new_empty(
        len(CODED_STATISTICS), kv_heads, call.row_buckets, len(call.windows), len(moved), dtype=torch.float32
    )
    by_row = torch.stack([moved.square(), moved])
    for number, window in enumerate(call.windows):
        whole = min(window + call.sink, n)  # rows that keep everything
        padded = pad(by_row[..., :whole], (0, call.row_buckets * call.bucket_rows - whole))
        # [statistic, codec, kv_heads, group, bucket, row]
        by_bucket = padded.unflatten(-1, (call.row_buckets, -1)).unflatten(2, (kv_heads, -1))
        totals[:, :, :, number] = by_bucket.sum((3, 5), dtype=torch.float64).permute(0, 2, 3, 1)
    shorter = tuple(window for window in call.windows if window < n)
    if shorter:
        before = _delta_sums(call.plain, rows[0, :, :BY_VALUE], shorter)
        for codec, losses in enumerate(moved):
            number = codec + 1 if codec < sides[0] else codec + 1 - sides[0]
            # Coded keys have attention of their own; under coded values it is the plain one.
            if codec < sides[0]:
                seen, own = call.plain._replace(key=keys[number]), rows[number, :, :BY_VALUE]
            else:
                seen = call.plain._replace(value=values[number])
                own = torch.cat([rows[0, :, :BY_KEY], rows[number, :, BY_VALUE:]], 1)
            after = _delta_sums(seen, own, shorter, losses)
            totals[:, :, : after.shape[2], : len(shorter), codec] += after - before
    return totals


def row_statistics(call: CodedInfluence) -> Tensor:
    """Of every pair, the plain one first, each row's shift, share and ``D_i`` by keys and by values.

    ``[pair, heads, 4, N]``: attention over coded keys is ``share * 2 ** (score - shift)``. A side with fewer codecs
    than the other repeats its last.
    """
    (heads, n, head_dim), device = call.query.shape, call.query.device
    codecs = max(len(call.keys), len(call.values)) - 1
    launches = max(1, -(-codecs // MOST_CODECS))
    pairs = 1 + -(-codecs // launches)
    config = launch_config("coded_influence", device, head_dim, call.query.element_size())
    rows = call.query.new_empty(1 + launches * (pairs - 1), heads, 4, n, dtype=torch.float32)
    for skipped in range(0, max(codecs, 1), max(pairs - 1, 1)):
        found = rows if launches == 1 else call.query.new_empty(pairs, heads, 4, n, dtype=torch.float32)
        coded_rows_kernel[(triton.cdiv(n, config.block_m) * heads,)](
            *call[:4], call.sink_logits, found, n, heads, heads // call.keys.shape[1], call.scale,
            skipped, len(call.keys) - 1, len(call.values) - 1,
            *call.query.stride()[:2], *call.keys.stride()[:3], *call.values.stride()[:3], *call.grad_out.stride()[:2],
            **constants(call.plain), BLOCK_M=config.block_m, BLOCK_N=config.block_n, PAIRS=pairs,
            PADDED=triton.next_power_of_2(pairs), LANES=lanes(config.block_m, capability(device)),
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
            **COMPILER_OPTIONS,
        )  # fmt: skip
        if launches > 1:
            rows[0], rows[1 + skipped : skipped + pairs] = found[0], found[1:]
    return rows


def _delta_sums(call: Influence, rows: Tensor, shorter: tuple[int, ...], moved: Tensor | None = None) -> Tensor:
    """`CODED_STATISTICS` of rows that don't keep everything, float64 ``[statistic, kv_heads, bucket, window]``."""
    found = window_sums(call, rows.contiguous(), shorter, moved)
    return torch.cat([sums[: len(CODED_STATISTICS)] for _, sums in found], 1)
