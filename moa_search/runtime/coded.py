"""Attention and cache of layers whose heads store fewer than 16 bits.

What a query sees is what the cache gives back: keys and values go through their codecs as they enter, for the prompt's
queries too. So chunks, prefixes and turns give what one pass gives. The sink's tokens stay in 16 bits.

A few new tokens are stored first, and then attend the codes as they lie. A prompt, or a chunk of it, attends what the
codes give back: the past is decoded once, into plain rings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from moa_kernels import backends
from moa_kernels.backends import Backend
from moa_kernels.coded import append_codes, decode_codes, stored_states
from moa_kernels.codes.storage import CodeLayout, Stored

from moa_search.errors import BackendUnavailableError, UnsupportedInputError
from moa_search.runtime import blockwise, kernels, native
from moa_search.runtime.layer import MoACacheLayer, gather_slots
from moa_search.runtime.static import StaticMoACacheLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from moa_kernels.backends import Impl
    from moa_kernels.codes.turns import Turns
    from moa_kernels.rings import RingLayout

    from moa_search.runtime.codecs import LayerCodecs
    from moa_search.runtime.rules import LayerRules

CODES = ("key_codes", "value_codes", "key_scales", "value_scales")
"""Attributes of a layer that hold its codes: `Stored`'s, without the sinks."""


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
    """Attention over coded keys and values, and their storage.

    Args:
        query: ``[batch, heads, query, head_dim]``, the newest tokens.
        key: ``[batch, kv_heads, keys, head_dim]``, of the newest tokens; of all, without ``past``.
        value: ``[batch, kv_heads, keys, head_dim]``.
        valid: Boolean ``[batch, keys]``, False for padding; None if there is none.
        rules: The layer's, with codecs.
        past: Where the keys before these are, and these will be.
        impl: What was asked for.
        **options: ``scale``, ``softcap`` and ``sink_logits`` of `moa_kernels.prefill.span_prefill`.

    Returns:
        ``[batch, query, heads, head_dim]``; anything for padding.

    Raises:
        UnsupportedInputError: A gradient is asked for, which codes don't let through, or values aren't as wide as keys.
        BackendUnavailableError: What ``impl`` names can't run here.
    """
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise UnsupportedInputError(
            "keys and values in fewer than 16 bits let no gradient through; run under torch.no_grad()"
        )
    if value.shape[-1] != key.shape[-1]:
        raise UnsupportedInputError(
            f"values of {value.shape[-1]} numbers beside keys of {key.shape[-1]} can't be stored in fewer bits"
        )
    assert rules.codecs is not None
    if past is not None and past.decodes(query.shape[2], valid):
        past.commit(key, value, valid, impl)
        return past.decode(query, impl, **options).transpose(1, 2).contiguous()
    start = torch.zeros(1, dtype=torch.int64, device=key.device) if past is None else past.start
    if valid is None:
        positions = start[:, None] + torch.arange(key.shape[2], device=key.device)
    else:
        positions = (start[:, None] + valid.cumsum(1) - 1).clamp(min=0)
    codecs = past.codecs if isinstance(past, Coded) else rules.codecs.on(key.device)
    seen = codecs.seen(key, value, positions, rules.sink, impl)
    backend = kernels.chosen(impl, query, key, value)
    before = None if past is None or past.is_empty else cast("MoACacheLayer", _Decoded(past, impl))
    if backend == Backend.CPU:
        out = native.prefill(query, *seen, valid, rules, before, **options)
    elif backend == Backend.TORCH:
        out = blockwise.attend(query, *seen, valid, rules, before, **options).transpose(1, 2).contiguous()
    else:
        out = kernels.prefill(query, *seen, valid, rules, before, impl=backend, **options).transpose(1, 2).contiguous()
    if past is not None:
        past.commit(key, value, valid, impl)
    return out


class _Decoded:
    """A layer as attention over plain rings reads it: its codes, decoded once."""

    def __init__(self, layer: MoACacheLayer, impl: str) -> None:
        assert isinstance(layer, Coded)
        self._layer = layer
        self.keys, self.values = layer.decoded(impl)

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `MoACacheLayer.states`."""
        return self.keys, self.values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class Coded(MoACacheLayer):
    """What layers of codes have in common; `keys` and `values` are the sinks, ``[batch, kv_heads * sink, head_dim]``.

    Attributes:
        codecs: Of the layer's heads, on its device.
        key_codes: As all of `CODES`, see `moa_kernels.codes.storage`.
    """

    codecs: LayerCodecs
    key_codes: torch.Tensor
    value_codes: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor
    _laid_out: tuple[RingLayout, int, CodeLayout] | None = None

    @property
    def stored(self) -> Stored:
        """All that is held."""
        return Stored(self.key_codes, self.value_codes, self.key_scales, self.value_scales, self.keys, self.values)

    @property
    def code_layout(self) -> CodeLayout:
        """Where it is; found once per layout, and before a compiler looks."""
        rings, size = self.layout, self.keys.itemsize
        if self._laid_out is None or self._laid_out[0] is not rings or self._laid_out[1] != size:
            self._laid_out = rings, size, self.codecs.layout(rings, size)
        return self._laid_out[2]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, scales and the sink included."""
        return self.stored.nbytes if self.is_initialized else 0

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all slots as attention sees them, decoded anew."""
        return self.decoded("torch")

    def decoded(self, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by an implementation of `stored_states`."""
        return stored_states(self.stored, self.lens, self.code_layout, self.codecs.turns, impl=impl)

    def decode(self, query: torch.Tensor, impl: str, **options: Any) -> torch.Tensor:
        """As `MoACacheLayer.decode`."""
        return _translated(decode_codes, query, *self._rings, self._spans, impl=impl, **options)[0]  # type: ignore[no-any-return]

    def _write(self, key: torch.Tensor, value: torch.Tensor, counts: torch.Tensor | None, impl: str) -> None:
        _translated(append_codes, key, value, *self._rings, counts=counts, impl=impl)

    @property
    def _rings(self) -> tuple[Stored, torch.Tensor, CodeLayout, Turns]:
        return self.stored, self.lens, self.code_layout, self.codecs.turns

    def _allocate(self, key: torch.Tensor, value: torch.Tensor) -> None:
        assert self.rules.codecs is not None
        self.codecs = self.rules.codecs.on(self.device)
        layout = self.codecs.layout(self.layout, key.itemsize)
        *codes, self.keys, self.values = layout.empty(key.shape[0], key.dtype, self.device)
        for name, part in zip(CODES, codes, strict=True):
            setattr(self, name, part)

    def _change_codes(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in CODES:
            setattr(self, name, change(getattr(self, name)))


class CodedCacheLayer(Coded):
    """A growing layer whose heads keep codes."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As `MoACacheLayer.lazy_initialization`."""
        super().lazy_initialization(key_states, value_states)
        self._allocate(key_states, value_states)

    def _leave_inference_mode(self) -> None:
        super()._leave_inference_mode()
        self._change_codes(torch.clone)

    def _widen(self, dtype: torch.dtype) -> None:
        before, old, narrow = self.code_layout, self.stored, self.keys.dtype
        super()._widen(dtype)
        after = self.code_layout
        fresh = after.empty(len(self.lens), dtype, self.device)
        for (side, codes, *_), (wider, wide_codes, *_) in zip(before.sides(old), after.sides(fresh), strict=True):
            for head, slots in enumerate(before.ring_slots):
                source, target = side.rows_of(codes, head, slots), wider.rows_of(wide_codes, head, slots)
                target.copy_(source.view(narrow).to(dtype).view(torch.uint8) if side.bits[head] == 16 else source)
        self.key_codes, self.value_codes = fresh.key_codes, fresh.value_codes

    def _move(self, layout: RingLayout, source: torch.Tensor) -> None:
        before, old = self.code_layout, self.stored
        after = self.codecs.layout(layout, self.keys.itemsize)
        fresh = after.empty(len(self.lens), self.keys.dtype, self.device)
        sides = list(zip(before.sides(old), after.sides(fresh), strict=True))
        for head, slots in enumerate(after.ring_slots):
            if not slots or not before.ring_slots[head]:
                continue
            first = layout.offsets[head] + after.sink
            # Slots that hold nothing yet come from slot 0 of the layer: any will do.
            mine = source[:, first : first + slots] - self.layout.offsets[head] - before.sink
            mine = mine.clamp(0, before.ring_slots[head] - 1)
            for (side, codes, scales, _), (moved, new_codes, new_scales, _) in sides:
                rows = side.rows_of(codes, head, before.ring_slots[head])
                moved.rows_of(new_codes, head, slots).copy_(gather_slots(rows, mine))
                if side.bits[head] < 16:
                    at, to = side.scale_offsets[head], moved.scale_offsets[head]
                    new_scales[:, to : to + slots] = scales[:, at : at + before.ring_slots[head]].gather(1, mine)
        for name in CODES:
            setattr(self, name, getattr(fresh, name))

    def _over_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._over_batch(change)
        if self.is_initialized:
            self._change_codes(change)

    def _forget(self) -> None:
        super()._forget()
        for name in CODES:
            setattr(self, name, None)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**super()._tensors(), **{name: getattr(self, name) for name in CODES}}

    def _take_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        assert self.rules.codecs is not None
        self.codecs = self.rules.codecs.on(self.device)
        keys, values = tensors["keys"], tensors["values"]
        if not keys.is_floating_point():
            raise ValueError(f"keys holds {keys.dtype} {tuple(keys.shape)}")
        wanted = self.codecs.layout(self.layout, keys.itemsize).empty(len(self.lens), keys.dtype, torch.device("meta"))
        for name, like in zip((*CODES, "keys", "values"), wanted, strict=True):
            tensor = tensors[name]
            if tensor.dtype != like.dtype or tensor.shape != like.shape:
                expected = f"{like.dtype} {tuple(like.shape)}"
                raise ValueError(f"{name} holds {tensor.dtype} {tuple(tensor.shape)}, expected {expected}")
            setattr(self, name, tensor)
        self.dtype = values.dtype


class StaticCodedCacheLayer(Coded, StaticMoACacheLayer):
    """A layer of fixed size whose heads keep codes."""

    parts = (*StaticMoACacheLayer.parts[:2], *CODES, *StaticMoACacheLayer.parts[2:])


def growing_layer(rules: LayerRules) -> MoACacheLayer:
    """An empty layer that grows."""
    return MoACacheLayer(rules) if rules.codecs is None else CodedCacheLayer(rules)


def _translated(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """An operation of `moa_kernels`, whose refusals of an implementation become the package's own."""
    if torch.compiler.is_compiling():
        return operation(*arguments, **options)
    try:
        return operation(*arguments, **options)
    except backends.BackendUnavailableError as error:
        raise BackendUnavailableError(str(error)) from None
