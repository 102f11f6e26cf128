"""The attention function that profiling puts into a model: dense forward, backward with statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from moa_kernels.influence import causal_attention, influence_backward
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from moa_search.errors import ModelUnsupportedError
from moa_search.models import require_attention_interface

__all__ = ["Recorder", "observed"]

IMPLEMENTATION = "moa_profile"
"""Name under which the function is registered with transformers."""

ATTRIBUTE = "_moa_recorder"
"""Where attention modules carry the recorder: autograd may run backward in a thread that sees no context."""


@dataclass
class Recorder:
    """Collects one sample's statistics, layer by layer, as backward reaches them.

    Attributes:
        windows: Candidate windows in tokens.
        row_buckets: Equal slices of the rows.
        sink: First tokens always kept.
        layers: By layer index, each statistic as ``[kv_heads, bucket, window]`` on the CPU.
    """

    windows: tuple[int, ...]
    row_buckets: int
    sink: int
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Settings:
    layer: int
    scale: float
    softcap: float | None
    window: int | None


class _ObservedAttention(torch.autograd.Function):
    """Dense causal attention whose backward also measures influence.

    Saves queries, keys and values only, so it composes with gradient checkpointing: then no more than one
    layer's are alive at a time.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, recorder: Recorder, settings: _Settings) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.recorder, ctx.settings = recorder, settings
        return causal_attention(
            query, key, value, scale=settings.scale, softcap=settings.softcap, window=settings.window
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Any) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors  # type: ignore[attr-defined]
        recorder: Recorder = ctx.recorder  # type: ignore[attr-defined]
        settings: _Settings = ctx.settings  # type: ignore[attr-defined]
        result = influence_backward(
            query,
            key,
            value,
            grads[0],
            windows=recorder.windows,
            row_buckets=recorder.row_buckets,
            sink=recorder.sink,
            scale=settings.scale,
            softcap=settings.softcap,
            window=settings.window,
        )
        recorder.layers[settings.layer] = {name: value.cpu() for name, value in result.statistics.items()}
        return result.grad_query, result.grad_key, result.grad_value, None, None


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
        sliding_window: The model's own window in tokens.
        s_aux: Learned sink logits; not supported.
        position_bias: Additive bias; not supported.
        kwargs: Further arguments of transformers that change nothing here.

    Returns:
        ``([1, N, heads, head_dim], None)``.
    """
    if s_aux is not None or position_bias is not None:
        what = "attention sinks (s_aux)" if s_aux is not None else "a position bias"
        raise ModelUnsupportedError(f"{type(module).__name__} uses {what}, which can't be profiled yet")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or dropout:
        raise ModelUnsupportedError("profiling runs one whole sample at a time, without dropout")
    if value.shape[-1] != key.shape[-1] or not getattr(module, "is_causal", True):
        raise ModelUnsupportedError(f"{type(module).__name__} isn't plain causal attention")
    settings = _Settings(
        layer=module.layer_idx,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        window=sliding_window,
    )
    out: Tensor = _ObservedAttention.apply(query[0], key[0], value[0], getattr(module, ATTRIBUTE), settings)  # type: ignore[no-untyped-call]
    return out.transpose(0, 1)[None].contiguous(), None


@contextmanager
def observed(model: Any) -> Iterator[list[Any]]:
    """Route ``model``'s attention through `profile_attention`; everything is put back at the end.

    Yields:
        The modules with a ``layer_idx``; set their recorder with `record_into`.

    Raises:
        ModelUnsupportedError: The model doesn't go through transformers' attention interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, profile_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    require_attention_interface(model)
    model.set_attn_implementation(IMPLEMENTATION)
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    try:
        if text._attn_implementation != IMPLEMENTATION:
            raise ModelUnsupportedError(f"{type(model).__name__} refuses another attention implementation")
        yield modules
    finally:
        for module in modules:
            if hasattr(module, ATTRIBUTE):
                delattr(module, ATTRIBUTE)
        model.set_attn_implementation(before)


def record_into(modules: list[Any], recorder: Recorder) -> None:
    """Make the attention of ``modules`` write into ``recorder`` from now on."""
    for module in modules:
        setattr(module, ATTRIBUTE, recorder)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Samples are unpadded and the attention function is causal by itself."""
