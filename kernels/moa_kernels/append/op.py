"""The public operation: checks, the choice of an implementation, and the operator that a compiler sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moa_kernels.append.reference import Append
from moa_kernels.backends import choose, run
from moa_kernels.rings import RingLayout

STORABLE = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""Types that the kernel copies, bit by bit."""


def append_tokens(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    lens: Tensor,
    layout: RingLayout,
    *,
    counts: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Store new tokens in place, over the oldest ones of each ring; ``lens`` stays as it is.

    Token t of sample b gets position ``lens[b] + t``. Only what a ring still holds after the last token is written:
    of a chunk longer than a ring, the sink's part and the end. Nothing synchronises with the host, and a CUDA graph
    may capture it. Gradients don't flow into the cache.

    Args:
        keys: ``[batch, slots, head_dim]``, the cache as ``layout`` describes it; written to. Numbers of one slot must
            lie side by side.
        values: ``[batch, slots, value_dim]``; written to, likewise.
        new_keys: ``[batch, kv_heads, new, head_dim]``, each sample's real tokens first, then padding.
        new_values: ``[batch, kv_heads, new, value_dim]``, likewise.
        lens: int64 ``[batch]``, tokens stored before.
        layout: Where each head's keys are.
        counts: int64 ``[batch]``, real tokens per sample; all ``new`` by default.
        impl: ``"triton"``, ``"cpu"``, ``"torch"`` or ``"auto"``.

    Raises:
        ValueError: Shapes or types don't fit.
        BackendUnavailableError: What ``impl`` names can't run here.
    """
    call = Append(keys, values, new_keys.detach(), new_values.detach(), lens, layout, counts)
    _check(call)
    backend = choose(impl, *call[:4], head_dim=None, dtypes=STORABLE)
    if torch.compiler.is_compiling():
        _operator(*call[:5], layout.flat, counts, backend.value)
    else:
        run(backend, "append.append_tokens", call)


@torch.library.custom_op(
    "moa_kernels::append_tokens",
    mutates_args=("keys", "values"),
    schema="(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, Tensor lens, int[] layout, "
    "Tensor? counts, str impl) -> ()",
)
def _operator(*arguments: Any) -> None:
    """`Append` for compilers: the layout as integers."""
    keys, values, new_keys, new_values, lens, layout, counts, impl = arguments
    run(
        impl,
        "append.append_tokens",
        Append(keys, values, new_keys, new_values, lens, RingLayout.from_flat(layout), counts),
    )


@_operator.register_fake
def _(*_: object) -> None:
    return


def _check(call: Append) -> None:
    keys, values, new_keys, new_values, lens, layout, counts = call
    kv_heads = len(layout.capacities)
    if new_keys.ndim != 4 or new_keys.shape[1] != kv_heads:
        raise ValueError(f"new_keys must be [batch, {kv_heads}, new, head_dim], not {list(new_keys.shape)}")
    if new_values.ndim != 4 or new_values.shape[:3] != new_keys.shape[:3]:
        raise ValueError(f"new_values must be {[*new_keys.shape[:3]]} by value_dim, not {list(new_values.shape)}")
    batch = new_keys.shape[0]
    for name, cache, fresh in (("keys", keys, new_keys), ("values", values, new_values)):
        if cache.shape != (batch, layout.slots, fresh.shape[-1]):
            raise ValueError(f"{name} must be {[batch, layout.slots, fresh.shape[-1]]}, not {list(cache.shape)}")
        if cache.dtype != fresh.dtype or cache.dtype != keys.dtype:
            raise ValueError(f"{name} are {cache.dtype}, new ones {fresh.dtype}; keys and values must be of one type")
        if cache.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in their last dimension, their strides are {cache.stride()}")
    for name, numbers in (("lens", lens), ("counts", counts)):
        if numbers is not None and (numbers.shape != (batch,) or numbers.dtype != torch.int64):
            raise ValueError(f"{name} must be int64 [{batch}], not {numbers.dtype} {list(numbers.shape)}")
