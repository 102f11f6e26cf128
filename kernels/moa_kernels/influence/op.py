"""The public operation: checks, the choice of an implementation, and the operator that a compiler sees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moa_kernels.backends import choose, run
from moa_kernels.influence.reference import STATISTICS, Influence

if TYPE_CHECKING:
    from moa_kernels.coded_influence.reference import CodedInfluence


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
    impl: str = "auto",
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
        impl: ``"triton"``, ``"cpu"``, ``"torch"``, or ``"auto"``, as in `moa_kernels.backends`.

    Returns:
        `STATISTICS` (design section 3), each ``[kv_heads, bucket, window]`` in the accumulation type, summed
        over the rows of the bucket and the query heads of the KV head.

    Raises:
        ValueError: Shapes or sizes don't fit together, or ``impl`` is unknown.
        BackendUnavailableError: What ``impl`` names can't run.
    """
    call = Influence(
        query, key, value, grad_out, tuple(windows), row_buckets, bucket_rows, sink, scale, softcap, sink_logits
    )
    _check(call)
    backend = choose(impl, *call[:4], head_dim=key.shape[-1])
    compiling = torch.compiler.is_compiling()
    totals: Tensor = _operator(*call, backend.value) if compiling else run(backend, "influence.influence_totals", call)
    return dict(zip(STATISTICS, totals.unbind(), strict=True))


@torch.library.custom_op(
    "moa_kernels::influence",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor grad_out, int[] windows, int row_buckets, "
    "int bucket_rows, int sink, float scale, float? softcap, Tensor? sink_logits, str impl) -> Tensor",
)
def _operator(*arguments: Any) -> Any:
    """`Influence` for compilers."""
    return run(arguments[-1], "influence.influence_totals", Influence(*arguments[:-1]))


@_operator.register_fake
def _(*arguments: Any) -> Tensor:
    call = Influence(*arguments[:-1])
    wide = torch.promote_types(call.query.dtype, torch.float32)
    shape = len(STATISTICS), call.key.shape[0], call.row_buckets, len(call.windows)
    return call.query.new_empty(shape, dtype=wide)


def _check(call: Influence) -> None:
    query, key, value, grad_out, *_, sink_logits = call
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
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != torch.Size(shape):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; beside this query and key it must be {tuple(shape)}")
    check_numbers(call)


def check_numbers(call: Influence | CodedInfluence) -> None:
    """Check what isn't a tensor.

    Raises:
        ValueError: A number is out of range.
    """
    _, _, _, _, windows, row_buckets, bucket_rows, sink, _, softcap, _ = call
    n = call.query.shape[1]
    if not windows or windows[0] < 1 or any(a >= b for a, b in pairwise(windows)):
        raise ValueError(f"windows are {windows}; they must be positive and increasing")
    if bucket_rows < 1 or row_buckets * bucket_rows < n:
        raise ValueError(f"{row_buckets} buckets of {bucket_rows} rows don't hold {n} rows")
    if sink < 0:
        raise ValueError(f"sink is {sink}; it can't be negative")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None")
