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
``measured`` says which are there. A profile may also hold tiers (`moa_search.formats.tiers`). Files of versions 1
(without tiers) and 2 (with them) hold every cell; they stay what they are when they are written again.

`Profile` is put together from what it says (`profile_content`), its arrays as they are stored (`profile_tensors`), and
its frame and pictures (`profile_views`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ValidationError
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
    require_schema,
    sha256_of,
)
from moa_search.formats.profile_content import PROFILE_SCHEMAS, LengthHeader, LengthProfile, ProfileHeader
from moa_search.formats.profile_tensors import Arrays, pack, unpack
from moa_search.formats.signature import ModelSignature
from moa_search.formats.tiers import TiersHeader, TierStatistics

METADATA_KEY = "moa-profile"


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
            unpack(self.header, tensors)
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
        require_schema(schema, PROFILE_SCHEMAS, path, ProfileFormatError, ProfileVersionError)
        checksum = content.pop("checksum", None)
        try:
            header = ProfileHeader.model_validate_json(json.dumps(content), strict=True)
            if checksum != _checksum(content, tensors):
                raise ValueError("damaged, its content doesn't match its checksum; make it again")
            by_length, tiers = unpack(header, tensors)
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

    def _tensors(self) -> Arrays:
        return pack(self.header, self.by_length, self.tiers)


def _checksum(header: dict[str, Any], tensors: Arrays) -> str:
    parts = [canonical_json(header)]
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype} {tensor.shape}".encode(), np.ascontiguousarray(tensor).tobytes()]
    return sha256_of(*parts)


def _keys() -> set[str]:
    """Every key that may appear in the header."""
    kinds = (ProfileHeader, LengthHeader, TiersHeader, ModelSignature)
    return {field.alias or name for kind in kinds for name, field in kind.model_fields.items()}
