"""A layer's attention within a compiled graph, where nothing may depend on what tensors hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from moa_kernels import span_attention
from torch import Tensor

from moa_search.runtime import dispatch
from moa_search.runtime.padding import real_first
from moa_search.runtime.registry import layer_of

if TYPE_CHECKING:
    from moa_search.runtime.layer import MoACacheLayer
    from moa_search.runtime.rules import LayerRules


def attend_whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    rules: LayerRules,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention without a `MoACache`, by one mask ``[query, keys]`` per KV head; gradients flow.

    Args and result are those of `dispatch.attend`.
    """
    rows, keys, kv_heads = query.shape[2], key.shape[2], key.shape[1]
    group = query.shape[1] // kv_heads
    key_at = torch.arange(keys, device=query.device)[None]  # [batch or 1, keys]
    query_at = key_at[:, keys - rows :]
    if valid is not None:
        key, value = real_first(key, valid), real_first(value, valid)
        query_at = (valid.long().cumsum(1) - 1)[:, keys - rows :].clamp(min=0)
        key_at = key_at.expand(len(valid), -1)
    masks = rules.head_spans.visible(query_at, key_at)  # [kv_heads, batch or 1, query, keys]
    parts = []
    for head in range(kv_heads):
        heads = slice(head * group, (head + 1) * group)
        logits = None if sink_logits is None else sink_logits[heads]
        parts.append(
            span_attention(
                query[:, heads],
                key[:, head],
                value[:, head],
                masks[head],
                scale=scale,
                softcap=softcap,
                sink_logits=logits,
            )
        )
    return torch.cat(parts, 1).transpose(1, 2).contiguous()


def attend_past(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    past: MoACacheLayer,
    impl: str,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """`dispatch.attend` with a past as one operator, which a compiler doesn't look into.

    The operator finds the layer by its ticket, so that one graph serves all caches. Its gradients are none: where they
    are asked for, the graph breaks, and what follows is `dispatch.attend` itself.
    """
    if torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)):
        return uncompiled(
            query,
            key,
            value,
            valid,
            past.rules,
            past,
            impl,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
        )
    storage = past.fixed_storage
    states = (query, key, value, valid, sink_logits, past.ticket)
    out: Tensor
    if storage:
        out = _attend_fixed(*states, storage, scale, softcap, impl)
    else:
        out = _attend_growing(*states, scale, softcap, impl)
    return out


uncompiled: Callable[..., Tensor] = torch.compiler.disable(dispatch.attend)


# CUDA graphs replay launches, while this one's depend on lengths: versions that can split graphs do it here, and older
# ones make none, because the ticket lies on the CPU.
UNSAFE: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    sink_logits: Tensor | None,
    ticket: Tensor,
    storage: Sequence[Tensor],
    scale: float,
    softcap: float | None,
    impl: str,
) -> Tensor:
    past = layer_of(ticket)
    if valid is not None and not past.is_compileable and bool(valid.all()):
        valid = None
    with past.stored_in(storage):
        return dispatch.attend(
            query,
            key,
            value,
            valid,
            past.rules,
            past,
            impl,  # type: ignore[arg-type]  # an operator takes any text
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
        )


@torch.library.custom_op("moa_search::attend_growing", mutates_args=(), **UNSAFE)
def _attend_growing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    sink_logits: Tensor | None,
    ticket: Tensor,
    scale: float,
    softcap: float | None,
    impl: str,
) -> Tensor:
    return _attend(query, key, value, valid, sink_logits, ticket, (), scale, softcap, impl)


# A graph must know which tensors change that it has at hand; what a growing layer holds it never sees.
@torch.library.custom_op("moa_search::attend_fixed", mutates_args=("storage",), **UNSAFE)
def _attend_fixed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    sink_logits: Tensor | None,
    ticket: Tensor,
    storage: Sequence[Tensor],
    scale: float,
    softcap: float | None,
    impl: str,
) -> Tensor:
    return _attend(query, key, value, valid, sink_logits, ticket, storage, scale, softcap, impl)


@_attend_growing.register_fake
@_attend_fixed.register_fake
def _like(query: Tensor, key: Tensor, value: Tensor, *others: object) -> Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[3])
