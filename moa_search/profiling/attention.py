"""The attention function that profiling puts into a model: dense, observed in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from moa_kernels.backends import Impl
from moa_kernels.dense_attention import dense_attention
from moa_kernels.influence import influence_statistics
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa_search.errors import ModelUnsupportedError
from moa_search.modeling.attention import swapped
from moa_search.profiling.tiers import TierMeter

IMPLEMENTATION = "moa_profile"
"""Name under which the function is registered with transformers."""

ATTRIBUTE = "_moa_recorder"
"""Where attention modules carry the recorder: autograd may run backward in a thread that sees no context."""


@dataclass
class Recorder:
    """Collects one sample's statistics, layer by layer, as the backward pass reaches them.

    Attributes:
        windows: Candidate windows in tokens.
        row_buckets: Slices of the rows.
        bucket_rows: Rows per slice.
        sink: First tokens always kept.
        native: The layers that have a sliding window of their own, in tokens; they aren't measured.
        length: Target length of the sample, in tokens.
        impl: Which implementation computes the statistics, as in `moa_kernels.backends`.
        tiers: Measures the changes by codecs, too; None for spans alone.
        layers: By layer index, each statistic as ``[kv_heads, bucket, window]`` on the CPU; those of tiers have
            buckets and windows of their own.
    """

    windows: tuple[int, ...]
    row_buckets: int
    bucket_rows: int
    sink: int
    native: dict[int, int]
    length: int
    impl: Impl = "auto"
    tiers: TierMeter | None = None
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)


class _Observed(torch.autograd.Function):
    """Passes an attention's output on, and its gradient back; the gradient shows what each window would cost.

    Saves queries, keys and values, which attention itself saves too; under gradient checkpointing no more than
    one layer's are alive at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, query: Tensor, key: Tensor, value: Tensor, module: Any, options: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.module, ctx.options = module, options
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        recorder: Recorder = getattr(ctx.module, ATTRIBUTE)
        query, key, value = ctx.saved_tensors
        statistics = influence_statistics(
            query,
            key,
            value,
            grads[0],
            windows=recorder.windows,
            row_buckets=recorder.row_buckets,
            bucket_rows=recorder.bucket_rows,
            sink=recorder.sink,
            impl=recorder.impl,
            **ctx.options,
        )
        layer, sink = ctx.module.layer_idx, recorder.sink
        if recorder.tiers is not None:
            statistics |= recorder.tiers.changes(
                layer, query, key, value, grads[0], length=recorder.length, sink=sink, **ctx.options
            )
        recorder.layers[layer] = {name: value.cpu() for name, value in statistics.items()}
        return grads[0], None, None, None, None, None


def profile_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with ``transformers.AttentionInterface``; one unpadded sample at a time.

    Args:
        module: The attention module; carries the recorder.
        query: ``[1, heads, N, head_dim]``.
        key: ``[1, kv_heads, N, head_dim]``.
        value: ``[1, kv_heads, N, head_dim]``.
        attention_mask: Unused; samples have no padding.
        scaling: Factor of the scores; ``head_dim ** -0.5`` if None.
        dropout: Must be 0.
        softcap: Score soft cap.
        sliding_window: The model's own window in tokens; such a layer is kept as it is and not measured.
        s_aux: Learned sink logits, ``[heads]``.
        position_bias: Additive bias; not supported.
        kwargs: Further arguments of transformers that change nothing here.

    Returns:
        ``([1, N, heads, head_dim], None)``.
    """
    recorder: Recorder = getattr(module, ATTRIBUTE)
    out, options, window = dense(
        module,
        query,
        key,
        value,
        recorder.native,
        scaling=scaling,
        dropout=dropout,
        softcap=softcap,
        sliding_window=sliding_window,
        s_aux=s_aux,
        position_bias=position_bias,
    )
    if window is None:
        out = _Observed.apply(out, query[0], key[0], value[0], module, options)  # type: ignore[no-untyped-call]
    return out.transpose(0, 1)[None].contiguous(), None


def dense(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    native: dict[int, int],
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Any], int | None]:
    """The model's own attention over one unpadded sample.

    Args:
        module: The attention module.
        query: ``[1, heads, N, head_dim]``.
        key: ``[1, kv_heads, N, head_dim]``.
        value: ``[1, kv_heads, N, head_dim]``.
        native: The layers that have a sliding window of their own, in tokens.
        scaling: As for `profile_attention`, like all that follows.
        dropout: Must be 0.
        softcap: Score soft cap.
        sliding_window: The model's own window in tokens.
        s_aux: Learned sink logits, ``[heads]``.
        position_bias: Not supported.
        kwargs: Further arguments of transformers that change nothing here.

    Returns:
        The output, ``[heads, N, head_dim]``, scale, soft cap and sink logits as the kernels name them, and the layer's
        own window.

    Raises:
        ModelUnsupportedError: Spans can't express this attention.
    """
    kind = type(module).__name__
    if position_bias is not None:
        raise ModelUnsupportedError(f"{kind} adds a bias to its scores, which spans can't express")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or dropout:
        raise ModelUnsupportedError("profiling runs one whole sample at a time, without dropout")
    if value.shape[-1] != key.shape[-1]:
        raise ModelUnsupportedError(
            f"{kind} has keys of {key.shape[-1]} and values of {value.shape[-1]} numbers (latent attention?); "
            "only plain KV heads have a cache that spans can shorten"
        )
    if not getattr(module, "is_causal", True):
        raise ModelUnsupportedError(f"{kind} isn't causal attention")
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "sink_logits": None if s_aux is None else s_aux.detach(),
    }
    window = native.get(module.layer_idx)
    if sliding_window is not None and sliding_window < query.shape[2] and sliding_window != window:
        raise ModelUnsupportedError(
            f"{kind}: layer {module.layer_idx} attends {sliding_window} tokens, its configuration says "
            f"{window or 'all'}"
        )
    return dense_attention(query[0], key[0], value[0], window=window, **options), options, window


@contextmanager
def observed(model: Any) -> Iterator[list[Any]]:
    """Route the attention of ``model``'s text decoder through `profile_attention`; everything is put back at the end.

    Yields:
        The text decoder's attention modules; set their recorder with `record_into`.

    Raises:
        ModelUnsupportedError: The model refuses it.
    """
    with swapped(model, IMPLEMENTATION, profile_attention, no_mask) as modules:
        try:
            yield modules
        finally:
            for module in modules:
                vars(module).pop(ATTRIBUTE, None)


def record_into(modules: list[Any], recorder: Recorder) -> None:
    """Make the attention of ``modules`` write into ``recorder`` from now on."""
    for module in modules:
        setattr(module, ATTRIBUTE, recorder)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Samples are unpadded and the attention function is causal by itself."""
