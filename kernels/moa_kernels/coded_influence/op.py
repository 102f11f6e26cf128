"""The public operation: checks, and the choice of an implementation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moa_kernels.backends import choose, run
from moa_kernels.coded_influence.reference import CODED_STATISTICS, CodedInfluence
from moa_kernels.influence.op import check_numbers


def coded_changes(
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
    impl: str = "auto",
) -> dict[str, Tensor]:
    """What coding keys alone, and values alone, adds to the influence of every window.

    Memory is linear in N. Accumulates in float32, or float64 for float64 inputs. Fastest where every window keeps
    everything, and else where the windows have a common divisor of some dozens.

    Args:
        query: ``[heads, N, head_dim]``.
        keys: ``[key_codec, kv_heads, N, head_dim]``: first as the model has them, then as each codec gives them back,
            the sink's tokens untouched (`moa_kernels.codes.Codec.seen`).
        values: ``[value_codec, kv_heads, N, head_dim]``, likewise.
        grad_out: Gradient of the attention's output, ``[heads, N, head_dim]``.
        windows: Candidate windows in tokens, increasing; a window counts the query and excludes the sink.
        row_buckets: Number of slices of the rows.
        bucket_rows: Rows per slice; ``row_buckets * bucket_rows >= N``.
        sink: First tokens that are always kept.
        scale: Factor of the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        sink_logits: ``[heads]``, one more logit per head that takes weight but has no value; it is always kept.
        impl: ``"triton"``, ``"cpu"``, ``"torch"``, or ``"auto"``, as in `moa_kernels.backends`.

    Returns:
        `CODED_STATISTICS`, each ``[kv_heads, bucket, window, codec]``, less those of the plain pair; first the key
        codecs but the plain one, then the value codecs but the plain one.

    Raises:
        ValueError: Shapes or sizes don't fit together, or ``impl`` is unknown.
        BackendUnavailableError: What ``impl`` names can't run.
    """
    call = CodedInfluence(
        query, keys, values, grad_out, tuple(windows), row_buckets, bucket_rows, sink, scale, softcap, sink_logits
    )
    _check(call)
    backend = choose(impl, *call[:4], head_dim=keys.shape[-1])
    totals: Tensor = run(backend, "coded_influence.coded_changes", call)
    return dict(zip(CODED_STATISTICS, totals.unbind(), strict=True))


def _check(call: CodedInfluence) -> None:
    query, keys, values, grad_out, *_, sink_logits = call
    if query.ndim != 3 or keys.ndim != 4 or query.shape[0] % keys.shape[1] or query.shape[1:] != keys.shape[2:]:
        raise ValueError(
            f"query {tuple(query.shape)} must be [heads, N, head_dim] and keys {tuple(keys.shape)} [key_codec, "
            "kv_heads, N, head_dim], with kv_heads a divisor of heads"
        )
    if not len(keys) or not len(values):
        raise ValueError(
            f"there are {len(keys)} key and {len(values)} value codecs; the first of each is the plain one"
        )
    if values.ndim != 4 or values.shape[1:] != keys.shape[1:] or grad_out.shape != query.shape:
        raise ValueError(
            f"values are {tuple(values.shape)} and grad_out {tuple(grad_out.shape)}; beside this query and keys they "
            f"must be [value_codec, {', '.join(map(str, keys.shape[1:]))}] and {tuple(query.shape)}"
        )
    if sink_logits is not None and sink_logits.shape != query.shape[:1]:
        raise ValueError(f"sink_logits are {tuple(sink_logits.shape)}; they must be ({len(query)},)")
    check_numbers(call)
