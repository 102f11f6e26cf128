"""Pooling profiles of one model that were made from different samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.errors import ConfigError, ModelMismatchError
from moa_search.formats.files import sha256_of
from moa_search.formats.profile import Profile
from moa_search.formats.profile_content import MEAN_STATISTICS, SAMPLE_STATISTICS, LengthProfile, ProfileHeader
from moa_search.formats.tiers import TierLength, TierStatistics

Floats = npt.NDArray[np.float32]

SETTINGS = ("weights_hash", "dtype", "sink", "block", "native_layers")


def merge(profiles: Sequence[Profile]) -> Profile:
    """The profile of all samples of ``profiles``, as if one run had measured them in that order.

    Lengths that only some were made at are taken over.

    Raises:
        ConfigError: There are fewer than two, their settings differ, or they share samples.
        ModelMismatchError: They are of different models.
    """
    if len(profiles) < 2:
        raise ConfigError(f"{len(profiles)} profile given; merging takes at least two")
    first, headers = profiles[0].header, [profile.header for profile in profiles]
    for number, header in enumerate(headers[1:], 2):
        header.model.require(first.model, f"profile {number}")
        _require_equal(first, header, number, SETTINGS)
    _require_different_samples(headers)
    by_length = {}
    for length in sorted({length for profile in profiles for length in profile.by_length}):
        parts = [profile.by_length[length] for profile in profiles if length in profile.by_length]
        for part in parts[1:]:
            for setting in ("windows", "row_buckets"):
                if getattr(part.header, setting) != getattr(parts[0].header, setting):
                    raise ConfigError(f"the profiles' {setting} at length {length} differ; profile with equal settings")
        by_length[length] = _pooled(parts)
    tiers = _pooled_tiers(profiles, list(by_length))
    grids = () if tiers is None else tuple(entry.header for entry in tiers.by_length.values())
    header = first.model_copy(
        update={
            "calibration": _calibration(headers),
            "lengths": tuple(entry.header for entry in by_length.values()),
            "tiers": None if first.tiers is None else first.tiers.model_copy(update={"lengths": grids}),
        }
    )
    return Profile(header, by_length, tiers=tiers)


def _require_equal(first: ProfileHeader, other: ProfileHeader, number: int, settings: Sequence[str]) -> None:
    for setting in settings:
        ours, theirs = getattr(first, setting), getattr(other, setting)
        if ours != theirs:
            kind = ModelMismatchError if setting == "weights_hash" else ConfigError
            raise kind(f"profile {number} has {setting} {theirs}, the first has {ours}; they can't be pooled")


def _require_different_samples(headers: Sequence[ProfileHeader]) -> None:
    seen: dict[str, int] = {}
    for number, header in enumerate(headers, 1):
        hashes = header.calibration.get("sample_hashes") or [header.calibration.get("hash")]
        assert isinstance(hashes, list)
        for value in hashes:
            if value is not None and seen.setdefault(str(value), number) != number:
                raise ConfigError(
                    f"profiles {seen[str(value)]} and {number} share samples, which would count twice; profile with "
                    "another --seed"
                )


def _calibration(headers: Sequence[ProfileHeader]) -> dict[str, Any]:
    parts = [header.calibration for header in headers]
    hashes: list[Any] = []
    for part in parts:
        found = part.get("sample_hashes")
        hashes += found if isinstance(found, list) else []
    counts = [part.get("samples") for part in parts]
    return {
        "merged": [{key: value for key, value in part.items() if key != "sample_hashes"} for part in parts],
        "samples": sum(count for count in counts if isinstance(count, int)),
        "hash": sha256_of(*(str(part.get("hash")).encode() for part in parts)),
        "sample_hashes": hashes,
    }


def _pooled_tiers(profiles: Sequence[Profile], lengths: Sequence[int]) -> TierStatistics | None:
    """The changes of all samples, at each of the lengths.

    Raises:
        ConfigError: The profiles' tiers or transforms differ.
    """
    first = profiles[0]
    for number, profile in enumerate(profiles[1:], 2):
        ours, theirs = (None if x.header.tiers is None else list(x.header.tiers.bits) for x in (first, profile))
        if ours != theirs:
            raise ConfigError(
                f"profile {number} has {_tiers_text(theirs)}, the first has {_tiers_text(ours)}; profile with equal "
                "--tiers"
            )
        if first.tiers and profile.tiers and first.tiers.transforms != profile.tiers.transforms:
            raise ConfigError(
                f"profile {number} has other transforms of keys than the first; profile it with --transforms and the "
                "first one's file"
            )
    if first.tiers is None:
        return None
    by_length = {}
    for length in lengths:
        parts = [p.tiers.by_length[length] for p in profiles if p.tiers is not None and length in p.tiers.by_length]
        if any(part.header != parts[0].header for part in parts):  # files from before hold more than is asked for
            parts = [part.seeing_everything() for part in parts]
        by_length[length] = TierLength(
            parts[0].header,
            np.concatenate([part.answer_tokens for part in parts]),
            _joined([part.keys for part in parts]),
            _joined([part.values for part in parts]),
        )
    return TierStatistics(first.tiers.transforms, by_length)


def _joined(parts: Sequence[dict[int, dict[str, Floats]]]) -> dict[int, dict[str, Floats]]:
    """Changes by bits and statistic, of all samples."""
    return {
        bits: {name: np.concatenate([part[bits][name] for part in parts]) for name in statistics}
        for bits, statistics in parts[0].items()
    }


def _tiers_text(bits: Sequence[int] | None) -> str:
    return "no tiers" if bits is None else f"tiers {', '.join(map(str, bits))}"


def _pooled(parts: Sequence[LengthProfile]) -> LengthProfile:
    counts = np.array([part.header.samples for part in parts], dtype=np.float64)
    total = int(counts.sum())
    mean, error = {}, {}
    for name in MEAN_STATISTICS:
        means = np.stack([part.mean[name] for part in parts]).astype(np.float64)
        errors = np.stack([part.error[name] for part in parts]).astype(np.float64)
        weights = counts.reshape(-1, *[1] * (means.ndim - 1))
        pooled = (weights * means).sum(0) / total
        # Sums of squared deviations add up, with those of the means from the pooled mean.
        squares = (errors**2 * weights * (weights - 1)).sum(0) + (weights * (means - pooled) ** 2).sum(0)
        mean[name] = pooled.astype(np.float32)
        error[name] = np.sqrt(squares / (total * max(total - 1, 1))).astype(np.float32)

    return LengthProfile(
        header=parts[0].header.model_copy(update={"samples": total}),
        loss=np.concatenate([part.loss for part in parts]),
        per_sample={name: np.concatenate([part.per_sample[name] for part in parts]) for name in SAMPLE_STATISTICS},
        mean=mean,
        error=error,
    )
