"""Files of every schema version ever released. They are never changed: new versions add new files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moa_search.formats import ModelSignature, Plan, Profile
from moa_search.formats.foreign import read_foreign
from moa_search.formats.profile_content import (
    MEAN_STATISTICS,
    SAMPLE_STATISTICS,
    LengthHeader,
    LengthProfile,
    ProfileHeader,
)
from moa_search.formats.provenance import Budget, LengthMetrics, Provenance
from moa_search.formats.tiers import TierLength, TiersHeader, TierStatistics, WindowGrid
from moa_search.formats.transforms import KeyTransforms
from moa_search.spans import DENSE, SpanRule

GOLDEN = Path(__file__).parents[2] / "golden"

MODEL = ModelSignature(
    architecture="llama",
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope={"rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}},
    config={"hidden_size": 64, "intermediate_size": 128, "vocab_size": 1000, "max_position_embeddings": 8192},
)

PLAN_1 = Plan.from_rules(
    [[SpanRule(320, 0), SpanRule(-128, 64)], [SpanRule(64, 160), DENSE]],
    MODEL,
    library_version="0.1.0",
    sink=64,
    block=64,
    anchor="position",
    provenance=Provenance(
        searcher="exact",
        profile="sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        criterion="squared",
        budgets=(Budget(length=1024, density=0.625), Budget(length=4096, density=0.5)),
        length_weights={"1024": 1.0, "2048": 0.5},
        objective=0.75,
        dual_bound=0.7421875,
        gap=0.0104,
        versions={"highspy": "1.16.0", "numpy": "2.4.6"},
    ),
    predicted=(
        LengthMetrics(length=1024, density=0.5625, attention_density=0.75, loss=0.5, loss_error=0.03125),
        LengthMetrics(length=4096, density=0.484375, attention_density=0.625),
    ),
)


NATIVE_PLAN_1 = Plan.from_rules(
    [[DENSE, DENSE], [SpanRule(64, 160), DENSE]],
    MODEL.model_copy(update={"config": {**MODEL.config, "sliding_window": 512}}),
    native_layers=(0,),
    library_version="0.1.0",
    predicted=(LengthMetrics(length=1024, density=0.84375, attention_density=0.875, loss=0.5),),
)


def profile_1() -> Profile:
    """Every array counts up in eighths from a start of its own."""
    lengths = (
        LengthHeader(length=128, windows=(64, 128), row_buckets=2, samples=2),
        LengthHeader(length=256, windows=(64, 128, 256), row_buckets=2, samples=1),
    )
    header = ProfileHeader(
        schema="moa-profile/1",
        library_version="0.1.0",
        model=MODEL,
        model_name="tiny",
        dtype="float32",
        sink=64,
        block=64,
        seed=7,
        calibration={"sources": ["passkey"], "hash": "sha256:00", "samples": 2},
        lengths=lengths,
        versions={"torch": "2.13.0"},
    )

    def counting(start: int, *shape: int) -> np.ndarray:
        return (np.arange(start, start + np.prod(shape), dtype=np.float32) / 8).reshape(shape)

    by_length = {}
    for entry in lengths:
        grid = (2, 2, entry.row_buckets, len(entry.windows))
        by_length[entry.length] = LengthProfile(
            header=entry,
            loss=counting(entry.length, entry.samples),
            per_sample={name: counting(i, entry.samples, *grid) for i, name in enumerate(SAMPLE_STATISTICS)},
            mean={name: counting(10 + i, *grid) for i, name in enumerate(MEAN_STATISTICS)},
            error={name: counting(20 + i, *grid) for i, name in enumerate(MEAN_STATISTICS)},
        )
    # Per-sample statistics are kept in float16 relative to their head's largest.
    for profile in by_length.values():
        for values in profile.per_sample.values():
            largest = values.max(axis=(-2, -1), keepdims=True)
            values[:] = (values / largest).astype(np.float16).astype(np.float32) * largest
    return Profile(header, by_length)


def profile_2() -> Profile:
    """The same with two tiers."""
    profile = profile_1()
    lengths = tuple(WindowGrid(length=n, windows=(64, n), row_buckets=1) for n in profile.lengths)
    tiers = TiersHeader(bits=(8, 2), lengths=lengths)

    def counting(start: int, *shape: int) -> np.ndarray:
        values = (np.arange(start, start + np.prod(shape), dtype=np.float32) / 8).reshape(shape)
        largest = values.max(axis=(-2, -1), keepdims=True)
        return (values / largest).astype(np.float16).astype(np.float32) * largest

    by_length = {}
    for grid, entry in zip(lengths, profile.header.lengths, strict=True):
        keys, values = (
            {
                bits: {
                    name: counting(100 * side + 10 * bits + i, entry.samples, 2, 2, 1, 2)
                    for i, name in enumerate(SAMPLE_STATISTICS)
                }
                for bits in tiers.bits
            }
            for side in (1, 2)
        )
        by_length[grid.length] = TierLength(grid, np.arange(1, entry.samples + 1, dtype=np.float32), keys, values)
    mean = np.arange(2 * 2 * 16, dtype=np.float32).reshape(2, 2, 16) / 8
    balance = np.eye(16, dtype=np.float32) * (1 + mean[..., None])
    frequencies = np.arange(2 * 8, dtype=np.float32).reshape(2, 8) / 64
    transforms = KeyTransforms(mean, balance, frequencies, np.arange(16, dtype=np.int32)[::-1].copy())
    header = ProfileHeader.model_validate(
        {**profile.header.model_dump(by_alias=True), "schema": "moa-profile/2", "tiers": tiers}
    )
    return Profile(header, profile.by_length, tiers=TierStatistics(transforms, by_length))


def profile_3() -> Profile:
    """The same, nothing lost where a window holds all keys of its rows."""
    profile = profile_2()
    for length, entry in profile.by_length.items():
        rows = length // entry.header.row_buckets
        whole = np.array(entry.header.windows) >= rows * np.arange(1, entry.header.row_buckets + 1)[:, None]
        for statistics in (entry.per_sample, entry.mean, entry.error):
            for name, values in statistics.items():
                if name != "recall":
                    values[..., whole] = 0
        for values in entry.per_sample.values():  # their heads' largest are others now
            largest = np.maximum(values.max(axis=(-2, -1), keepdims=True), np.float32(2**-20))
            values[:] = (values / largest).astype(np.float16).astype(np.float32) * largest
    return Profile(
        profile.header.model_copy(update={"schema_": "moa-profile/3"}), profile.by_length, None, profile.tiers
    )


def spectrum_profile_3() -> Profile:
    """The same with transforms that know which channels vary most."""
    profile = profile_3()
    assert profile.tiers is not None
    spectrum = np.broadcast_to(2.0 ** -np.arange(16, dtype=np.float32), (2, 2, 16)).copy()
    transforms = dataclasses.replace(profile.tiers.transforms, spectrum=spectrum)
    return dataclasses.replace(profile, tiers=dataclasses.replace(profile.tiers, transforms=transforms))


def plan_2(profile: Profile) -> Plan:
    """Bits per head, with the profile's transforms of keys."""
    tiers = profile.tiers
    assert tiers is not None
    assert PLAN_1.provenance is not None
    return Plan.from_rules(
        PLAN_1.rules,
        MODEL,
        tiers=[[(8, 4), (16, 16)], [(2, 2), (16, 8)]],
        transforms=tiers.transforms,
        library_version="0.1.0",
        sink=64,
        block=64,
        anchor="position",
        provenance=PLAN_1.provenance.model_copy(update={"budgets": (Budget(length=1024, share=0.25),)}),
        predicted=(
            LengthMetrics(length=1024, density=0.5625, share=0.25, attention_density=0.75, loss=0.5, loss_error=0.125),
        ),
    )


def native_profile_1() -> Profile:
    """The same with nothing measured in the first layer."""
    profile = profile_1()
    for entry in profile.by_length.values():
        for statistics in (entry.per_sample, entry.mean, entry.error):
            for values in statistics.values():
                values[..., 0, :, :, :] = 0
    header = profile.header.model_copy(update={"model": NATIVE_PLAN_1.model, "native_layers": (0,)})
    return Profile(header, profile.by_length)


def test_plan_1(tmp_path: Path) -> None:
    golden = GOLDEN / "moa-plan-1.json"
    loaded = Plan.load(golden)
    assert loaded == PLAN_1
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == golden.read_bytes()


def test_plan_1_with_native_layers(tmp_path: Path) -> None:
    golden = GOLDEN / "moa-plan-1-native.json"
    loaded = Plan.load(golden)
    assert loaded == NATIVE_PLAN_1
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == golden.read_bytes()


@pytest.mark.parametrize(
    ("name", "profile"),
    [("moa-plan-2.json", profile_2), ("moa-plan-2-spectrum.json", spectrum_profile_3)],
)
def test_plan_2(name: str, profile: Callable[[], Profile], tmp_path: Path) -> None:
    golden, expected = GOLDEN / name, plan_2(profile())
    loaded = Plan.load(golden)
    assert loaded == expected
    assert loaded.key_transforms == expected.key_transforms
    loaded.save(tmp_path / "again.json")
    for name in ("again.json", KeyTransforms.file_name(str(loaded.transforms))):
        kept = golden if name == "again.json" else GOLDEN / name
        assert (tmp_path / name).read_bytes() == kept.read_bytes()


def test_moas_alphas_and_betas(tmp_path: Path) -> None:
    """What they become as a plan, notes and all, is golden too."""
    golden = GOLDEN / "moa-plan-1-imported.json"
    found = read_foreign(GOLDEN / "moa-alphas-betas.json", MODEL).model_copy(update={"library_version": "0.1.0"})
    assert found == Plan.load(golden)
    found.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == golden.read_bytes()


def test_duo_attentions_pattern() -> None:
    plan = read_foreign(GOLDEN / "duo-attention", MODEL)
    assert plan.rules == [[DENSE, SpanRule(320, 0)]] * 2
    assert (plan.sink, plan.model) == (64, MODEL)


def test_profile_1(tmp_path: Path) -> None:
    golden = GOLDEN / "moa-profile-1.safetensors"
    loaded = Profile.load(golden)
    assert loaded == profile_1()
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == golden.read_bytes()


def test_profile_2(tmp_path: Path) -> None:
    golden = GOLDEN / "moa-profile-2.safetensors"
    loaded = Profile.load(golden)
    assert loaded == profile_2()
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == golden.read_bytes()


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("moa-profile-3.safetensors", profile_3),
        ("moa-profile-3-spectrum.safetensors", spectrum_profile_3),
    ],
)
def test_profile_3(name: str, profile: Callable[[], Profile], tmp_path: Path) -> None:
    golden = GOLDEN / name
    loaded = Profile.load(golden)
    assert loaded == profile()
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == golden.read_bytes()


def test_profile_1_with_native_layers(tmp_path: Path) -> None:
    golden = GOLDEN / "moa-profile-1-native.safetensors"
    loaded = Profile.load(golden)
    assert loaded == native_profile_1()
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == golden.read_bytes()
