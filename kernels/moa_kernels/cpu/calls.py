"""Tensors as the library takes them."""

from __future__ import annotations

from ctypes import byref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moa_kernels.cpu.library import DTYPES, Call, Strided, library

if TYPE_CHECKING:
    from moa_kernels.rings import RingLayout
    from moa_kernels.spans import HeadSpans


def strided(states: Tensor) -> Strided:
    """``[batch, heads, tokens, dim]`` whose last dimension is contiguous."""
    batch, head, token, _ = states.stride()
    return Strided(states.data_ptr(), batch, head, token)


def rows_contiguous(states: Tensor) -> Tensor:
    """The same with its last dimension contiguous."""
    return states if states.stride(-1) == 1 else states.contiguous()


def place_rings(call: Call, keys: Tensor, values: Tensor) -> None:
    """Tell a call where the rings are."""
    call.keys, call.values = keys.data_ptr(), values.data_ptr()
    call.keys_batch, call.keys_slot = keys.stride()[:2]
    call.values_batch, call.values_slot = values.stride()[:2]


class LayerCall:
    """A `Call` being filled, with all that must live as long as it does.

    Args:
        query: ``[batch, heads, queries, dim]``, the newest tokens.
        spans: What each KV head attends.
        scale: Factor on the logits.
        softcap: Bound of the logits, or None.
        sink_logits: ``[heads]``, or None.
        out: Where the output goes, ``[batch, heads, queries, dim]`` with any strides.
    """

    def __init__(
        self,
        query: Tensor,
        spans: HeadSpans,
        *,
        scale: float,
        softcap: float | None,
        sink_logits: Tensor | None,
        out: Tensor,
    ) -> None:
        self.alive: list[Any] = []
        if scale <= 0:  # the library takes maxima before it scales
            query, scale = (-query, -scale) if scale < 0 else (torch.zeros_like(query), 1.0)
        call = self.struct = Call(query=self._rows(query), out=strided(out))
        call.batch, call.heads, call.queries, call.dim = query.shape
        call.value_dim = call.dim
        call.kv_heads, call.new_keys = len(spans.heads), query.shape[2]
        call.spans, call.sliding = self._data(spans.tensor(query.device)), spans.sliding_window
        call.scale, call.softcap = scale, softcap or 0.0
        call.dtype, call.item_bytes, call.threads = DTYPES[query.dtype], query.itemsize, torch.get_num_threads()
        if sink_logits is not None:
            call.sink_logits = self._data(sink_logits.detach().float().contiguous())
        self.alive.append(out)

    def new_tokens(self, key: Tensor, value: Tensor) -> None:
        """The newest keys and values, ``[batch, kv_heads, new_keys, dim]``."""
        self.struct.key, self.struct.value = self._rows(key), self._rows(value)
        self.struct.new_keys = key.shape[2]

    def real(self, counts: Tensor, columns: Tensor) -> None:
        """How many of the new tokens are real, int64 ``[batch]``, and their columns in order ``[batch, new_keys]``."""
        self.struct.counts = self._data(counts.long().contiguous())
        self.struct.columns = self._data(columns.int().contiguous())

    def before(self, lens: Tensor) -> None:
        """Positions before the new tokens, int64 ``[batch]``; their keys are in the rings, if there are any."""
        self.struct.lens = self._data(lens)

    def rings(self, keys: Tensor, values: Tensor, layout: RingLayout) -> None:
        """Where the keys before the new ones are."""
        if any(DTYPES.get(states.dtype) != self.struct.dtype for states in (keys, values)):
            raise ValueError(f"rings are {keys.dtype} and {values.dtype}; the library was called for another type")
        place_rings(self.struct, keys, values)
        self.alive += [keys, values]
        self.struct.rings = self._data(layout.tensor(keys.device))

    def log_sum_exp(self, lse: Tensor) -> None:
        """Where the log-sum-exp goes, float32 ``[batch, heads, queries]``."""
        self.struct.lse = self._data(lse)

    def move(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sink_logits: Tensor | None) -> None:
        """Other tensors of the same shapes, types and strides in the places of these; ``scale`` must be positive.

        ``out`` is ``[batch, queries, heads, dim]`` here. The tensors must live until the next `run` is over.
        """
        call = self.struct
        self.moved = [rows_contiguous(states) for states in (query, key, value)]
        call.query.data, call.key.data, call.value.data = (states.data_ptr() for states in self.moved)
        call.out.data = out.data_ptr()
        if sink_logits is not None:
            self.moved.append(sink_logits.detach().float().contiguous())
            call.sink_logits = self.moved[-1].data_ptr()

    def run(self, name: str) -> None:
        """Call a function of the library."""
        getattr(library(), f"moa_{name}")(byref(self.struct))

    def _rows(self, states: Tensor) -> Strided:
        states = rows_contiguous(states)
        self.alive.append(states)
        return strided(states)

    def _data(self, states: Tensor) -> int:
        self.alive.append(states)
        return states.data_ptr()
