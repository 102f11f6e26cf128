"""The loaded library, and the structures that it takes."""

from __future__ import annotations

import ctypes
import functools
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

import torch  # its OpenMP must be loaded first: the library uses the same

from moa_kernels.cpu.build import UnavailableError, find_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types that the library takes, by its numbers."""


class Strided(Structure):
    """A tensor ``[batch, heads, tokens, dim]``; strides in elements."""

    _fields_ = (("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64))


class Call(Structure):
    """``struct Call`` of source/layer.h, which says what each part is."""

    _fields_ = (
        *((name, Strided) for name in ("query", "key", "value", "out")),
        *((name, c_void_p) for name in ("lse", "keys", "values")),
        *((name, c_int64) for name in ("keys_batch", "keys_slot", "values_batch", "values_slot")),
        *((name, c_void_p) for name in ("lens", "counts", "columns", "rings", "spans", "sink_logits")),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "queries", "new_keys", "dim", "value_dim")),
        ("sliding", c_int64),
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, c_int32) for name in ("dtype", "item_bytes", "threads")),
    )


class Influence(Structure):
    """``struct Influence`` of source/influence.h."""

    _fields_ = (
        *((name, Strided) for name in ("query", "grad", "key", "value")),
        *((name, c_void_p) for name in ("windows", "sink_logits", "totals", "origins", "row_gains")),
        *((name, c_int64) for name in ("heads", "kv_heads", "rows", "dim", "sink", "buckets", "bucket_rows")),
        ("window_count", c_int64),
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, c_int32) for name in ("dtype", "threads")),
    )


class Coded(Structure):
    """``struct Coded`` of source/coded.h."""

    _fields_ = (
        ("call", Call),
        *((name, c_void_p) for name in ("key_codes", "value_codes", "key_scales", "value_scales")),
        *((name, c_int64) for name in ("key_bytes", "value_bytes", "key_slots", "value_slots")),
        *((name, c_void_p) for name in ("sides", "key_into", "key_mean", "frequencies", "value_into", "order")),
        *((name, c_void_p) for name in ("key_back", "mean", "value_back", "near", "far", "digits", "digit_sizes")),
        ("blocks", c_int64),
        ("positions", c_void_p),
    )


FUNCTIONS = (
    "prefill", "append", "decode", "step", "influence",
    "append_codes", "decode_codes", "see_tokens", "stored_states",
)  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """The library of this process.

    Raises:
        UnavailableError: There is none for this machine.
    """
    reason = unavailable()
    if reason is not None:
        raise UnavailableError(reason)
    return _loaded()


def description() -> str:
    """What the loaded library was made for, in words."""
    loaded, products = library(), "floats"
    if loaded.moa_multiplies_bf16():
        products = "AMX tiles" if loaded.moa_tiles() else "bfloat16 pairs"
    return f"vectors of {loaded.moa_lanes()} floats, bfloat16 multiplied as {products}"


@functools.cache
def unavailable() -> str | None:
    """Why there is no library, or None; finds or compiles it at the first call."""
    try:
        _loaded()
    except UnavailableError as error:
        return f"the CPU kernels aren't available: {error}"
    return None


@functools.cache
def _loaded() -> ctypes.CDLL:
    path = find_library()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"{path} can't be loaded: {error}") from None
    sizes = loaded.moa_call_bytes(), loaded.moa_influence_bytes(), loaded.moa_coded_bytes()
    if sizes != tuple(map(ctypes.sizeof, (Call, Influence, Coded))):
        raise UnavailableError(f"{path} belongs to another version")
    if loaded.moa_tiles() < 0:
        raise UnavailableError("the system doesn't let this process use AMX; compile without -DMOA_AMX")
    for name in FUNCTIONS:
        function = getattr(loaded, f"moa_{name}")
        function.argtypes, function.restype = [c_void_p], None
    return loaded
