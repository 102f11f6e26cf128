"""The public operations: checks, the choice of an implementation, and the operators that a compiler sees."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from moa_kernels.backends import DTYPES, Backend, choose, run
from moa_kernels.coded.reference import AppendCodes, DecodeCodes, SeeTokens, StoredStates
from moa_kernels.codes.storage import CodeLayout, Stored
from moa_kernels.codes.turns import Turns
from moa_kernels.decode.op import check_queries
from moa_kernels.spans import HeadSpans


def append_codes(
    new_keys: Tensor,
    new_values: Tensor,
    stored: Stored,
    lens: Tensor,
    layout: CodeLayout,
    turns: Turns,
    *,
    counts: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Encode new tokens and store them in place, over the oldest ones of each ring; ``lens`` stays as it is.

    Token t of sample b gets position ``lens[b] + t``. Only what a ring still holds after the last token is written. A
    vector's bytes depend on the vector and its position alone, however many come with it: all is computed in float64. A
    vector with a NaN or an infinite number gets a NaN scale.

    Args:
        new_keys: ``[batch, kv_heads, new, width]``, each sample's real tokens first, then padding.
        new_values: Likewise.
        stored: The layer's tensors; written to.
        lens: int64 ``[batch]``, tokens stored before.
        layout: Where everything is.
        turns: The heads' transforms.
        counts: int64 ``[batch]``, real tokens per sample; all ``new`` by default.
        impl: ``"triton"``, ``"cpu"``, ``"torch"`` or ``"auto"``.

    Raises:
        ValueError: Shapes or types don't fit.
        BackendUnavailableError: What ``impl`` names can't run here.
    """
    call = AppendCodes(new_keys.detach(), new_values.detach(), stored, lens, layout, turns, counts)
    if not torch.compiler.is_compiling():
        _check_append(call)
    backend = _choose("append_codes", impl, call.new_keys, call.new_values, layout=layout)
    if torch.compiler.is_compiling():
        _append(call.new_keys, call.new_values, list(stored), lens, layout.flat, turns.tensors, counts, backend.value)
    else:
        run(backend, "coded.append_codes", call)


def decode_codes(
    query: Tensor,
    stored: Stored,
    lens: Tensor,
    layout: CodeLayout,
    turns: Turns,
    spans: HeadSpans,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of the last ``new`` tokens of every sample, which are stored already, as codes give them back.

    Args:
        query: ``[batch, heads, new, width]``, 1 to `moa_kernels.decode.MOST_NEW_TOKENS` new tokens. Query
            heads that share a KV head are consecutive.
        stored: The layer's tensors.
        lens: int64 ``[batch]``, tokens stored per sample, the new ones included.
        layout: Where everything is; rings must hold all that the new tokens attend.
        turns: The heads' transforms.
        spans: What each head attends.
        scale: Factor on the logits; ``width ** -0.5`` by default.
        softcap: Bounds logits smoothly: ``softcap * tanh(logits / softcap)`` (Gemma 2).
        sink_logits: ``[heads]``, one more logit per head that takes weight but has no value (GPT-OSS).
        impl: ``"triton"``, ``"cpu"``, ``"torch"`` or ``"auto"``.

    Returns:
        Output and log-sum-exp, as `moa_kernels.decode.span_decode`.

    Raises:
        ValueError: Shapes, types or numbers don't fit.
        BackendUnavailableError: What ``impl`` names can't run here.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    call = DecodeCodes(query, stored, lens, layout, turns, spans, factor, softcap, sink_logits)
    if not torch.compiler.is_compiling():
        _check_decode(call)
    backend = _choose("decode_codes", impl, query, stored.key_sinks, stored.value_sinks, layout=layout)
    if torch.compiler.is_compiling():
        output, lse = _decode(
            query, list(stored), lens, layout.flat, turns.tensors, spans.flat, spans.sliding_window, factor, softcap,
            sink_logits, backend.value,
        )  # fmt: skip
        return output, lse
    result: tuple[Tensor, Tensor] = run(backend, "coded.decode_codes", call)
    return result


def see_tokens(
    keys: Tensor, values: Tensor, positions: Tensor, layout: CodeLayout, turns: Turns, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Keys and values as they come back from a cache, in their own type; the sink's as they are.

    Args:
        keys: ``[batch, kv_heads, tokens, width]``.
        values: Likewise.
        positions: int64 ``[batch or 1, tokens]``.
        layout: The heads' bits, and the sink; rings don't matter.
        turns: The heads' transforms.
        impl: ``"triton"``, ``"cpu"``, ``"torch"`` or ``"auto"``.

    Raises:
        ValueError: Shapes or types don't fit.
        BackendUnavailableError: What ``impl`` names can't run here.
    """
    call = SeeTokens(keys.detach(), values.detach(), positions, layout, turns)
    _check_new(keys, values, layout)
    _check_turns(turns, layout)
    backend = _choose("see_tokens", impl, call.keys, call.values, layout=layout)
    result: tuple[Tensor, Tensor] = run(backend, "coded.see_tokens", call)
    return result


def stored_states(
    stored: Stored, lens: Tensor, layout: CodeLayout, turns: Turns, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """What every slot holds as plain keys and values, ``[batch, slots, width]`` as ``layout.rings`` says; else zeros.

    Args:
        stored: The layer's tensors.
        lens: int64 ``[batch]``, tokens stored.
        layout: Where everything is.
        turns: The heads' transforms.
        impl: ``"triton"``, ``"cpu"``, ``"torch"`` or ``"auto"``.

    Raises:
        ValueError: Shapes or types don't fit.
        BackendUnavailableError: What ``impl`` names can't run here.
    """
    call = StoredStates(lens, stored, layout, turns)
    _check_stored(stored, len(lens), stored.key_sinks.dtype, layout)
    _check_turns(turns, layout)
    backend = _choose("stored_states", impl, stored.key_sinks, stored.value_sinks, layout=layout)
    result: tuple[Tensor, Tensor] = run(backend, "coded.stored_states", call)
    return result


@torch.library.custom_op(
    "moa_kernels::append_codes",
    mutates_args=("stored",),
    schema="(Tensor new_keys, Tensor new_values, Tensor(a!)[] stored, Tensor lens, int[] layout, Tensor[] turns, "
    "Tensor? counts, str impl) -> ()",
)
def _append(*arguments: Any) -> None:
    """`AppendCodes` for compilers: layout and transforms as integers and tensors."""
    new_keys, new_values, stored, lens, layout, turns, counts, impl = arguments
    run(
        impl,
        "coded.append_codes",
        AppendCodes(new_keys, new_values, Stored(*stored), lens, CodeLayout.from_flat(layout), Turns(*turns), counts),
    )


@_append.register_fake
def _(*_: object) -> None:
    return


@torch.library.custom_op(
    "moa_kernels::decode_codes",
    mutates_args=(),
    schema="(Tensor query, Tensor[] stored, Tensor lens, int[] layout, Tensor[] turns, int[] spans, "
    "int sliding_window, float scale, float? softcap, Tensor? sink_logits, str impl) -> (Tensor, Tensor)",
)
def _decode(*arguments: Any) -> Any:
    """`DecodeCodes` for compilers: layout, transforms and rules as integers and tensors."""
    query, stored, lens, layout, turns, spans, sliding_window, *others, impl = arguments
    tables = CodeLayout.from_flat(layout), Turns(*turns), HeadSpans.from_flat(spans, sliding_window)
    return run(impl, "coded.decode_codes", DecodeCodes(query, Stored(*stored), lens, *tables, *others))


@_decode.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def _choose(operation: str, impl: str, *states: Tensor, layout: CodeLayout) -> Backend:
    """As `backends.choose`; Triton multiplies codes on tensor cores, which takes 16-bit types."""
    tensor_cores = impl == Backend.TRITON or (impl == "auto" and states[0].is_cuda)
    takes = DTYPES[:2] if operation == "decode_codes" and tensor_cores else DTYPES
    return choose(impl, *states, head_dim=layout.width, dtypes=takes)


def _check_append(call: AppendCodes) -> None:
    new_keys, new_values, stored, lens, layout, turns, counts = call
    _check_new(new_keys, new_values, layout)
    _check_stored(stored, len(new_keys), new_keys.dtype, layout)
    _check_turns(turns, layout)
    for name, numbers in (("lens", lens), ("counts", counts)):
        if numbers is not None and (numbers.shape != (len(new_keys),) or numbers.dtype != torch.int64):
            raise ValueError(f"{name} must be int64 [{len(new_keys)}], not {numbers.dtype} {list(numbers.shape)}")


def _check_new(keys: Tensor, values: Tensor, layout: CodeLayout) -> None:
    kv_heads = len(layout.key_bits)
    for name, states in (("keys", keys), ("values", values)):
        if states.ndim != 4 or states.shape[1] != kv_heads or states.shape[3] != layout.width:
            raise ValueError(f"{name} must be [batch, {kv_heads}, tokens, {layout.width}], not {list(states.shape)}")
        if states.shape != keys.shape or states.dtype != keys.dtype:
            raise ValueError(
                f"{name} are {states.dtype} {list(states.shape)}, keys are {keys.dtype} {list(keys.shape)}"
            )
        if states.itemsize != layout.plain_bytes:
            raise ValueError(f"{name} are {states.dtype}; the layout is for numbers of {layout.plain_bytes} bytes")


def _check_stored(stored: Stored, batch: int, dtype: torch.dtype, layout: CodeLayout) -> None:
    sinks = [batch, len(layout.key_bits) * layout.sink, layout.width]
    wanted = (
        (torch.uint8, [batch, layout.keys.nbytes]),
        (torch.uint8, [batch, layout.values.nbytes]),
        (torch.float16, [batch, layout.keys.scale_slots]),
        (torch.float16, [batch, layout.values.scale_slots]),
        (dtype, sinks),
        (dtype, sinks),
    )
    for (name, tensor), (kind, shape) in zip(stored._asdict().items(), wanted, strict=True):
        if tensor.dtype != kind or list(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {kind} {shape}, not {tensor.dtype} {list(tensor.shape)} with strides "
                f"{tensor.stride()}"
            )


def _check_turns(turns: Turns, layout: CodeLayout) -> None:
    kv_heads, width = len(layout.key_bits), layout.width
    shapes = {"key_mean": [kv_heads, width], "frequencies": [width // 2], "order": [width]}
    shapes |= {"digits": [kv_heads], "digit_sizes": [kv_heads, 2]}
    for part in fields(turns):
        tensor, shape = getattr(turns, part.name), shapes.get(part.name, [kv_heads, width, width])
        dtype = torch.int64 if part.name in ("order", "digits") else torch.float64
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{part.name} must be {dtype} {shape}, not {tensor.dtype} {list(tensor.shape)}")


def _check_decode(call: DecodeCodes) -> None:
    query, stored, _, layout, turns, *_ = call
    if query.ndim != 4 or query.shape[3] != layout.width:
        raise ValueError(f"query must be [batch, heads, new, {layout.width}], not {list(query.shape)}")
    check_queries(call, layout.rings, "decode_codes")
    _check_stored(stored, len(query), query.dtype, layout)
    _check_turns(turns, layout)
