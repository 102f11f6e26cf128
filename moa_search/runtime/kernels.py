"""A layer's attention by the operations of `moa_kernels`, whatever runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from moa_kernels import backends
from moa_kernels.backends import Backend, Impl, choose
from moa_kernels.prefill import span_prefill

from moa_search.errors import BackendUnavailableError, ConfigError
from moa_search.modeling.text import text_config
from moa_search.runtime.layer import EMPTY
from moa_search.runtime.padding import reordered
from moa_search.spans import BETA_ONE

if TYPE_CHECKING:
    from moa_search.runtime.layer import MoACacheLayer
    from moa_search.runtime.rules import LayerRules


def chosen(impl: Impl, *states: torch.Tensor) -> Backend:
    """What attends these queries, keys and values; operations of `moa_kernels` that get it don't ask again.

    Raises:
        ConfigError: ``impl`` is unknown.
        BackendUnavailableError: ``impl`` names kernels that can't; says why.
    """
    widths = {tensor.shape[-1] for tensor in states}
    if impl != "torch" and len(widths) > 1:
        if impl != "auto":
            raise BackendUnavailableError(
                f"queries, keys and values are {sorted(widths)} wide, kernels take one width; "
                'use impl="torch" or "auto"'
            )
        return Backend.TORCH
    try:
        return choose(impl, *states, head_dim=states[0].shape[-1])
    except backends.BackendUnavailableError as error:
        raise BackendUnavailableError(str(error)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def attends_by(model: Any) -> str:
    """What attends under a plan on a model's device and in its type, where nothing is insisted on, in words."""
    config = text_config(model.config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    backend = choose("auto", torch.empty(0, width, dtype=model.dtype, device=model.device), head_dim=width)
    if backend != Backend.CPU:
        return backend.value
    from moa_kernels.cpu.library import description

    return f"{backend.value}: {description()}"


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    rules: LayerRules,
    past: MoACacheLayer | None,
    impl: str = "triton",
    **options: Any,
) -> torch.Tensor:
    """Attention of new tokens to the past and to each other, in one launch for all heads.

    Args:
        query: ``[batch, heads, query, head_dim]``, the newest tokens.
        key: ``[batch, kv_heads, keys, head_dim]``, of the newest tokens; of all, without ``past``.
        value: As ``key``.
        valid: Boolean ``[batch, keys]``, False for padding; None if there is none.
        rules: The layer's.
        past: Where the keys before these are.
        impl: What runs `span_prefill`.
        **options: ``scale``, ``softcap`` and ``sink_logits`` of `span_prefill`.

    Returns:
        ``[batch, heads, query, head_dim]``; anything for padding.
    """
    spans, pads, order = rules.head_spans, None, None
    if valid is not None:
        # Real tokens go to the end, where queries are the tokens of the last keys.
        key, value = (reordered(states, valid.long().argsort(dim=1, stable=True)) for states in (key, value))
        order = valid[:, -query.shape[2] :].long().argsort(dim=1, stable=True)
        query, pads = reordered(query, order), key.shape[2] - valid.sum(1)
    if past is not None and not past.is_empty:
        key, value, pads, shift = _after_past(key, value, pads, rules, past)
        spans = rules.shifted(shift)
    out, _ = span_prefill(query, key, value, spans, starts=pads, impl=impl, **options)
    return out if order is None else reordered(out, order.argsort(dim=1))


def _after_past(
    key: torch.Tensor, value: torch.Tensor, pads: torch.Tensor | None, rules: LayerRules, past: MoACacheLayer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """New keys and values with what rings hold in front of them, every key at its position less a common shift.

    Rules can be moved by multiples of 256 tokens (`LayerRules.shifted`). So what no head attends any more, between
    the sink and the oldest window, is left out, and one layer's copy is no longer than its longest span.

    Returns:
        ``[batch, kv_heads, keys, head_dim]`` twice, the key of each sample's first token ``[batch]``, and the shift.
    """
    batch, kv_heads, new, _ = key.shape
    reach = max(rules.capacities(past.longest + 1))
    if rules.sliding_window is not None:
        reach = max(reach, rules.sink + rules.sliding_window)  # the model's window hides sink tokens from here on, too
    shift = max(past.shortest - reach, 0) // BETA_ONE * BETA_ONE
    width = past.longest - shift
    starts = past.longest - past.lens if pads is None else past.longest - past.lens + pads
    position = past.positions()
    sunk = position < rules.sink
    near = (position >= rules.sink + shift) & (position != EMPTY)
    nowhere = width + new
    column = (starts[:, None] + position.where(sunk, position - shift)).where(sunk | near, nowhere)
    sample, head = torch.arange(batch, device=key.device)[:, None], past.layout.heads(key.device)
    whole = []
    for old, fresh in ((past.keys, key), (past.values, value)):
        # Zeros, since a kernel reads whole tiles, and 0 times what an empty tensor holds may be NaN.
        states = fresh.new_zeros(batch, kv_heads, nowhere + 1, fresh.shape[3])
        states[:, :, width:nowhere] = fresh
        states[sample, head, column] = old  # over a sample's padding, if need be
        whole.append(states[:, :, :nowhere])
    return whole[0], whole[1], starts, shift
