"""Profile files: influence statistics of one model, as one safetensors file with a JSON header.

For every length N the rows of a sample are cut into equal buckets, and windows form an increasing grid that
ends at N. An entry of a statistic sums over the rows of its bucket and the query heads of its KV head:

=============  =====================================================================  ==================
statistic      definition (design section 3)                                          kept
=============  =====================================================================  ==================
``squared``    sum of delta_i^2                                                       per sample, float16
``signed``     sum of delta_i                                                         per sample, float16
``absolute``   sum of |delta_i|                                                       mean, standard error
``elementwise`` sum over masked keys of |A (g - D) / (1 - A)| (MoA's criterion)       mean, standard error
``recall``     attention mass kept                                                    mean, standard error
=============  =====================================================================  ==================

In most buckets the longer windows hold every row's keys, so that nothing is lost. Version 3 leaves these cells out:
``measured`` says which are there. Of what else `moa_search.formats.tiers` describes it may hold. Files of versions 1
(without tiers) and 2 (with them) hold every cell; they stay what they are when they are written again.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moa_search.errors import ProfileFormatError, ProfileVersionError
from moa_search.formats import profile_views
from moa_search.formats.files import (
    atomic_write,
    canonical_json,
    describe_invalid,
    file_kind,
    one_line,
    parse_json,
    read_file,
    sha256_of,
    take_tensor,
)
from moa_search.formats.signature import ModelSignature, check_native_layers
from moa_search.formats.tiers import SIDES, TierLength, TiersHeader, TierStatistics, WindowGrid
from moa_search.formats.transforms import KeyTransforms
from moa_search.version import __version__

PROFILE_SCHEMAS: Final = ("moa-profile/1", "moa-profile/2", "moa-profile/3")
"""Every cell, without tiers, and with them; without cells in which nothing is lost."""
METADATA_KEY = "moa-profile"
SAMPLE_STATISTICS = ("squared", "signed")
"""Not linear over rows or samples, so kept per sample: ``[sample, layer, kv_head, bucket, window]``."""
MEAN_STATISTICS = ("absolute", "elementwise", "recall")
"""Linear, so kept as mean and standard error: ``[layer, kv_head, bucket, window]``."""

LOSSES = ("squared", "signed", "absolute", "elementwise", "absolute_error", "elementwise_error")
"""Statistics that are zero where a window holds all keys of every row; the attention mass kept isn't."""

Floats = npt.NDArray[np.float32]


class LengthHeader(WindowGrid):
    """What was measured at one length.

    Attributes:
        samples: Samples measured.
    """

    samples: int = Field(ge=1)


class ProfileHeader(BaseModel):
    """Everything about a profile but its numbers.

    Attributes:
        native_layers: Layers whose attention has a sliding window of its own, increasing. They weren't measured
            (their statistics are zero), a search leaves them alone, and a file without any doesn't name them.
        tiers: What was measured of tiers; a file without them doesn't name them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal["moa-profile/1", "moa-profile/2", "moa-profile/3"] = Field(default="moa-profile/3", alias="schema")
    library_version: str = __version__
    model: ModelSignature
    model_name: str = Field(description="the specification given to load_model")
    dtype: str
    sink: int = Field(ge=0)
    block: int = Field(ge=1)
    seed: int
    calibration: dict[str, JsonValue] = Field(default_factory=dict, description="sources and hash of the samples")
    lengths: tuple[LengthHeader, ...] = Field(min_length=1)
    versions: dict[str, str] = Field(default_factory=dict)
    native_layers: tuple[int, ...] = ()
    weights_hash: str | None = Field(default=None, description="tells checkpoints of one architecture apart")
    weights_bytes: int | None = Field(default=None, ge=1, description="memory of the model's weights at 16 bits each")
    tiers: TiersHeader | None = None

    @model_validator(mode="after")
    def _tiers_fit(self) -> ProfileHeader:
        if not self.leaves_out and self.schema_ != PROFILE_SCHEMAS[self.tiers is not None]:
            raise ValueError(f"{self.schema_} {'has no' if self.tiers else 'needs'} tiers")
        if self.tiers is not None and [x.length for x in self.tiers.lengths] != [x.length for x in self.lengths]:
            raise ValueError("the tiers' lengths aren't the profile's")
        return self

    @model_validator(mode="after")
    def _lengths_increase(self) -> ProfileHeader:
        if any(a.length >= b.length for a, b in itertools.pairwise(self.lengths)):
            raise ValueError("the lengths don't increase")
        return self

    @model_validator(mode="after")
    def _native_layers_make_sense(self) -> ProfileHeader:
        native, layers = self.native_layers, range(self.model.num_hidden_layers)
        if list(native) != sorted(layer for layer in set(native) if layer in layers):
            raise ValueError(f"the native layers don't increase within 0..{layers[-1]}")
        check_native_layers(self.model, native)
        return self

    @property
    def leaves_out(self) -> bool:
        """Whether cells in which nothing is lost aren't stored."""
        return self.schema_ == PROFILE_SCHEMAS[2]

    @property
    def searchable_layers(self) -> list[int]:
        """Layers that aren't native, increasing: those that a plan can shorten."""
        return [layer for layer in range(self.model.num_hidden_layers) if layer not in self.native_layers]


@dataclass(frozen=True, eq=False)
class LengthProfile:
    """Statistics at one length.

    Attributes:
        header: Length, windows, buckets and counts.
        loss: Loss of each sample, ``[sample]``, in nats per answer token: under dense attention, or under the plan
            that it was profiled under.
        per_sample: `SAMPLE_STATISTICS`, each ``[sample, layer, kv_head, bucket, window]``.
        mean: `MEAN_STATISTICS`, each ``[layer, kv_head, bucket, window]``.
        error: Standard errors of ``mean``; NaN-free, zero for a single sample.
    """

    header: LengthHeader
    loss: Floats
    per_sample: dict[str, Floats] = field(repr=False)
    mean: dict[str, Floats] = field(repr=False)
    error: dict[str, Floats] = field(repr=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LengthProfile):
            return NotImplemented
        pairs = [(self.loss, other.loss)]
        for mine, theirs in (
            (self.per_sample, other.per_sample),
            (self.mean, other.mean),
            (self.error, other.error),
        ):
            if mine.keys() != theirs.keys():
                return False
            pairs += [(values, theirs[name]) for name, values in mine.items()]
        return self.header == other.header and all(np.array_equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class RunSummary:
    """How the run that made a profile went. Not stored: the same samples give the same file on any machine.

    Attributes:
        measured: Samples measured in this run.
        resumed: Samples taken over from an earlier one that was stopped.
        seconds_per_sample: Median time of one measured sample, by length in tokens.
        peak_memory_bytes: Most memory held by the first process; None where the system doesn't say.
        on_gpu: Whether that is GPU memory.
    """

    measured: int
    resumed: int
    seconds_per_sample: dict[int, float]
    peak_memory_bytes: int | None
    on_gpu: bool


@dataclass(frozen=True)
class Profile:
    """Influence statistics of one model at one or more lengths.

    Attributes:
        header: Model, calibration, settings.
        by_length: Statistics by length in tokens.
        run: How it was made, in the process that made it.
        tiers: What is known of tiers; None where nothing was measured.
    """

    header: ProfileHeader
    by_length: dict[int, LengthProfile]
    run: RunSummary | None = field(default=None, compare=False, repr=False)
    tiers: TierStatistics | None = None

    # A frame and pictures, in a module of their own.
    influence = profile_views.influence
    plot_influence = profile_views.plot_influence
    to_frame = profile_views.to_frame
    _repr_html_ = profile_views.to_html

    @property
    def lengths(self) -> list[int]:
        """Profiled lengths in tokens, increasing."""
        return sorted(self.by_length)

    @property
    def checksum(self) -> str:
        """Hash of header and tensors as they are stored."""
        return _checksum(self._header_json(), self._tensors())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile atomically.

        Raises:
            ProfileFormatError: Header and arrays disagree, or a value isn't finite; nothing is written.
            ConfigError: The file can't be written there.
        """
        header = self._header_json()
        try:
            tensors = self._tensors()
            _unpack(self.header, tensors)
        except ValueError as error:
            raise ProfileFormatError(f"{path}: not written: {error}") from None
        # One entry, since safetensors writes several in any order.
        content = json.dumps({**header, "checksum": _checksum(header, tensors)}, allow_nan=False)
        with atomic_write(path) as file:
            file.write(save(tensors, metadata={METADATA_KEY: content}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile file.

        Raises:
            ConfigError: There is no such file.
            ProfileVersionError: The schema is of another version.
            ProfileFormatError: The file is truncated, foreign or damaged.
        """
        raw = read_file(path)
        try:
            tensors = load(raw)
            outer = parse_json(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            content = parse_json(outer["__metadata__"][METADATA_KEY])
            schema = content["schema"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            kind = file_kind(raw)
            if kind not in (None, "profile"):
                raise ProfileFormatError(
                    f"{path}: it is a {kind}, no profile; give the file that moa-profile wrote"
                ) from None
            raise ProfileFormatError(
                f"{path}: not a moa-search profile, or a truncated one ({type(error).__name__}: {one_line(error)})"
            ) from None
        if not isinstance(schema, str) or not schema.startswith("moa-profile/"):
            raise ProfileFormatError(f'{path}: not a moa-search profile (no "schema": "{PROFILE_SCHEMAS[0]}")')
        if schema not in PROFILE_SCHEMAS:
            raise ProfileVersionError(
                f"{path}: schema {one_line(schema)} is unknown to moa-search {__version__}; upgrade it"
            )
        checksum = content.pop("checksum", None)
        try:
            header = ProfileHeader.model_validate_json(json.dumps(content), strict=True)
            if checksum != _checksum(content, tensors):
                raise ValueError("damaged, its content doesn't match its checksum; make it again")
            by_length, tiers = _unpack(header, tensors)
            return cls(header, by_length, tiers=tiers)
        except ValidationError as error:
            raise ProfileFormatError(f"{path}: {describe_invalid(error, _keys())}") from None
        except (ValueError, RecursionError) as error:
            raise ProfileFormatError(f"{path}: {one_line(error)}") from None

    def _header_json(self) -> dict[str, Any]:
        content = self.header.model_dump(mode="json", by_alias=True)
        for later in ("native_layers", "weights_hash", "weights_bytes", "tiers"):
            if not content[later]:
                del content[later]  # as in files from before it: equal profiles give equal bytes
        return content

    def _tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Every array as it is stored; `_unpack` names what isn't finite in that precision."""
        tensors: dict[str, npt.NDArray[Any]] = {}
        for length, entry in sorted(self.by_length.items()):
            stored: dict[str, npt.NDArray[Any]] = {}
            for name in SAMPLE_STATISTICS:
                stored[name], tensors[f"{length}/{name}_scale"] = _halve(_single(entry.per_sample[name]))
            for name in MEAN_STATISTICS:
                stored[name], stored[f"{name}_error"] = _single(entry.mean[name]), _single(entry.error[name])
            if self.header.leaves_out:
                measured = _measured(stored)
                tensors[f"{length}/measured"] = measured.astype(np.uint8)
                # Contiguous, since safetensors writes memory as it lies.
                stored |= {name: np.ascontiguousarray(stored[name][..., measured]) for name in LOSSES}
            tensors[f"{length}/loss"] = _single(entry.loss)
            tensors |= {f"{length}/{name}": values for name, values in stored.items()}
        for name, values in ({} if self.tiers is None else self.tiers.arrays()).items():
            if values.ndim == 5:  # statistics; transforms stay as they are
                tensors[name], tensors[f"{name}_scale"] = _halve(_single(values))
            else:
                tensors[name] = values
        return tensors


def _checksum(header: dict[str, Any], tensors: dict[str, npt.NDArray[Any]]) -> str:
    parts = [canonical_json(header)]
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype} {tensor.shape}".encode(), np.ascontiguousarray(tensor).tobytes()]
    return sha256_of(*parts)


def _single(values: npt.ArrayLike) -> Floats:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)


def _halve(values: Floats) -> tuple[npt.NDArray[np.float16], Floats]:
    """Float16 values and a float32 scale per ``[sample, layer, kv_head]`` (squared gradients underflow)."""
    scale = np.abs(values).max(axis=(-2, -1), keepdims=True)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    with np.errstate(invalid="ignore"):
        return (values / scale).astype(np.float16), scale[..., 0, 0]


def _measured(stored: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.bool_]:
    """Cells in which some head of some sample loses something, ``[bucket, window]``."""
    found = [(stored[name] != 0).any(axis=tuple(range(stored[name].ndim - 2))) for name in LOSSES]
    measured: npt.NDArray[np.bool_] = np.logical_or.reduce(found)
    return measured


def _unpack(
    header: ProfileHeader, tensors: dict[str, npt.NDArray[Any]]
) -> tuple[dict[int, LengthProfile], TierStatistics | None]:
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


def _fill_in(tensors: dict[str, npt.NDArray[Any]], entry: LengthHeader) -> None:
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


def _unpack_tiers(header: ProfileHeader, tiers: TiersHeader, left: dict[str, npt.NDArray[Any]]) -> TierStatistics:
    """The arrays that ``tiers`` announces, taken out of ``left``.

    Raises:
        ValueError: As `_unpack`, or a transform can't be undone.
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


def _take_halved(tensors: dict[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...]) -> Floats:
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


def _keys() -> set[str]:
    """Every key that may appear in the header."""
    kinds = (ProfileHeader, LengthHeader, TiersHeader, ModelSignature)
    return {field.alias or name for kind in kinds for name, field in kind.model_fields.items()}
