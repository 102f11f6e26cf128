"""The public operation: checks, the choice of an implementation, and the operator that a compiler sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moa_kernels.backends import choose, run
from moa_kernels.decode.reference import Decode
from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans

if TYPE_CHECKING:
    from moa_kernels.coded.reference import DecodeCodes

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
        impl: ``"triton"``, ``"cpu"``, ``"torch"`` or ``"auto"``.

    Returns:
        Output ``[batch, heads, new, head_dim]`` in the dtype of ``query``, and float32 ``[batch, heads, new]``, the
        natural logarithm of the sum of exponentials of each row's logits. A row that attends nothing (one before the
        first token, too) has output 0 and ``-inf``, or the sink logit.

    Raises:
        ValueError: Shapes, types or numbers don't fit.
        BackendUnavailableError: What ``impl`` names can't run here.
    """
    call = Decode(
        query, keys, values, lens, layout, spans, query.shape[-1] ** -0.5 if scale is None else scale, softcap,
        sink_logits,
    )  # fmt: skip
    _check(call)
    backend = choose(impl, query, keys, values, head_dim=query.shape[-1])
    if torch.compiler.is_compiling():
        output, lse = _operator(*call[:4], layout.flat, spans.flat, spans.sliding_window, *call[6:], backend.value)
        return output, lse
    result: tuple[Tensor, Tensor] = run(backend, "decode.span_decode", call)
    return result


@torch.library.custom_op(
    "moa_kernels::span_decode",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, Tensor lens, int[] layout, int[] spans, int sliding_window, "
    "float scale, float? softcap, Tensor? sink_logits, str impl) -> (Tensor, Tensor)",
)
def _operator(*arguments: Any) -> Any:
    """`Decode` for compilers: layout and rules as integers."""
    query, keys, values, lens, layout, spans, sliding_window, *others, impl = arguments
    tables = RingLayout.from_flat(layout), HeadSpans.from_flat(spans, sliding_window)
    return run(impl, "decode.span_decode", Decode(query, keys, values, lens, *tables, *others))


@_operator.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def _check(call: Decode) -> None:
    query, keys, values, _, layout, *_ = call
    check_queries(call, layout, "span_decode")
    batch, _, _, head_dim = query.shape
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.shape != (batch, layout.slots, head_dim):
            raise ValueError(f"{name} must be {[batch, layout.slots, head_dim]}, not {list(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} are {tensor.dtype}, query is {query.dtype}")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in head_dim, their strides are {tensor.stride()}")


def check_queries(call: Decode | DecodeCodes, layout: RingLayout, operation: str) -> None:
    """Check what decoding takes beside what is stored.

    Raises:
        ValueError: Something doesn't fit.
    """
    query, lens, spans, sink_logits = call.query, call.lens, call.spans, call.sink_logits
    if query.ndim != 4:
        raise ValueError(f"query must be [batch, heads, new, head_dim], not {list(query.shape)}")
    batch, heads, new, _ = query.shape
    kv_heads = len(layout.capacities)
    if not 1 <= new <= MOST_NEW_TOKENS:
        raise ValueError(f"query holds {new} new tokens; {operation} takes 1 to {MOST_NEW_TOKENS}")
    if len(spans.heads) != kv_heads:
        raise ValueError(f"layout has {kv_heads} KV heads, spans {len(spans.heads)}")
    if heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads can't share {kv_heads} KV heads evenly")
    if layout.sinks != tuple(head[0] for head in spans.heads):
        raise ValueError(f"layout and spans differ in sinks: {layout.sinks} and {[head[0] for head in spans.heads]}")
    if lens.shape != (batch,) or lens.dtype != torch.int64:
        raise ValueError(f"lens must be int64 [{batch}], not {lens.dtype} {list(lens.shape)}")
    if call.softcap is not None and not call.softcap > 0:
        raise ValueError(f"softcap is {call.softcap}; it must be positive, or None")
    if sink_logits is not None and sink_logits.shape != (heads,):
        raise ValueError(f"sink_logits must be [{heads}], not {list(sink_logits.shape)}")
