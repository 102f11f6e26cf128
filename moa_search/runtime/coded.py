"""Attention and cache of layers whose heads store fewer than 16 bits, in plain torch.

What a query sees is what the cache gives back: keys and values go through their codecs as they enter, for the prompt's
queries too. So chunks, prefixes and turns give what one pass gives. The sink's tokens stay in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from moa_kernels.append.reference import Append, append_tokens
from moa_kernels.codes import Codec, Codes
from moa_kernels.rings import RingLayout

from moa_search.errors import UnsupportedInputError
from moa_search.runtime import blockwise
from moa_search.runtime.layer import MoACacheLayer, gather_slots

if TYPE_CHECKING:
    from collections.abc import Callable

    from moa_search.runtime.codecs import LayerCodecs
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
    """Attention over coded keys and values, then their storage.

    Args:
        query: ``[batch, heads, query, head_dim]``, the newest tokens.
        key: ``[batch, kv_heads, keys, head_dim]``, of the newest tokens; of all, without ``past``.
        value: ``[batch, kv_heads, keys, value_dim]``.
        valid: Boolean ``[batch, keys]``, False for padding; None if there is none.
        rules: The layer's, with codecs.
        past: Where the keys before these are, and these will be.
        **options: ``scale``, ``softcap`` and ``sink_logits`` of `blockwise.attend`.

    Returns:
        ``[batch, heads, query, value_dim]``; anything for padding.

    Raises:
        UnsupportedInputError: A gradient is asked for, which codes don't let through.
    """
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise UnsupportedInputError(
            "keys and values in fewer than 16 bits let no gradient through; run under torch.no_grad()"
        )
    assert rules.codecs is not None
    start = torch.zeros(1, dtype=torch.int64, device=key.device) if past is None else past.start
    if valid is None:
        positions = start[:, None] + torch.arange(key.shape[2], device=key.device)
    else:
        positions = start[:, None] + valid.cumsum(1) - 1
    codecs = past.codecs if isinstance(past, CodedCacheLayer) else rules.codecs.on(key.device)
    seen = codecs.seen(key, value, positions, rules.sink)
    out = blockwise.attend(query, *seen, valid, rules, past, **options)
    if past is not None:
        past.commit(key, value, valid)
    return out


@dataclass
class _Ring:
    """Keys, or values, of one KV head: codes ``[batch, slots, bytes]`` and their scales ``[batch, slots, 1]``."""

    codec: Codec
    packed: torch.Tensor
    scales: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor."""
        self.packed = change(self.packed)
        self.scales = None if self.scales is None else change(self.scales)

    def decoded(self, dtype: torch.dtype, positions: torch.Tensor) -> torch.Tensor:
        """``[batch, slots, width]``, of tokens at ``positions`` ``[batch, slots]``."""
        scales = None if self.scales is None else self.scales[:, None, :, 0]
        return self.codec.decode(Codes(self.packed[:, None], scales), dtype, positions[:, None])[:, 0]


class CodedCacheLayer(MoACacheLayer):
    """A layer whose heads keep codes, each in bytes of its own; `keys` and `values` hold the sink's tokens alone.

    Slots of the sink exist among the codes too, so that one layout tells where everything is.

    Attributes:
        keys: ``[batch, kv_heads * sink, head_dim]``.
        values: ``[batch, kv_heads * sink, value_dim]``.
        codecs: Of the layer's heads, on its device.
    """

    codecs: LayerCodecs
    _rings: list[tuple[_Ring, _Ring]]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As `MoACacheLayer.lazy_initialization`."""
        super().lazy_initialization(key_states, value_states)
        batch, heads = key_states.shape[:2]
        assert self.rules.codecs is not None
        self.codecs = self.rules.codecs.on(self.device)
        self._rings = [
            (_empty(head.key, key_states[:, :1, :0]), _empty(head.value, value_states[:, :1, :0]))
            for head in self.codecs.heads
        ]
        self.keys = key_states.new_zeros(batch, heads * self.rules.sink, key_states.shape[-1])
        self.values = value_states.new_zeros(batch, heads * self.rules.sink, value_states.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, scales and the sink included."""
        return super().nbytes + sum(ring.nbytes for head in self._rings for ring in head)

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all slots as attention sees them, decoded anew."""
        sinks = [states.unflatten(1, (len(self._rings), -1)) for states in (self.keys, self.values)]
        parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        positions = self.layout.positions(self.lens).split(self.layout.capacities, 1)
        for head, rings in enumerate(self._rings):
            for part, ring, sink in zip(parts, rings, sinks, strict=True):
                decoded = ring.decoded(self.dtype, positions[head])
                plain = min(self.rules.sink, decoded.shape[1])
                part.append(torch.cat([sink[:, head, :plain], decoded[:, plain:]], 1))
        return torch.cat(parts[0], 1), torch.cat(parts[1], 1)

    def _leave_inference_mode(self) -> None:
        super()._leave_inference_mode()
        for ring in (ring for head in self._rings for ring in head):
            ring.change(torch.clone)

    def _write(self, key: torch.Tensor, value: torch.Tensor, counts: torch.Tensor | None, impl: str) -> None:
        key, value = key.detach(), value.detach()
        positions = (self.lens[:, None] + torch.arange(key.shape[2], device=key.device))[:, None]  # [batch, 1, new]
        for head, (rings, capacity) in enumerate(zip(self._rings, self.layout.capacities, strict=True)):
            layout = RingLayout((capacity,), (self.rules.sink,))
            coded = [
                ring.codec.encode(x[:, head : head + 1], positions) for ring, x in zip(rings, (key, value), strict=True)
            ]
            append_tokens(
                Append(rings[0].packed, rings[1].packed, coded[0].packed, coded[1].packed, self.lens, layout, counts)
            )
            for ring, codes in zip(rings, coded, strict=True):
                if ring.scales is not None and codes.scales is not None:
                    new = codes.scales[..., None]
                    append_tokens(Append(ring.scales, ring.scales, new, new, self.lens, layout, counts))
        self._write_sink(key, value, counts)

    def _write_sink(self, key: torch.Tensor, value: torch.Tensor, counts: torch.Tensor | None) -> None:
        token = torch.arange(key.shape[2], device=self.device)
        position = self.lens[:, None] + token  # [batch, new tokens]
        wanted = position < self.rules.sink
        if counts is not None:
            wanted = wanted & (token < counts[:, None])
        sample, new = wanted.nonzero(as_tuple=True)
        for held, states in ((self.keys, key), (self.values, value)):
            by_head = held.unflatten(1, (len(self._rings), -1))  # a view: [batch, kv_heads, sink, width]
            by_head[sample, :, position[sample, new]] = states[sample, :, new]

    def _move(self, layout: RingLayout, source: torch.Tensor) -> None:
        for head, rings in enumerate(self._rings):
            first = layout.offsets[head]
            mine = source[:, first : first + layout.capacities[head]] - self.layout.offsets[head]
            mine = mine.clamp(min=0)  # slots that hold nothing yet come from slot 0 of the layer
            for ring in rings:
                ring.change(lambda states, mine=mine: gather_slots(states, mine))  # type: ignore[misc]

    def _over_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._over_batch(change)
        for head in self._rings:
            for ring in head:
                ring.change(change)

    def _forget(self) -> None:
        super()._forget()
        self._rings = []


def _empty(codec: Codec, like: torch.Tensor) -> _Ring:
    """A ring without slots for vectors like ``like`` ``[batch, 1, 0, width]``."""
    codes = codec.encode(like, torch.zeros(1, dtype=torch.int64, device=like.device))
    return _Ring(codec, codes.packed[:, 0], None if codes.scales is None else codes.scales[:, 0, :, None])
