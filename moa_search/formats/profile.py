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
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moa_search.errors import ConfigError, ProfileFormatError, ProfileVersionError
from moa_search.formats.files import atomic_write, canonical_json, describe_invalid, sha256_of
from moa_search.formats.signature import ModelSignature
from moa_search.version import __version__

__all__ = [
    "MEAN_STATISTICS",
    "PROFILE_SCHEMA",
    "SAMPLE_STATISTICS",
    "LengthHeader",
    "LengthProfile",
    "Profile",
    "ProfileHeader",
]

PROFILE_SCHEMA = "moa-profile/1"
SAMPLE_STATISTICS = ("squared", "signed")
"""Not linear over rows or samples, so kept per sample: ``[sample, layer, kv_head, bucket, window]``."""
MEAN_STATISTICS = ("absolute", "elementwise", "recall")
"""Linear, so kept as mean and standard error: ``[layer, kv_head, bucket, window]``."""

Floats = npt.NDArray[np.float32]


class LengthHeader(BaseModel):
    """What was measured at one length.

    Attributes:
        length: Tokens per sample, prompt and answer.
        windows: Window sizes in tokens, increasing, the last one at least ``length``.
        row_buckets: Number of equal slices of the rows.
        samples: Samples measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    length: int = Field(ge=1)
    windows: tuple[int, ...] = Field(min_length=1)
    row_buckets: int = Field(ge=1)
    samples: int = Field(ge=1)


class ProfileHeader(BaseModel):
    """Everything about a profile but its numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal["moa-profile/1"] = Field(default=PROFILE_SCHEMA, alias="schema")
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


@dataclass(frozen=True)
class LengthProfile:
    """Statistics at one length.

    Attributes:
        header: Length, windows, buckets and counts.
        loss: Loss of each sample under dense attention, ``[sample]``, in nats per answer token.
        per_sample: `SAMPLE_STATISTICS`, each ``[sample, layer, kv_head, bucket, window]``.
        mean: `MEAN_STATISTICS`, each ``[layer, kv_head, bucket, window]``.
        error: Standard errors of ``mean``; NaN-free, zero for a single sample.
    """

    header: LengthHeader
    loss: Floats
    per_sample: dict[str, Floats] = field(repr=False)
    mean: dict[str, Floats] = field(repr=False)
    error: dict[str, Floats] = field(repr=False)


@dataclass(frozen=True)
class Profile:
    """Influence statistics of one model at one or more lengths.

    Attributes:
        header: Model, calibration, settings.
        by_length: Statistics by length in tokens.
    """

    header: ProfileHeader
    by_length: dict[int, LengthProfile]

    @property
    def lengths(self) -> list[int]:
        """Profiled lengths in tokens, increasing."""
        return sorted(self.by_length)

    @property
    def checksum(self) -> str:
        """Hash of header and tensors as they are stored."""
        return _checksum(self._header_json(), self._tensors())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile atomically."""
        header, tensors = self._header_json(), self._tensors()
        metadata = {"header": json.dumps(header), "checksum": _checksum(header, tensors)}
        with atomic_write(path) as file:
            file.write(save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile file.

        Raises:
            ConfigError: There is no such file.
            ProfileVersionError: The schema is of another version.
            ProfileFormatError: The file is truncated, foreign or damaged.
        """
        try:
            raw = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        try:
            tensors = load(raw)
            metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", {})
            header_json = json.loads(metadata["header"])
            schema = header_json["schema"]
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ProfileFormatError(
                f"{path}: not a moa-search profile, or a truncated one ({type(error).__name__}: {_line(error)})"
            ) from None
        if schema != PROFILE_SCHEMA:
            raise ProfileVersionError(f"{path}: schema {schema!r} is unknown to moa-search {__version__}; upgrade it")
        if metadata.get("checksum") != _checksum(header_json, tensors):
            raise ProfileFormatError(f"{path}: damaged, its content doesn't match its checksum; make it again")
        try:
            header = ProfileHeader.model_validate(header_json)
            return cls(header, {entry.length: _unpack(header, entry, tensors) for entry in header.lengths})
        except ValidationError as error:
            raise ProfileFormatError(f"{path}: {describe_invalid(error)}") from None
        except (KeyError, ValueError) as error:
            raise ProfileFormatError(f"{path}: {_line(error)}") from None

    def _header_json(self) -> dict[str, Any]:
        return self.header.model_dump(mode="json", by_alias=True)

    def _tensors(self) -> dict[str, npt.NDArray[Any]]:
        tensors: dict[str, npt.NDArray[Any]] = {}
        for length, entry in sorted(self.by_length.items()):
            tensors[f"{length}/loss"] = entry.loss
            for name in SAMPLE_STATISTICS:
                tensors[f"{length}/{name}"], tensors[f"{length}/{name}_scale"] = _halve(entry.per_sample[name])
            for name in MEAN_STATISTICS:
                tensors[f"{length}/{name}"] = entry.mean[name]
                tensors[f"{length}/{name}_error"] = entry.error[name]
        return tensors


def _checksum(header: dict[str, Any], tensors: dict[str, npt.NDArray[Any]]) -> str:
    parts = [canonical_json(header)]
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype} {tensor.shape}".encode(), np.ascontiguousarray(tensor).tobytes()]
    return sha256_of(*parts)


def _halve(values: Floats) -> tuple[npt.NDArray[np.float16], Floats]:
    """Float16 values and a float32 scale per ``[sample, layer, kv_head]``: squared gradients underflow else."""
    scale = np.abs(values).max(axis=(-2, -1), keepdims=True)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    return (values / scale).astype(np.float16), scale[..., 0, 0]


def _unpack(header: ProfileHeader, entry: LengthHeader, tensors: dict[str, npt.NDArray[Any]]) -> LengthProfile:
    signature = header.model
    grid = (signature.num_hidden_layers, signature.num_key_value_heads, entry.row_buckets, len(entry.windows))
    per_sample = {}
    for name in SAMPLE_STATISTICS:
        half = _take(tensors, f"{entry.length}/{name}", (entry.samples, *grid))
        scale = _take(tensors, f"{entry.length}/{name}_scale", (entry.samples, *grid[:2]))
        per_sample[name] = half.astype(np.float32) * scale[..., None, None]
    return LengthProfile(
        header=entry,
        loss=_take(tensors, f"{entry.length}/loss", (entry.samples,)),
        per_sample=per_sample,
        mean={name: _take(tensors, f"{entry.length}/{name}", grid) for name in MEAN_STATISTICS},
        error={name: _take(tensors, f"{entry.length}/{name}_error", grid) for name in MEAN_STATISTICS},
    )


def _take(tensors: dict[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing")
    if tensors[name].shape != shape:
        raise ValueError(f"tensor {name} has shape {tensors[name].shape}, expected {shape}")
    if not np.isfinite(tensors[name]).all():
        raise ValueError(f"tensor {name} holds values that aren't finite")
    return tensors[name]


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else ""
