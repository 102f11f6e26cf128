"""What attends a layer's new tokens and stores them: the choice between kernels, the CPU library and plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moa_kernels.backends import Backend

from moa_search.errors import UnsupportedInputError
from moa_search.runtime import blockwise, coded, decoding, kernels, native

if TYPE_CHECKING:
    import torch
    from moa_kernels.backends import Impl

    from moa_search.runtime.layer import MoACacheLayer
    from moa_search.runtime.rules import LayerRules


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    rules: LayerRules,
    past: MoACacheLayer | None,
    impl: Impl,
    **options: Any,
) -> torch.Tensor:
    """Attention of new tokens to the past and each other; the past then holds them, too.

    Args:
        query: ``[batch, heads, query, head_dim]``, the newest tokens.
        key: ``[batch, kv_heads, keys, head_dim]``, of the newest tokens; of all, without ``past``.
        value: ``[batch, kv_heads, keys, value_dim]``.
        valid: Boolean ``[batch, keys]``, False for padding; None if there is none.
        rules: The layer's.
        past: Where the keys before these are.
        impl: What was asked for.
        **options: ``scale``, ``softcap`` and ``sink_logits`` of `moa_kernels.prefill.span_prefill`.

    Returns:
        ``[batch, query, heads, value_dim]`` in the query's type, even where the past is held in a wider one.
    """
    narrow = query.dtype
    if past is not None:
        past.admit(key, value)
        if past.keys.dtype != narrow:
            query, key, value = (states.to(past.keys.dtype) for states in (query, key, value))
    return _attend(query, key, value, valid, rules, past, impl, **options).to(narrow)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    rules: LayerRules,
    past: MoACacheLayer | None,
    impl: Impl,
    **options: Any,
) -> torch.Tensor:
    if rules.codecs is not None:
        return coded.attend(query, key, value, valid, rules, past, impl, **options)
    if rules.streams(key.shape[2], past):
        return _beyond(query, key, value, valid, rules, past, **options)
    decodes = past is not None and past.decodes(query.shape[2], valid)
    if past is not None and decodes and past.is_compileable:
        # Operators decode whatever runs them: in a compiled step, nothing may depend on what they find.
        past.commit(key, value, valid, impl)
        return past.decode(query, impl, **options).transpose(1, 2).contiguous()
    backend = kernels.chosen(impl, query, key, value)
    fixed = past is not None and past.is_compileable
    if backend == Backend.CPU and not fixed:
        return native.attend(query, key, value, valid, rules, past, **options)
    if past is not None and decodes and backend != Backend.TORCH:
        past.commit(key, value, valid, backend)
        out = past.decode(query, backend, **options)
    elif past is not None and backend == Backend.TORCH and decoding.applies(past, valid, query, key, value):
        return decoding.decode_one(past, query, key, value, **options)
    else:
        if backend == Backend.TORCH:
            out = blockwise.attend(query, key, value, valid, rules, past, **options)
        else:
            out = kernels.prefill(query, key, value, valid, rules, past, impl=backend, **options)
        if past is not None:
            past.commit(key, value, valid, backend)
    return out.transpose(1, 2).contiguous()


def _beyond(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    rules: LayerRules,
    past: MoACacheLayer | None,
    **options: Any,
) -> torch.Tensor:
    """Attention past the context, which plain torch alone can."""
    if past is not None and past.is_compileable:
        raise UnsupportedInputError(
            "streaming needs a cache that grows; leave max_length, or cache_implementation, unset"
        )
    out = blockwise.attend(query, key, value, valid, rules, past, **options)
    if past is not None:
        past.commit(key, value, valid)
    return out.transpose(1, 2).contiguous()
