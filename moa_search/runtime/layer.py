"""A layer of a ragged key-value cache: every KV head keeps its sink tokens and a ring of the newest ones, no more.

Why a ring never drops a key that a later query needs: the window of the query at context length n starts
at position ``n - window(n)``, which never moves back, since window(n) grows by at most one per token
(beta <= 1). A head's ring has at least ``window(n)`` slots for every n up to the length that the layer is
laid out for, and that length exceeds the stored tokens. After storing n - 1 tokens, the ring therefore holds
everything from ``n - window(n)`` on, which is all that the query at n, and any later one, can attend outside
the sink. When the layout grows, the entries move to their new slots by position, and the bound still holds.
Only `crop` steps back in n, so it checks.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from moa_kernels.append import append_tokens
from moa_kernels.decode import MOST_NEW_TOKENS, span_decode
from transformers.cache_utils import CacheLayerMixin

from moa_search.errors import UnsupportedInputError
from moa_search.runtime.decoding import DecodingTable
from moa_search.runtime.padding import real_first
from moa_search.runtime.registry import ticket_for
from moa_search.runtime.staged import Staged
from moa_search.runtime.state import LayerState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from moa_kernels.rings import RingLayout

    from moa_search.runtime.native import Step
    from moa_search.runtime.rules import LayerRules

EMPTY = 2**31 - 1
"""Position of a slot that holds no key: later than any query, so that causality hides it."""

ROLLBACK_TOKENS = 256
"""Least number of tokens that can be rolled back while past states are recorded (assisted decoding)."""


class MoACacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of one decoder layer, in slots as `moa_kernels.rings.RingLayout` says.

    Only real tokens are stored and counted, so left, right and inner padding all become one length per sample.

    Attributes:
        rules: What the layer's heads attend.
        keys: ``[batch, sum of capacities, head_dim]``, heads one after the other.
        values: ``[batch, sum of capacities, value_dim]``.
        lens: ``[batch]`` int64, tokens seen per sample.
        layout: Where every head's keys are.
        cumulative_length: Tokens seen including padding.
        record_past: Whether room for a rollback is kept.
        ticket: What stands for the layer in a compiled graph.
        step: The call of the CPU library that decodes, as it was last filled in.
    """

    is_croppable = True
    is_sliding = False
    keys: Any
    values: Any
    lens: torch.Tensor
    cumulative_length: int
    _staged: bool
    _longest: int
    layout: RingLayout
    _even: bool
    _unpadded: int
    _reserved: int
    _slack: int
    _table: DecodingTable | None
    step: Step | None
    _rollback: int

    def __init__(self, rules: LayerRules) -> None:
        super().__init__()
        self.rules = rules
        self._spans = rules.head_spans
        self.record_past = False
        self._rollback = ROLLBACK_TOKENS
        self.ticket = ticket_for(self)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "ticket"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.ticket = ticket_for(self)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch size, widths, dtype and device from the first states."""
        batch = key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(batch, 0, key_states.shape[-1])
        self.values = value_states.new_empty(batch, 0, value_states.shape[-1])
        self.lens = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.layout = self.rules.layout([0] * len(self.rules.rules))
        self._floor = self.lens.new_full((batch, len(self.rules.rules)), self.rules.sink)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Staged, Staged]:
        """Hand new keys and values to the attention function, which stores them after reading the past."""
        if self._staged:
            raise UnsupportedInputError(
                "the keys of an earlier forward pass were never attended: it failed midway, or the model "
                "bypasses the plan's attention; reset() the cache"
            )
        if not torch.compiler.is_compiling():
            self._check_batch(key_states)
        self._staged = True
        staged = Staged(self, key_states, value_states)
        return staged, staged

    def admit(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Be ready for new keys and values of one type: the first decide their type, a wider one widens all.

        Tensors that were made in inference mode are exchanged for others outside of it.
        """
        if not self.is_initialized:
            self.lazy_initialization(key, value)
            return
        if key.dtype != self.keys.dtype:
            self._widen(torch.promote_types(key.dtype, self.keys.dtype))
        if not torch.compiler.is_compiling():
            self._check_batch(key)
            if (self.keys.is_inference() or self.lens.is_inference()) and not torch.is_inference_mode_enabled():
                self._leave_inference_mode()

    @property
    def is_staged(self) -> bool:
        """Whether new keys wait for attention to read and store them."""
        return self._staged

    def settle(self) -> None:
        """Take staged keys for stored, which an operator does behind the compiler's back."""
        self._staged = False

    @property
    def fixed_storage(self) -> list[torch.Tensor]:
        """Tensors that stay where they are and that a graph has to know of; none here."""
        return []

    def stored_in(self, storage: Sequence[torch.Tensor]) -> AbstractContextManager[object]:
        """While an operator runs, use what it was given in the place of `fixed_storage`."""
        assert not storage
        return nullcontext()

    @property
    def start(self) -> torch.Tensor:
        """Position of the next token, ``[batch]``, or ``[1]`` where all samples agree."""
        return self.lens[:1] if self._even else self.lens

    @property
    def longest(self) -> int:
        """Tokens seen in the longest sample; known without asking the device."""
        return self._longest

    @property
    def shortest(self) -> int:
        """Tokens seen in the shortest sample."""
        return self._longest if self._even else int(self.lens.min())

    @property
    def is_even(self) -> bool:
        """Whether all samples are known to have the same length."""
        return self._even

    @property
    def is_empty(self) -> bool:
        """Whether no token is stored."""
        return self.longest == 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def slots(self, only_sink: bool) -> list[slice]:
        """Where each head's keys lie in `keys` and `values`: all of them, or just its sink tokens'."""
        layout = self.layout
        counts = [min(self.rules.sink, most) if only_sink else most for most in layout.capacities]
        return [slice(first, first + count) for first, count in zip(layout.offsets, counts, strict=True)]

    def positions(self) -> torch.Tensor:
        """Position that each slot holds, or `EMPTY`: int64 ``[batch or 1, slots]``, as `start`."""
        position = self.layout.positions(self.start)
        floor = self._oldest_held()[: len(self.start), self.layout.heads(self.device)]
        held = (position >= 0) & ((position < self.rules.sink) | (position >= floor))
        return position.where(held, EMPTY)

    def commit(self, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor | None, impl: str = "torch") -> None:
        """Store new tokens, detached, overwriting the oldest ones that no later query needs.

        Args:
            key: ``[batch, kv_heads, new tokens, head_dim]``.
            value: ``[batch, kv_heads, new tokens, value_dim]``.
            valid: Boolean ``[batch, new tokens]``, False for padding; None if none is.
            impl: What runs `append_tokens`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        tokens, counts = key.shape[2], None
        if valid is not None:
            key, value, counts = real_first(key, valid), real_first(value, valid), valid.sum(1)
        lens = self.lens + (tokens if counts is None else counts)
        longest = self._longest + tokens if counts is None else int(lens.max())
        self._reserve(longest)
        self._write(key, value, counts, impl)
        self.lens, self._longest = lens, longest
        self.cumulative_length += tokens
        self._even = self._even and valid is None
        trailing = tokens if valid is None else int(valid.all(0).flip(0).long().cumprod(0).sum())
        self._unpadded = self._unpadded + tokens if trailing == tokens else trailing
        self._staged = False

    def _write(self, key: torch.Tensor, value: torch.Tensor, counts: torch.Tensor | None, impl: str) -> None:
        """Put new tokens, padding last, into their slots; ``counts`` ``[batch]`` are real, or all."""
        append_tokens(self.keys, self.values, key, value, self.lens, self.layout, counts=counts, impl=impl)

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all slots, as attention sees them."""
        return self.keys, self.values

    def make_room(self, tokens: int) -> None:
        """Lay the rings out for so many more tokens."""
        self._reserve(self._longest + tokens)

    def table(self) -> DecodingTable:
        """The layout as the torch path decodes by it; made once per layout."""
        if self._table is None or self._table.layout is not self.layout:
            self._table = DecodingTable(self.rules, self.layout, self._floor[0].tolist())
        return self._table

    def advance(self, tokens: int) -> None:
        """Count new tokens, none of them padding, that were stored where `layout` says, and in ``lens``."""
        self._longest += tokens
        self.cumulative_length += tokens
        self._unpadded += tokens
        self._staged = False

    def decodes(self, tokens: int, valid: torch.Tensor | None) -> bool:
        """Whether so many new tokens can be stored before they attend, as `decode` wants it."""
        if tokens > min(MOST_NEW_TOKENS, 1 + self._slack):
            return False
        return valid is None or tokens == 1  # `span_decode` takes the newest tokens, without padding among them

    def decode(self, query: torch.Tensor, impl: str, **options: Any) -> torch.Tensor:
        """Attention of the newest tokens, which are stored already: ``[batch, heads, tokens, head_dim]``.

        Args:
            query: ``[batch, heads, tokens, head_dim]``.
            impl: What runs `span_decode`.
            **options: ``scale``, ``softcap`` and ``sink_logits`` of `span_decode`.
        """
        rings = (self.keys, self.values, self.lens, self.layout)
        return span_decode(query, *rings, self._spans, impl=impl, **options)[0]

    def get_seq_length(self) -> int:
        """Tokens seen, padding included, as transformers counts them."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older versions of transformers

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that the plan's attention wants: of the new tokens only."""
        return query_length, self.cumulative_length

    def activate_past_recording(self, tokens: int = ROLLBACK_TOKENS) -> None:
        """Keep room for rollbacks of so many tokens from now on, or of more if that was asked for before."""
        self.record_past = True
        self._rollback = max(self._rollback, tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Args:
            tokens_to_remove: Minus the number of tokens to forget; a positive number is the length to keep, as
                older versions of transformers ask for.

        Raises:
            UnsupportedInputError: Some of the tokens are padding, or keys that the tokens to come would need
                have been overwritten.
        """
        removed = self.check_crop(tokens_to_remove)
        if removed == self.cumulative_length:
            self.reset()
            return
        self._floor, self._table = self._oldest_held(), None
        self.lens = self.lens - removed
        self._longest -= removed
        self._unpadded -= removed
        self.cumulative_length -= removed

    def check_crop(self, tokens_to_remove: int) -> int:
        """The number of tokens that `crop` would forget; raises what `crop` raises and changes nothing."""
        asked = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        removed = -asked if asked <= 0 else max(self.cumulative_length - asked, 0)
        if removed >= self.cumulative_length:
            return self.cumulative_length
        if removed > self._unpadded:
            raise UnsupportedInputError(f"crop(-{removed}): some of the last {removed} tokens are padding")
        lens, floor = self.lens - removed, self._oldest_held()  # floor [batch, kv_heads]
        needed = self._spans.oldest_key(lens).clamp(min=self.rules.sink)  # [kv_heads, batch]
        if bool(((needed < floor.T) & (needed < lens)).any()):
            raise UnsupportedInputError(
                f"crop(-{removed}): keys that the next tokens need are overwritten; to keep them, call "
                f"activate_past_recording({removed}) on the cache beforehand"
            )
        return removed

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self._forget()

    def state(self) -> LayerState:
        """What the layer holds; tensors are shared, not copied."""
        return LayerState(
            self._tensors(),
            self._reserved,
            self._slack,
            self._rollback if self.record_past else None,
            self.cumulative_length,
            self._unpadded,
        )

    def restore(self, state: LayerState) -> None:
        """Hold that state, whose tensors become the layer's own.

        Raises:
            KeyError: A tensor is missing.
            ValueError: Tensors have shapes or types that the layer's rules don't allow.
        """
        state.check(len(self.rules.rules))
        lens = state.tensors["lens"]
        self._forget()
        self.lens, self._floor, self.device = lens, state.tensors["floor"], lens.device
        self.layout = self.rules.layout(self.rules.capacities(state.reserved, state.slack))
        self._take_tensors(state.tensors)
        self._reserved, self._slack = state.reserved, state.slack
        self.record_past, self._rollback = state.rollback is not None, state.rollback or ROLLBACK_TOKENS
        self.cumulative_length, self._unpadded = state.seen, state.unpadded
        self._longest = int(lens.max())
        self._even = self._longest == int(lens.min())
        self.is_initialized = True

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All that is held, by name, the batch first."""
        return {"keys": self.keys, "values": self.values, "lens": self.lens, "floor": self._floor}

    def _take_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Hold keys and values that lie as `layout` says; raises `ValueError` where they don't."""
        keys, values = tensors["keys"], tensors["values"]
        for name, states in (("keys", keys), ("values", values)):
            if not states.is_floating_point() or states.dtype != keys.dtype or states.ndim != 3:
                raise ValueError(f"{name} holds {states.dtype} {tuple(states.shape)}")
            if states.shape[:2] != (len(self.lens), self.layout.slots):
                expected = f"[{len(self.lens)}, {self.layout.slots}, width]"
                raise ValueError(f"{name} holds {tuple(states.shape)}, expected {expected}")
        self.keys, self.values, self.dtype = keys, values, keys.dtype

    def lay_out(self, reserved: int, slack: int) -> None:
        """Move what is held to where a layer keeps it that was laid out for ``reserved`` tokens and ``slack`` slots."""
        self._reserved, self._slack = reserved, slack
        layout = self.rules.layout(self.rules.capacities(reserved, slack))
        if layout == self.layout:
            return
        self._floor = self._oldest_held()
        position = layout.positions(self.lens)
        source = self.layout.slot(layout.heads(self.device), position).where(position >= 0, 0)
        self._move(layout, source)
        self.layout = layout

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make sample i a copy of sample ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        self._over_batch(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the samples that ``indices`` names."""
        self._over_batch(lambda states: states[indices.to(states.device)])

    def _check_batch(self, states: torch.Tensor) -> None:
        if self.is_initialized and len(states) != len(self.keys):
            raise UnsupportedInputError(
                f"the cache holds {len(self.keys)} samples and gets {len(states)}; reset() it, or make another"
            )

    def _widen(self, dtype: torch.dtype) -> None:
        """Hold keys and values in another type."""
        self.keys, self.values, self.dtype = self.keys.to(dtype), self.values.to(dtype), dtype

    def _leave_inference_mode(self) -> None:
        self.keys, self.values, self.lens, self._floor = (
            states.clone() for states in (self.keys, self.values, self.lens, self._floor)
        )

    def _over_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.lens, self._floor = change(self.lens), change(self._floor)

    def _forget(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0
        self._staged = False
        self._reserved = self._slack = 0
        self._longest = 0
        self._table = self.step = None
        self._even = True  # whether all samples have the same length
        self._unpadded = 0  # newest tokens since the last padding in any sample

    def _reserve(self, length: int) -> None:
        """Make room for ``length`` tokens and one more, in steps that leave no head more than a block to spare."""
        slack = self._rollback if self.record_past else 0
        if length < self._reserved and slack == self._slack:
            return
        self.lay_out(self._reserved if length < self._reserved else self.rules.roomy_length(length), slack)

    def _move(self, layout: RingLayout, source: torch.Tensor) -> None:
        """Lay the slots out anew, each from slot ``source`` ``[batch, new slots]`` of `layout` so far."""
        self.keys, self.values = gather_slots(self.keys, source), gather_slots(self.values, source)

    def _oldest_held(self) -> torch.Tensor:
        """Position from which on every head still holds all keys besides the sink, ``[batch, kv_heads]``.

        While a layout lasts, lengths only grow, so that the last one tells what has been overwritten; `crop` and a new
        layout keep what was true before them in ``_floor``.
        """
        return self._floor.maximum(self.lens[:, None] - self.layout.rings(self.device))


def gather_slots(states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """``[batch, slots, dim]`` from the slots ``source`` ``[batch, new slots]`` of ``states``."""
    if states.shape[1] == 0:
        return states.new_zeros(*source.shape, states.shape[2])  # whoever saves them gets nothing else from memory
    return states.gather(1, source[:, :, None].expand(-1, -1, states.shape[2]))
