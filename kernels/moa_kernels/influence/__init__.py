"""Influence of shorter windows on the loss: one pass over a layer's attention, backwards.

For a query row i with attention ``A_ij``, output gradient ``dO_i`` and ``g_ij = dO_i . v_j``, restricting the
row to a kept set S renormalises its softmax, and the loss changes to first order by

    delta_i(S) = dO_i . (o_i(S) - o_i) = (sum_S A_ij g_ij) / (sum_S A_ij) - D_i,    D_i = sum_j A_ij g_ij

so two running sums per row, over keys ordered from nearest to farthest after the sink, give every window at
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moa_kernels.backends import Impl, choose, on_device_of
from moa_kernels.influence import reference
from moa_kernels.influence.reference import STATISTICS

__all__ = ["STATISTICS", "influence_statistics"]


def influence_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    *,
    windows: Sequence[int],
    row_buckets: int,
    bucket_rows: int,
    sink: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    impl: Impl = "auto",
) -> dict[str, Tensor]:
    """What every candidate window would cost, from one layer's tensors and its output's gradient.

    Memory is linear in N. Accumulates in float32, or float64 for float64 inputs. Fastest where the windows have a
    common divisor of some dozens.

    Args:
        query: ``[heads, N, head_dim]``.
        key: ``[kv_heads, N, head_dim]``; consecutive query heads share a KV head.
        value: ``[kv_heads, N, head_dim]``.
        grad_out: Gradient of the attention's output, ``[heads, N, head_dim]``.
        windows: Candidate windows in tokens, increasing; a window counts the query and excludes the sink.
        row_buckets: Number of slices of the rows.
        bucket_rows: Rows per slice; ``row_buckets * bucket_rows >= N``.
        sink: First tokens that are always kept.
        scale: Factor of the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        sink_logits: ``[heads]``, one more logit per head that takes weight but has no value (GPT-OSS); it is
            always kept.
        out: The attention's output, ``[heads, N, head_dim]``. Together with ``lse`` it saves Triton a pass of about
            half the work of its main one; in 16 bits its rounding enters ``D_i``, and so the cost of windows that
            lose little. Torch ignores both.
        lse: Natural log of the softmax's denominators, sink logit included, float32 ``[heads, N]``.
        impl: ``"triton"``, ``"torch"``, or ``"auto"``: Triton on CUDA devices.

    Returns:
        `STATISTICS` (design section 3), each ``[kv_heads, bucket, window]`` in the accumulation type, summed
        over the rows of the bucket and the query heads of the KV head.

    Raises:
        ValueError: Shapes or sizes don't fit together, or ``impl`` is unknown.
        BackendUnavailableError: Triton was asked for and can't run.
    """
    windows = tuple(windows)
    _check(query, key, value, grad_out, windows, row_buckets, bucket_rows, sink, sink_logits, out, lse)
    chosen = choose(impl, query, key, value, grad_out, head_dim=key.shape[-1])
    totals = _influence(
        query, key, value, grad_out, windows, row_buckets, bucket_rows, sink, scale, softcap, sink_logits, out, lse,
        chosen == "triton",
    )  # fmt: skip
    return dict(zip(STATISTICS, totals.unbind(), strict=True))


@torch.library.custom_op("moa_kernels::influence", mutates_args=())
def _influence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    windows: Sequence[int],
    row_buckets: int,
    bucket_rows: int,
    sink: int,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    by_triton: bool,
) -> Tensor:
    """`STATISTICS` as one tensor, ``[statistic, kv_heads, bucket, window]``."""
    sizes: dict[str, Any] = {"windows": windows, "row_buckets": row_buckets, "bucket_rows": bucket_rows, "sink": sink}
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    if not by_triton:
        return reference.influence_totals(query, key, value, grad_out, **sizes, **options)
    from moa_kernels.influence import launcher

    with on_device_of(query):
        return launcher.influence_totals(query, key, value, grad_out, **sizes, **options, out=out, lse=lse)


@_influence.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, windows: Sequence[int], row_buckets: int, *_: object
) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(len(STATISTICS), key.shape[0], row_buckets, len(windows), dtype=wide)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    windows: tuple[int, ...],
    row_buckets: int,
    bucket_rows: int,
    sink: int,
    sink_logits: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
) -> None:
    if query.ndim != 3 or key.ndim != 3 or query.shape[0] % key.shape[0]:
        raise ValueError(
            f"query {tuple(query.shape)} must be [heads, N, head_dim] and key {tuple(key.shape)} [kv_heads, N, "
            "head_dim], with kv_heads a divisor of heads"
        )
    heads, n, _ = query.shape
    expected = {
        "key": (key, (key.shape[0], n, query.shape[2])),
        "value": (value, key.shape),
        "grad_out": (grad_out, query.shape),
        "sink_logits": (sink_logits, (heads,)),
        "out": (out, query.shape),
        "lse": (lse, (heads, n)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != torch.Size(shape):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; beside this query and key it must be {tuple(shape)}")
    if not windows or windows[0] < 1 or any(a >= b for a, b in pairwise(windows)):
        raise ValueError(f"windows are {windows}; they must be positive and increasing")
    if bucket_rows < 1 or row_buckets * bucket_rows < n:
        raise ValueError(f"{row_buckets} buckets of {bucket_rows} rows don't hold {n} rows")
    if sink < 0:
        raise ValueError(f"sink is {sink}; it can't be negative")
