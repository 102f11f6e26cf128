"""What a profile says of one model: its header, and its statistics at each length."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from moa_search.formats.signature import ModelSignature, check_native_layers
from moa_search.formats.tiers import TiersHeader, WindowGrid
from moa_search.version import __version__

PROFILE_SCHEMAS: Final = ("moa-profile/1", "moa-profile/2", "moa-profile/3")
"""Every cell, without tiers, and with them; without cells in which nothing is lost."""

SAMPLE_STATISTICS = ("squared", "signed")
"""Not linear over rows or samples, so kept per sample: ``[sample, layer, kv_head, bucket, window]``."""
MEAN_STATISTICS = ("absolute", "elementwise", "recall")
"""Linear, so kept as mean and standard error: ``[layer, kv_head, bucket, window]``."""

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
