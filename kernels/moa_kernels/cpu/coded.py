"""The operations of `moa_kernels.coded` by the library: same arguments, same results as their torch references."""

from __future__ import annotations

from ctypes import byref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moa_kernels.cpu.calls import LayerCall, place_rings, rows_contiguous, strided
from moa_kernels.cpu.library import DTYPES, Call, Coded, library

if TYPE_CHECKING:
    from moa_kernels.coded.reference import AppendCodes, DecodeCodes, SeeTokens, StoredStates
    from moa_kernels.codes.storage import CodeLayout, Stored
    from moa_kernels.codes.turns import Turns

BLOCK = 128
"""Positions of a block, as source/coded.h has it: its keys turn by the block's first position, then by what is left."""


def append_codes(call: AppendCodes) -> None:
    """As `moa_kernels.coded.append_codes`.

    Bytes equal those of torch but where a number lies within float64's rounding of the border of two levels, to both
    of which it is equally near.
    """
    struct, alive = _new_tokens(call.new_keys, call.new_values, call.layout, call.turns)
    lens = call.lens.contiguous()
    counts = None if call.counts is None else call.counts.contiguous()
    struct.call.lens = lens.data_ptr()
    struct.call.counts = None if counts is None else counts.data_ptr()
    _place(struct, call.stored, call.layout)
    _run("append_codes", struct, alive)


def decode_codes(call: DecodeCodes) -> tuple[Tensor, Tensor]:
    """As `moa_kernels.coded.decode_codes`."""
    query = call.query
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
    run = LayerCall(
        query, call.spans, scale=call.scale, softcap=call.softcap, sink_logits=call.sink_logits, out=out
    )  # fmt: skip
    run.before(call.lens.contiguous())
    run.log_sum_exp(lse)
    longest = int(call.lens.max()) if len(call.lens) else 0
    struct = Coded(run.struct)
    run.alive.append(_transforms(struct, call.layout, call.turns, longest))
    _place(struct, call.stored, call.layout)
    _run("decode_codes", struct, run.alive)
    return out, lse


def see_tokens(call: SeeTokens) -> tuple[Tensor, Tensor]:
    """As `moa_kernels.coded.see_tokens`."""
    struct, alive = _new_tokens(call.keys, call.values, call.layout, call.turns)
    keys, values = (torch.empty_like(states, memory_format=torch.contiguous_format) for states in call[:2])
    positions = call.positions.expand(len(keys), -1).contiguous()
    struct.call.out, struct.call.query = strided(keys), strided(values)
    struct.positions = positions.data_ptr()
    _run("see_tokens", struct, alive)
    return keys, values


def stored_states(call: StoredStates) -> tuple[Tensor, Tensor]:
    """As `moa_kernels.coded.stored_states`."""
    sinks, layout = call.stored.key_sinks, call.layout
    keys, values = (sinks.new_empty(len(sinks), 1, layout.rings.slots, layout.width) for _ in range(2))
    lens = call.lens.contiguous()
    struct = Coded(Call(out=strided(keys), query=strided(values), lens=lens.data_ptr()))
    struct.call.batch, struct.call.kv_heads, struct.call.dim = len(sinks), len(layout.key_bits), layout.width
    struct.call.dtype, struct.call.threads = DTYPES[sinks.dtype], torch.get_num_threads()
    alive = _transforms(struct, layout, call.turns, 0)
    _place(struct, call.stored, layout)
    _run("stored_states", struct, alive)
    return keys[:, 0], values[:, 0]


def _new_tokens(keys: Tensor, values: Tensor, layout: CodeLayout, turns: Turns) -> tuple[Coded, list[Any]]:
    """A call about new tokens, and what must live as long."""
    keys, values = rows_contiguous(keys), rows_contiguous(values)
    struct = Coded(Call(key=strided(keys), value=strided(values)))
    struct.call.batch, struct.call.kv_heads, struct.call.new_keys, struct.call.dim = keys.shape
    struct.call.dtype, struct.call.threads = DTYPES[keys.dtype], torch.get_num_threads()
    return struct, [keys, values, _transforms(struct, layout, turns, 0)]


def _place(struct: Coded, stored: Stored, layout: CodeLayout) -> None:
    """Where everything is that is stored."""
    place_rings(struct.call, stored.key_sinks, stored.value_sinks)
    for name, part in zip(("key_codes", "value_codes", "key_scales", "value_scales"), stored, strict=False):
        setattr(struct, name, part.data_ptr())
    struct.key_bytes, struct.value_bytes = layout.keys.nbytes, layout.values.nbytes
    struct.key_slots, struct.value_slots = layout.keys.scale_slots, layout.values.scale_slots


def _transforms(struct: Coded, layout: CodeLayout, turns: Turns, longest: int) -> list[Tensor]:
    """Bits, rings and transforms; with tables of angles for ``longest`` positions where there are any."""
    device = torch.device("cpu")
    sides, rings = layout.tensor(device), layout.rings.tensor(device)
    struct.sides, struct.call.rings = sides.data_ptr(), rings.data_ptr()
    doubles, floats = _tables(turns)
    for name, table in (*doubles.items(), *floats.items()):
        setattr(struct, name, table.data_ptr())
    alive = [sides, rings, *doubles.values(), *floats.values()]
    if longest:
        near, far = _angles(turns, longest)
        struct.near, struct.far, struct.blocks = near.data_ptr(), far.data_ptr(), far.shape[1]
        alive += [near, far]
    return alive


def _tables(turns: Turns) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Transforms as the library takes them; made once."""
    kept: dict[str, Any] = turns.__dict__
    if "_for_cpu" not in kept:
        names = ("key_into", "key_mean", "frequencies", "value_into", "order", "digits", "digit_sizes")
        doubles = {name: getattr(turns, name).contiguous() for name in names}
        floats = {"key_back": turns.back_by_halves, "mean": turns.mean_by_halves, "value_back": turns.value_back}
        kept["_for_cpu"] = doubles, {name: table.float().contiguous() for name, table in floats.items()}
    tables: tuple[dict[str, Tensor], dict[str, Tensor]] = kept["_for_cpu"]
    return tables


def _angles(turns: Turns, longest: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines within a block ``[2, BLOCK, half]``, and of blocks' first positions ``[2, blocks, half]``."""
    kept: dict[str, Any] = turns.__dict__
    if "_near" not in kept:
        kept["_near"] = _of_positions(turns, torch.arange(BLOCK))
    blocks = longest // BLOCK + 1
    if "_far" not in kept or kept["_far"].shape[1] < blocks:
        kept["_far"] = _of_positions(turns, BLOCK * torch.arange(1 << blocks.bit_length()))
    return kept["_near"], kept["_far"]


def _of_positions(turns: Turns, positions: Tensor) -> Tensor:
    angles = positions.double()[:, None] * turns.frequencies
    filled = torch.nn.functional.pad(angles, (0, -len(turns.frequencies) % 16))
    return torch.stack([filled.cos(), filled.sin()]).float()


def _run(name: str, struct: Coded, alive: object) -> None:
    """Call a function of the library while its arguments live."""
    getattr(library(), f"moa_{name}")(byref(struct))
    del alive
