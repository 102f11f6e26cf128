"""The public operation: checks, the choice of an implementation, and the operator that a compiler sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moa_kernels.backends import choose, run
from moa_kernels.prefill.reference import Prefill
from moa_kernels.spans import HeadSpans


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
        impl: ``"triton"``, ``"cpu"``, ``"torch"`` or ``"auto"``, as in `moa_kernels.backends`.

    Returns:
        Output ``[batch, heads, queries, head_dim]`` in the type of ``query``, and the natural log-sum-exp of the
        scores, float32 (float64 for float64 inputs) ``[batch, heads, queries]``. Rows of padding are 0, and -inf, or
        the sink logit where there is one.

    Raises:
        ValueError: Shapes don't fit each other or the rules.
        BackendUnavailableError: What ``impl`` names can't run here.
    """
    call = Prefill(
        query, key, value, spans, starts, ends, key.shape[-1] ** -0.5 if scale is None else scale, softcap, sink_logits
    )
    _check(call)
    # Once: neither the operator nor an implementation asks again.
    backend = choose(impl, query, key, value, head_dim=key.shape[3])
    if torch.compiler.is_compiling():
        out, lse = _operator(*call[:3], spans.flat, spans.sliding_window, *call[4:], backend.value)
        return out, lse
    result: tuple[Tensor, Tensor] = run(backend, "prefill.span_prefill", call)
    return result


@torch.library.custom_op(
    "moa_kernels::span_prefill",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, int[] spans, int sliding_window, Tensor? starts, Tensor? ends, "
    "float scale, float? softcap, Tensor? sink_logits, str impl) -> (Tensor, Tensor)",
)
def _operator(*arguments: Any) -> Any:
    """`Prefill` for compilers: rules as integers."""
    query, key, value, spans, sliding_window, *others, impl = arguments
    return run(
        impl, "prefill.span_prefill", Prefill(query, key, value, HeadSpans.from_flat(spans, sliding_window), *others)
    )


@_operator.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=wide)


def _check(call: Prefill) -> None:
    query, key, value, spans, starts, ends, _, softcap, sink_logits = call
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
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None")
