"""Attention of the newest tokens over a ragged ring cache (decoding), where every KV head has its own span."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moa_kernels.backends import choose, on_device_of
from moa_kernels.decode import reference
from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans

__all__ = ["MOST_NEW_TOKENS", "span_decode"]

MOST_NEW_TOKENS = 8
"""New tokens per sample; more are a prefill."""


def span_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lens: Tensor,
    layout: RingLayout,
    spans: HeadSpans,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of the last ``new`` tokens of every sample, whose keys and values are in the cache already.

    Query t of sample b is at position ``lens[b] - new + t``. The work is planned on the device from ``lens``: no
    synchronisation, and a captured CUDA graph stays right while ``lens`` grows and rings wrap. Two runs give equal
    bits. No gradient is defined.

    Args:
        query: ``[batch, heads, new, head_dim]``, 1 to `MOST_NEW_TOKENS` new tokens. Query heads that share a KV head
            are consecutive.
        keys: ``[batch, slots, head_dim]``, the cache as ``layout`` describes it. Slots that hold no visible key may
            hold anything, NaN included.
        values: As ``keys``. In both, numbers of one slot must lie side by side.
        lens: int64 ``[batch]``, tokens stored per sample, the new ones included.
        layout: Where each head's keys are; it must hold all that the new tokens attend.
        spans: What each head attends.
        scale: Factor on the logits; ``head_dim ** -0.5`` by default.
        softcap: Bounds logits smoothly: ``softcap * tanh(logits / softcap)`` (Gemma 2).
        sink_logits: ``[heads]``, one more logit per head that takes weight but has no value (GPT-OSS).
        impl: ``"triton"``, ``"torch"`` or ``"auto"``.

    Returns:
        Output ``[batch, heads, new, head_dim]`` in the dtype of ``query``, and float32 ``[batch, heads, new]``, the
        natural logarithm of the sum of exponentials of each row's logits. A row that attends nothing (one before the
        first token, too) has output 0 and ``-inf``, or the sink logit.

    Raises:
        ValueError: Shapes, types or numbers don't fit.
        BackendUnavailableError: ``impl="triton"`` can't run here.
    """
    _check(query, keys, values, lens, layout, spans, softcap, sink_logits)
    result: tuple[Tensor, Tensor] = _span_decode(
        query,
        keys,
        values,
        lens,
        sink_logits,
        layout.flat,
        spans.flat,
        spans.sliding_window,
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        0.0 if softcap is None else float(softcap),
        impl,
    )
    return result


@torch.library.custom_op("moa_kernels::span_decode", mutates_args=())
def _span_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lens: Tensor,
    sink_logits: Tensor | None,
    layout: Sequence[int],
    spans: Sequence[int],
    sliding_window: int,
    scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`span_decode` on what an operator takes; ``softcap`` 0 means none."""
    rings, heads = RingLayout.from_flat(layout), HeadSpans.from_flat(spans, sliding_window)
    run = reference.span_decode
    if choose(impl, query, keys, values, head_dim=query.shape[-1]) == "triton":
        from moa_kernels.decode import kernel

        run = kernel.span_decode
    with on_device_of(query):
        return run(query, keys, values, lens, rings, heads, scale, softcap, sink_logits)


@_span_decode.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lens: Tensor,
    layout: RingLayout,
    spans: HeadSpans,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> None:
    if query.ndim != 4:
        raise ValueError(f"query must be [batch, heads, new, head_dim], not {list(query.shape)}")
    batch, heads, new, head_dim = query.shape
    kv_heads = len(layout.capacities)
    if not 1 <= new <= MOST_NEW_TOKENS:
        raise ValueError(f"query holds {new} new tokens; span_decode takes 1 to {MOST_NEW_TOKENS}")
    if len(spans.heads) != kv_heads:
        raise ValueError(f"layout has {kv_heads} KV heads, spans {len(spans.heads)}")
    if heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads can't share {kv_heads} KV heads evenly")
    if layout.sinks != tuple(head[0] for head in spans.heads):
        raise ValueError(f"layout and spans differ in sinks: {layout.sinks} and {[head[0] for head in spans.heads]}")
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.shape != (batch, layout.slots, head_dim):
            raise ValueError(f"{name} must be {[batch, layout.slots, head_dim]}, not {list(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} are {tensor.dtype}, query is {query.dtype}")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in head_dim, their strides are {tensor.stride()}")
    if lens.shape != (batch,) or lens.dtype != torch.int64:
        raise ValueError(f"lens must be int64 [{batch}], not {lens.dtype} {list(lens.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None")
    if sink_logits is not None and sink_logits.shape != (heads,):
        raise ValueError(f"sink_logits must be [{heads}], not {list(sink_logits.shape)}")
