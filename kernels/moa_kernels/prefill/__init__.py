"""Attention of a prompt, or of a chunk of one, in which every KV head attends its own spans."""

from __future__ import annotations

import torch
from torch import Tensor

from moa_kernels.backends import choose, interpreting, multiprocessors, on_device_of
from moa_kernels.launch import COMPILER_OPTIONS, launch_config, padded, rows_contiguous
from moa_kernels.prefill.reference import prefill_reference
from moa_kernels.prefill.work import plan_work
from moa_kernels.spans import HeadSpans

__all__ = ["span_prefill"]

MERGE_ROWS = 16
"""Rows that one program merges: few, so that the chip is busy even with one shared tile."""


def span_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: HeadSpans,
    *,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over contiguous keys, under one layer's rules (MoA, arXiv 2406.14909, eq. 3).

    Query t is the token of key ``keys - queries + t``. Key j of sample b is real iff ``starts[b] <= j < ends[b]``
    and has position ``j - starts[b]``; what is not real may hold anything, NaN included. A negative start says that
    earlier tokens exist whose keys aren't here: positions, and so windows, count them.

    Args:
        query: ``[batch, heads, queries, head_dim]``, float16, bfloat16 or float32; float64 with torch.
        key: ``[batch, kv_heads, keys, head_dim]``, ``queries <= keys``; consecutive query heads share a KV head.
        value: As ``key``.
        spans: Rules of the layer's KV heads.
        starts: int32 or int64 ``[batch]``, key of each sample's first token (left padding); 0 by default.
        ends: int32 or int64 ``[batch]``, key after each sample's last token (right padding); ``keys`` by default.
        scale: Factor of the scores; ``head_dim ** -0.5`` by default.
        softcap: Scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        sink_logits: ``[heads]``, one more logit per head that takes weight but has no value (GPT-OSS).
        impl: ``"triton"``, ``"torch"`` or ``"auto"``, as in `moa_kernels.backends`.

    Returns:
        Output ``[batch, heads, queries, head_dim]`` in the type of ``query``, and the natural log-sum-exp of the
        scores, float32 (float64 for float64 inputs) ``[batch, heads, queries]``. Rows of padding are 0, and -inf, or
        the sink logit where there is one.

    Raises:
        ValueError: Shapes don't fit each other or the rules.
        BackendUnavailableError: Triton was asked for and can't run.
    """
    _check(query, key, value, spans, starts, ends, sink_logits)
    chosen = choose(impl, query, key, value, head_dim=key.shape[3])
    out, lse = _span_prefill(
        query, key, value, starts, ends, sink_logits, spans.flat, spans.sliding_window,
        key.shape[3] ** -0.5 if scale is None else scale, softcap, chosen,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("moa_kernels::span_prefill", mutates_args=())
def _span_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    sink_logits: Tensor | None,
    spans: list[int],
    sliding_window: int,
    scale: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    rules = HeadSpans.from_flat(spans, sliding_window)
    if impl == "torch":
        return prefill_reference(
            query, key, value, rules, starts, ends, scale=scale, softcap=softcap, sink_logits=sink_logits
        )
    with on_device_of(query):
        return _launch(query, key, value, rules, starts, ends, scale, softcap, sink_logits)


@_span_prefill.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=wide)


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: HeadSpans,
    starts: Tensor | None,
    ends: Tensor | None,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from moa_kernels.prefill.kernel import merge_kernel, prefill_kernel

    query, key, value = (rows_contiguous(x) for x in (query, key, value))
    (batch, heads, queries, dim), (kv_heads, keys) = query.shape, key.shape[1:3]
    config = launch_config("prefill", query.device, dim, query.element_size())
    work = plan_work(
        spans, batch=batch, group=heads // kv_heads, queries=queries, keys=keys,
        token_bytes=2 * dim * key.element_size(), block_m=config.block_m, block_n=config.block_n,
        processors=multiprocessors(query.device), device=query.device,
    )  # fmt: skip
    block_d = padded(dim)
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
    partial_acc = query.new_empty(work.slots, config.block_m, block_d, dtype=torch.float32)
    partial_total, partial_top = query.new_empty(2, work.slots, config.block_m, dtype=torch.float32)
    flags = {
        "DIM": dim, "BLOCK_M": config.block_m, "BLOCK_D": block_d, "HAS_STARTS": starts is not None,
        "HAS_ENDS": ends is not None, "HAS_LOGITS": sink_logits is not None,
    }  # fmt: skip
    prefill_kernel[(len(work.items),)](
        query, key, value, out, lse, partial_acc, partial_total, partial_top, work.items, spans.tensor(query.device),
        starts, ends, sink_logits, scale, spans.sliding_window, queries, keys, heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        GROUP=heads // kv_heads, BLOCK_N=config.block_n, CAP=softcap or 0.0, SPLIT=work.slots > 0,
        UPCAST=interpreting() and query.dtype == torch.bfloat16,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", STAGES=config.num_stages,
        num_warps=config.num_warps, **flags, **COMPILER_OPTIONS,
    )  # fmt: skip
    if work.slots:
        merge_kernel[(len(work.shared), config.block_m // MERGE_ROWS)](
            partial_acc, partial_total, partial_top, out, lse, work.shared, starts, ends, sink_logits, queries, keys,
            heads, *out.stride()[:3], ROWS=MERGE_ROWS, **flags, **COMPILER_OPTIONS,
        )  # fmt: skip
    return out, lse


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: HeadSpans,
    starts: Tensor | None,
    ends: Tensor | None,
    sink_logits: Tensor | None,
) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            f"query, key and value must be [batch, heads, tokens, head_dim], keys and values alike; "
            f"they are {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    batch, heads, queries, dim = query.shape
    if (batch, dim) != (key.shape[0], key.shape[3]) or queries > key.shape[2] or queries == 0:
        raise ValueError(f"query {tuple(query.shape)} doesn't fit key {tuple(key.shape)}")
    if len(spans.heads) != key.shape[1] or heads % key.shape[1]:
        raise ValueError(f"{heads} query heads, {key.shape[1]} KV heads and rules of {len(spans.heads)} don't fit")
    for name, bound in (("starts", starts), ("ends", ends)):
        if bound is not None and (bound.shape != (batch,) or bound.dtype not in (torch.int32, torch.int64)):
            raise ValueError(f"{name} must be int32 or int64 [{batch}], not {bound.dtype} {tuple(bound.shape)}")
    if sink_logits is not None and sink_logits.shape != (heads,):
        raise ValueError(f"sink_logits must be [{heads}], not {tuple(sink_logits.shape)}")
