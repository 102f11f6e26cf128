"""Cache layers of a fixed size, for `torch.compile` and CUDA graphs: no step asks the device for anything."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from moa_kernels.decode import MOST_NEW_TOKENS

from moa_search.errors import UnsupportedInputError
from moa_search.runtime.layer import EMPTY, MoACacheLayer
from moa_search.runtime.padding import real_first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moa_search.runtime.rules import LayerRules


class StaticMoACacheLayer(MoACacheLayer):
    """A layer whose rings have from the start what the plan keeps at ``max_length`` tokens.

    Counts live on the device, and all tensors stay where they are, so that a recorded graph stays right.

    Args:
        rules: What the layer's heads attend.
        max_length: Tokens per sample that it can take, padding aside.
        checks: Whether this layer raises when ``max_length`` is exceeded; one layer per cache does.

    Attributes:
        seen: int64 scalar, tokens seen including padding.
        parts: Names of the tensors that stay where they are.
    """

    is_compileable = True
    is_croppable = False
    parts: tuple[str, ...] = ("keys", "values", "lens", "seen")
    seen: torch.Tensor

    def __init__(self, rules: LayerRules, max_length: int, *, checks: bool) -> None:
        super().__init__(rules)
        self.max_length = max_length
        self._checks = checks
        self._slack = MOST_NEW_TOKENS - 1  # so that several new tokens can be stored before they attend

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take batch size, widths, dtype and device from the first states, and all the memory."""
        batch = key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.layout = self.rules.layout(self.rules.capacities(self.max_length, self._slack))
        with torch.inference_mode(False):  # for whatever mode the next pass is in: they stay where they are
            self._allocate(key_states, value_states)
            self.lens = torch.zeros(batch, dtype=torch.int64, device=self.device)
            self.seen = torch.zeros((), dtype=torch.int64, device=self.device)
        self.is_initialized = True
        self._mark()

    def _allocate(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.keys = key.new_zeros(len(key), self.layout.slots, key.shape[-1])
        self.values = value.new_zeros(len(value), self.layout.slots, value.shape[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.is_initialized:
            self._mark()

    @property
    def fixed_storage(self) -> list[torch.Tensor]:
        """Keys, values and counts, once there are any."""
        return [getattr(self, name) for name in self.parts] if self.is_initialized else []

    @contextmanager
    def stored_in(self, storage: Sequence[torch.Tensor]) -> Iterator[None]:
        """As `MoACacheLayer.stored_in`."""
        own = self.fixed_storage
        if storage:
            self._place(storage)
        try:
            yield
        finally:
            if storage:
                self._place(own)

    def _place(self, storage: Sequence[torch.Tensor]) -> None:
        for name, part in zip(self.parts, storage, strict=True):
            setattr(self, name, part)

    @property
    def start(self) -> torch.Tensor:
        """Position of the next token, ``[batch]``."""
        return self.lens

    @property
    def longest(self) -> int:
        """Tokens in the longest sample; asks the device."""
        return int(self.lens.max()) if self.is_initialized else 0

    @property
    def shortest(self) -> int:
        """Tokens in the shortest sample; asks the device."""
        return int(self.lens.min()) if self.is_initialized else 0

    def positions(self) -> torch.Tensor:
        """Position that each slot holds, or `EMPTY`: int64 ``[batch, slots]``."""
        position = self.layout.positions(self.lens)
        return position.where(position >= 0, EMPTY)

    def commit(self, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor | None, impl: str = "torch") -> None:
        """As `MoACacheLayer.commit`; raises `UnsupportedInputError` on a CPU, where ``max_length`` is exceeded.

        On a GPU that is a device-side assertion, since asking would stall every step.
        """
        counts = None
        if valid is not None:
            key, value, counts = real_first(key, valid), real_first(value, valid), valid.sum(1)
        self._write(key, value, counts, impl)
        self.lens.add_(key.shape[2] if counts is None else counts)
        self.seen.add_(key.shape[2])
        if self._checks:
            _check_room(self.lens, self.max_length)
        self._staged = False

    def get_seq_length(self) -> torch.Tensor | int:  # type: ignore[override]  # as transformers' own static layers
        """Tokens seen, padding included: a scalar tensor once there is a device to keep it on."""
        return self.seen if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Tokens per sample that the layer can take."""
        return self.max_length

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """As `MoACacheLayer.get_mask_sizes`; the offset is a tensor, by which `moa_mask` knows these layers."""
        return query_length, self.get_seq_length()

    def activate_past_recording(self, tokens: int = 0) -> NoReturn:
        """Refuse: what the rings have overwritten can't be brought back."""
        raise UnsupportedInputError(
            "a MoACache of fixed size can't be rolled back, as assisted decoding does; leave max_length unset"
        )

    def check_crop(self, tokens_to_remove: int) -> int:
        """Refuse, as `activate_past_recording` does."""
        return self.activate_past_recording()

    def reset(self) -> None:
        """Forget everything, and keep the memory: graphs go on with it."""
        self._staged = False
        if self.is_initialized:
            self.lens.zero_()
            self.seen.zero_()

    def _over_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.is_initialized:
            return
        kept = self.fixed_storage[:-1]  # all but `seen`, which no sample has for itself
        changed = [change(states) for states in kept]
        if changed[0].shape == kept[0].shape:
            for own, states in zip(kept, changed, strict=True):
                own.copy_(states)
        else:
            self._place([*changed, self.seen])
            self._mark()

    def _widen(self, dtype: torch.dtype) -> None:
        """Refuse, unless nothing changes: graphs were made for the type."""
        if dtype != self.keys.dtype:
            raise UnsupportedInputError(
                f"a MoACache of fixed size that holds {self.keys.dtype} can't take {dtype}; make another, or leave "
                "max_length unset"
            )

    def _leave_inference_mode(self) -> None:
        self._place([states.clone() for states in self.fixed_storage])
        self._mark()

    def _mark(self) -> None:
        """Tell the compiler that these tensors stay where they are; CUDA graphs would copy them otherwise."""
        if not torch.compiler.is_compiling():
            for states in self.fixed_storage:
                torch._dynamo.mark_static_address(states)


# It says that it writes, or a compiler would drop it: nothing reads what it returns.
@torch.library.custom_op("moa_search::check_room", mutates_args=("lens",))
def _check_room(lens: torch.Tensor, max_length: int) -> None:
    """Fail where a sample has more than ``max_length`` tokens."""
    message = f"more tokens than the {max_length} that this MoACache was made for (max_length)"
    if lens.is_cuda:
        torch._assert_async((lens <= max_length).all(), message)
    elif int(lens.max()) > max_length:
        raise UnsupportedInputError(f"{message}; make it with a larger max_length, or without")


@_check_room.register_fake
def _(lens: torch.Tensor, max_length: int) -> None:
    return None
