"""A profile's arrays as its file stores them: half of the precision, and no cells in which nothing is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.formats.files import take_tensor
from moa_search.formats.profile_content import (
    MEAN_STATISTICS,
    SAMPLE_STATISTICS,
    Floats,
    LengthHeader,
    LengthProfile,
    ProfileHeader,
)
from moa_search.formats.tiers import SIDES, TierLength, TiersHeader, TierStatistics
from moa_search.formats.transforms import KeyTransforms

Arrays = dict[str, npt.NDArray[Any]]

LOSSES = ("squared", "signed", "absolute", "elementwise", "absolute_error", "elementwise_error")
"""Statistics that are zero where a window holds all keys of every row; the attention mass kept isn't."""


def pack(header: ProfileHeader, by_length: dict[int, LengthProfile], tiers: TierStatistics | None) -> Arrays:
    """Every array as it is stored; `unpack` names what isn't finite in that precision."""
    tensors: Arrays = {}
    for length, entry in sorted(by_length.items()):
        stored: Arrays = {}
        for name in SAMPLE_STATISTICS:
            stored[name], tensors[f"{length}/{name}_scale"] = _halve(_single(entry.per_sample[name]))
        for name in MEAN_STATISTICS:
            stored[name], stored[f"{name}_error"] = _single(entry.mean[name]), _single(entry.error[name])
        if header.leaves_out:
            measured = _measured(stored)
            tensors[f"{length}/measured"] = measured.astype(np.uint8)
            # Contiguous, since safetensors writes memory as it lies.
            stored |= {name: np.ascontiguousarray(stored[name][..., measured]) for name in LOSSES}
        tensors[f"{length}/loss"] = _single(entry.loss)
        tensors |= {f"{length}/{name}": values for name, values in stored.items()}
    for name, values in ({} if tiers is None else tiers.arrays()).items():
        if values.ndim == 5:  # statistics; transforms stay as they are
            tensors[name], tensors[f"{name}_scale"] = _halve(_single(values))
        else:
            tensors[name] = values
    return tensors


def unpack(header: ProfileHeader, tensors: Arrays) -> tuple[dict[int, LengthProfile], TierStatistics | None]:
    """The arrays that ``header`` announces.

    Raises:
        ValueError: A tensor is missing, unexpected, of another shape or type, or not finite, or says something of
            a native layer.
    """
    left = dict(tensors)
    layers_heads = (header.model.num_hidden_layers, header.model.num_key_value_heads)
    by_length = {}
    for entry in header.lengths:
        grid = (*layers_heads, entry.row_buckets, len(entry.windows))
        shape = (entry.samples, *grid)
        if header.leaves_out:
            _fill_in(left, entry)
        per_sample = {name: _take_halved(left, f"{entry.length}/{name}", shape) for name in SAMPLE_STATISTICS}
        by_length[entry.length] = LengthProfile(
            header=entry,
            loss=take_tensor(left, f"{entry.length}/loss", (entry.samples,)),
            per_sample=per_sample,
            mean={name: take_tensor(left, f"{entry.length}/{name}", grid) for name in MEAN_STATISTICS},
            error={name: take_tensor(left, f"{entry.length}/{name}_error", grid) for name in MEAN_STATISTICS},
        )
        _require_zeros(by_length[entry.length], header.native_layers)
    tiers = None if header.tiers is None else _unpack_tiers(header, header.tiers, left)
    if left:
        raise ValueError(f"tensor {min(left)} belongs to no length in the header")
    return by_length, tiers


def _single(values: npt.ArrayLike) -> Floats:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)


def _halve(values: Floats) -> tuple[npt.NDArray[np.float16], Floats]:
    """Float16 values and a float32 scale per ``[sample, layer, kv_head]`` (squared gradients underflow)."""
    scale = np.abs(values).max(axis=(-2, -1), keepdims=True)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return (values / scale).astype(np.float16), scale[..., 0, 0]


def _measured(stored: Arrays) -> npt.NDArray[np.bool_]:
    """Cells in which some head of some sample loses something, ``[bucket, window]``."""
    found = [(stored[name] != 0).any(axis=tuple(range(stored[name].ndim - 2))) for name in LOSSES]
    measured: npt.NDArray[np.bool_] = np.logical_or.reduce(found)
    return measured


def _fill_in(tensors: Arrays, entry: LengthHeader) -> None:
    """Put zeros into the statistics of a length where cells were left out, in place.

    Raises:
        ValueError: What says which cells are there is missing or damaged, or their number is another.
    """
    cells = (entry.row_buckets, len(entry.windows))
    at = f"{entry.length}/measured"
    measured = take_tensor(tensors, at, cells, np.uint8)
    if (measured > 1).any():
        raise ValueError(f"tensor {at} holds more than 0 and 1")
    for name in (f"{entry.length}/{name}" for name in LOSSES):
        if name in tensors:
            stored = tensors[name]
            if stored.ndim < 1 or stored.shape[-1] != measured.sum():
                raise ValueError(f"tensor {name} has shape {stored.shape}, expected {measured.sum()} cells")
            whole = np.zeros((*stored.shape[:-1], *cells), dtype=stored.dtype)
            whole[..., measured.astype(bool)] = stored
            tensors[name] = whole


def _unpack_tiers(header: ProfileHeader, tiers: TiersHeader, left: Arrays) -> TierStatistics:
    """The arrays that ``tiers`` announces, taken out of ``left``.

    Raises:
        ValueError: As `unpack`, or a transform can't be undone.
    """
    model = header.model
    heads = (model.num_hidden_layers, model.num_key_value_heads)
    named = [name for name in left if name.startswith("transforms/")]
    transforms = KeyTransforms.of({name.removeprefix("transforms/"): left.pop(name) for name in named}, model)
    by_length = {}
    for entry, grid in zip(header.lengths, tiers.lengths, strict=True):
        shape = (entry.samples, *heads, grid.row_buckets, len(grid.windows))
        sides: list[dict[int, dict[str, Floats]]] = [
            {
                bits: {
                    name: _take_halved(left, f"{grid.length}/{side}{bits}/{name}", shape) for name in SAMPLE_STATISTICS
                }
                for bits in tiers.bits
            }
            for side in SIDES
        ]
        answer_tokens = take_tensor(left, f"{grid.length}/answer_tokens", (entry.samples,))
        if (answer_tokens < 1).any():
            raise ValueError(f"tensor {grid.length}/answer_tokens holds less than one token")
        by_length[grid.length] = TierLength(grid, answer_tokens, *sides)
        for by_bits in sides:
            for statistics in by_bits.values():
                _require_zero_layers(statistics, header.native_layers, grid.length)
    return TierStatistics(transforms, by_length)


def _take_halved(tensors: Arrays, name: str, shape: tuple[int, ...]) -> Floats:
    """What `_halve` made two tensors of."""
    half = take_tensor(tensors, name, shape, np.float16)
    scale = take_tensor(tensors, f"{name}_scale", shape[:3])
    values: Floats = half.astype(np.float32) * scale[..., None, None]
    return values


def _require_zeros(entry: LengthProfile, native_layers: tuple[int, ...]) -> None:
    for statistics in (entry.per_sample, entry.mean, entry.error):
        _require_zero_layers(statistics, native_layers, entry.header.length)


def _require_zero_layers(statistics: dict[str, Floats], native_layers: tuple[int, ...], length: int) -> None:
    for name, values in statistics.items():
        for layer in native_layers:
            if values[..., layer, :, :, :].any():
                raise ValueError(f"{name} at length {length} isn't zero in native layer {layer}")
