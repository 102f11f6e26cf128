"""A layer's attention by the CPU library of `moa_kernels`: one call for a decoding step, two for a chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from moa_kernels.backends import Backend
from moa_kernels.cpu.calls import LayerCall

from moa_search.errors import UnsupportedInputError

if TYPE_CHECKING:
    from moa_search.runtime.layer import MoACacheLayer
    from moa_search.runtime.rules import LayerRules


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    rules: LayerRules,
    past: MoACacheLayer | None,
    **options: Any,
) -> torch.Tensor:
    """Attention over ring and new tokens, which are stored.

    Args:
        query: ``[batch, heads, query, head_dim]``, of the newest tokens.
        key: ``[batch, kv_heads, keys, head_dim]``, of the newest tokens; of all, without ``past``.
        value: As ``key``.
        valid: Boolean ``[batch, keys]``, False for padding; None if there is none.
        rules: The layer's.
        past: Where the keys before these are, and these go; not one of fixed size.
        **options: ``scale``, ``softcap`` and ``sink_logits`` of `moa_kernels.prefill.span_prefill`.

    Returns:
        ``[batch, query, heads, head_dim]``; zeros for padding.

    Raises:
        UnsupportedInputError: The cache holds numbers of another type or width.
    """
    batch, heads, queries, dim = query.shape
    if past is not None:
        _require_alike(past, query)
    if past is not None and valid is None and past.decodes(queries, None) and options["scale"] > 0:
        past.make_room(queries)
        if past.step is None or not past.step.fits(past, query, key, value, options):
            past.step = Step(past, query, key, value, options)
        out = query.new_empty(batch, queries, heads, dim)
        past.step.run(query, key, value, out, options["sink_logits"])
        past.advance(queries)
        return out
    out = prefill(query, key, value, valid, rules, past, **options)
    if past is not None:
        past.commit(key, value, valid, Backend.CPU)
    return out


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    rules: LayerRules,
    past: MoACacheLayer | None,
    **options: Any,
) -> torch.Tensor:
    """Attention over ring and new tokens, as `attend`, which aren't stored."""
    batch, heads, queries, dim = query.shape
    out = query.new_empty(batch, queries, heads, dim)
    call = LayerCall(query, rules.head_spans, out=out.transpose(1, 2), **options)
    call.new_tokens(key, value)
    if valid is not None:
        call.real(valid.sum(1), (~valid).long().argsort(dim=1, stable=True))
    if past is not None:
        call.before(past.lens)
        if not past.is_empty:
            call.rings(past.keys, past.values, past.layout)
    call.run("prefill")
    return out


def _require_alike(past: MoACacheLayer, query: torch.Tensor) -> None:
    """The library reads and writes the rings by the type and width of the new tokens."""
    for states in (past.keys, past.values):
        if states.dtype != query.dtype or states.shape[-1] != query.shape[-1]:
            raise UnsupportedInputError(
                f"the cache holds {states.dtype} [{states.shape[-1]}], the new tokens are {query.dtype} "
                f"[{query.shape[-1]}]; reset() it, or make another"
            )


class Step:
    """A layer's decoding step with all that stays the same from one to the next filled in; `run` stores and attends.

    The library counts the new tokens in the layer's ``lens``, in place. ``scale`` must be positive. The layer holds the
    step, and the step doesn't hold the layer: a cache's memory is free as soon as nobody has the cache.

    Args:
        past: The layer, with room for the new tokens.
        query: ``[batch, heads, new tokens, head_dim]``.
        key: ``[batch, kv_heads, new tokens, head_dim]``.
        value: As ``key``.
        options: As of `attend`.
    """

    def __init__(
        self, past: MoACacheLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
    ) -> None:
        self._facts = self._told(past, query, key, value, options)
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        self._call = LayerCall(query, past.rules.head_spans, out=out, **options)
        self._call.new_tokens(key, value)
        self._call.before(past.lens)
        self._call.rings(past.keys, past.values, past.layout)

    def fits(
        self, past: MoACacheLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
    ) -> bool:
        """Whether `run` can be called for these."""
        return bool(self._facts == self._told(past, query, key, value, options))

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        sink_logits: torch.Tensor | None,
    ) -> None:
        """Store the new tokens and write their output to ``out``, ``[batch, new tokens, heads, head_dim]``."""
        self._call.move(query, key, value, out, sink_logits)
        self._call.run("step")

    def __deepcopy__(self, memo: object) -> None:
        """A copied layer fills in its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        """As `__deepcopy__`: pointers mean nothing elsewhere."""
        return type(None), ()

    @staticmethod
    def _told(
        past: MoACacheLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
    ) -> Any:
        """What must be as it was when the call was filled in."""
        strides = query.stride(), key.stride(), value.stride()
        places = past.keys.data_ptr(), past.values.data_ptr(), past.lens.data_ptr()
        numbers = options["scale"], options["softcap"], torch.get_num_threads()
        return query.shape, *strides, *places, *numbers, past.layout, query.dtype
