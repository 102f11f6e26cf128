"""Launches the Triton prefill kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from moa_kernels.backends import interpreting, multiprocessors
from moa_kernels.launch import COMPILER_OPTIONS, launch_config, padded, rows_contiguous
from moa_kernels.prefill.kernel import merge_kernel, prefill_kernel
from moa_kernels.prefill.reference import Prefill
from moa_kernels.prefill.work import plan_work

MERGE_ROWS = 16
"""Rows that one program merges: few, so that the chip is busy even with one shared tile."""


def span_prefill(call: Prefill) -> tuple[Tensor, Tensor]:
    """As `moa_kernels.prefill.reference.span_prefill`."""
    query, key, value = (rows_contiguous(x) for x in call[:3])
    spans, starts, ends, scale, softcap, sink_logits = call[3:]
    (batch, heads, queries, head_dim), (kv_heads, keys) = query.shape, key.shape[1:3]
    config = launch_config("prefill", query.device, head_dim, query.element_size())
    work = plan_work(
        spans, batch=batch, group=heads // kv_heads, queries=queries, keys=keys,
        token_bytes=2 * head_dim * key.element_size(), block_m=config.block_m, block_n=config.block_n,
        processors=multiprocessors(query.device), device=query.device,
    )  # fmt: skip
    block_d = padded(head_dim)
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
    # Shares of divided tiles: the running softmax of [slots, BLOCK_M] rows.
    partial = query.new_empty(work.slots, config.block_m, block_d, dtype=torch.float32)
    totals, tops = query.new_empty(2, work.slots, config.block_m, dtype=torch.float32)
    flags = {
        "HEAD_DIM": head_dim, "BLOCK_M": config.block_m, "BLOCK_D": block_d, "HAS_STARTS": starts is not None,
        "HAS_ENDS": ends is not None, "HAS_SINK_LOGITS": sink_logits is not None,
    }  # fmt: skip
    prefill_kernel[(len(work.items),)](
        query, key, value, out, lse, partial, totals, tops, work.items, spans.tensor(query.device),
        starts, ends, sink_logits, scale, spans.sliding_window, queries, keys, heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        GROUP=heads // kv_heads, BLOCK_N=config.block_n, SOFTCAP=softcap or 0.0, SPLIT=work.slots > 0,
        UPCAST=interpreting() and query.dtype == torch.bfloat16,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", STAGES=config.num_stages,
        num_warps=config.num_warps, **flags, **COMPILER_OPTIONS,
    )  # fmt: skip
    if work.slots:
        merge_kernel[(len(work.shared), config.block_m // MERGE_ROWS)](
            partial, totals, tops, out, lse, work.shared, starts, ends, sink_logits, queries, keys,
            heads, *out.stride()[:3], ROWS=MERGE_ROWS, **flags, **COMPILER_OPTIONS,
        )  # fmt: skip
    return out, lse
