"""Tiers in profile files: round trips, damage, pooling, and files from before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moa_search.errors import ConfigError, ProfileFormatError
from moa_search.formats import Profile
from moa_search.formats.merge import merge
from moa_search.formats.profile_content import SAMPLE_STATISTICS, ProfileHeader
from moa_search.formats.tiers import CODED_BITS, TierLength, TiersHeader, TierStatistics, tier_grid
from moa_search.formats.transforms import KeyTransforms
from moa_search.search.losses import rule_losses
from moa_search.spans import DENSE, SpanRule

from .test_profile import error_of, rewrite


def tiered(
    profile: Profile, bits: tuple[int, ...] = (8, 4, 2), seed: int = 0, schema: str = "moa-profile/3"
) -> Profile:
    """``profile`` with random changes for some bits, of either sign."""
    rng, model = np.random.default_rng(seed), profile.header.model
    heads, width = (model.num_hidden_layers, model.num_key_value_heads), model.head_dim

    def changes(shape: tuple[int, ...]) -> dict[int, dict[str, np.ndarray]]:
        return {n: {name: rng.normal(size=shape).astype(np.float32) for name in SAMPLE_STATISTICS} for n in bits}

    by_length = {}
    for entry in profile.header.lengths:
        grid = tier_grid(entry.length)
        shape = (entry.samples, *heads, grid.row_buckets, len(grid.windows))
        by_length[entry.length] = TierLength(
            grid, np.arange(6, 6 + entry.samples, dtype=np.float32), changes(shape), changes(shape)
        )
    transforms = np.random.default_rng(0)  # one model's
    mean = transforms.normal(size=(*heads, width)).astype(np.float32)
    balance = (np.eye(width) + 0.1 * transforms.normal(size=(*heads, width, width))).astype(np.float32)
    known = KeyTransforms(
        mean,
        balance,
        transforms.random((heads[0], width // 2), dtype=np.float32),
        np.arange(width, dtype=np.int32),
        np.broadcast_to(2.0 ** -np.arange(width, dtype=np.float32), mean.shape).copy(),
    )
    tiers = TiersHeader(bits=bits, lengths=tuple(x.header for x in by_length.values()))
    header = ProfileHeader.model_validate(
        {**profile.header.model_dump(by_alias=True), "schema": schema, "tiers": tiers}
    )
    return Profile(header, profile.by_length, tiers=TierStatistics(known, by_length))


@pytest.fixture
def path(tiny_profile: Profile, tmp_path: Path) -> Path:
    target = tmp_path / "tiers.safetensors"
    tiered(tiny_profile).save(target)
    return target


def test_round_trip(tiny_profile: Profile, path: Path, tmp_path: Path) -> None:
    original, loaded = tiered(tiny_profile), Profile.load(path)
    assert loaded.header == original.header
    assert loaded.tiers is not None
    assert original.tiers is not None
    for name, values in original.tiers.arrays().items():
        found = loaded.tiers.arrays()[name]
        if values.ndim != 5:
            np.testing.assert_array_equal(found, values)
        else:  # float16 relative to each head's largest
            largest = np.abs(values).max(axis=(-2, -1), keepdims=True)
            assert (np.abs(found - values) <= largest * 2**-11).all()
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert loaded.checksum == Profile.load(tmp_path / "again").checksum


def test_a_profile_without_tiers_holds_the_same_of_spans(tiny_profile: Profile, path: Path, tmp_path: Path) -> None:
    tiny_profile.save(tmp_path / "plain.safetensors")
    plain, with_tiers = Profile.load(tmp_path / "plain.safetensors"), Profile.load(path)
    assert plain.header.tiers is None
    assert plain.tiers is None
    assert b"tiers" not in (tmp_path / "plain.safetensors").read_bytes()
    for length in plain.lengths:
        assert plain.by_length[length] == with_tiers.by_length[length], "spans alone are measured the same"


def test_a_file_of_version_2_stays_one(tiny_profile: Profile, tmp_path: Path) -> None:
    tiered(tiny_profile, schema="moa-profile/2").save(tmp_path / "one")
    loaded = Profile.load(tmp_path / "one")
    assert loaded.header.schema_ == "moa-profile/2"
    loaded.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_equality_looks_at_tiers(path: Path) -> None:
    one, two = Profile.load(path), Profile.load(path)
    assert one == two
    assert two.tiers is not None
    two.tiers.by_length[512].values[4]["signed"][0, 1, 1, 0, 0] += 1
    assert one != two
    assert one != dataclasses.replace(one, tiers=None)


def test_a_pairs_change_is_the_sum_of_its_keys_and_values(path: Path) -> None:
    tiers = Profile.load(path).tiers
    assert tiers is not None
    entry = tiers.by_length[1024]
    np.testing.assert_array_equal(entry.change("signed", 4, 16), entry.keys[4]["signed"])
    np.testing.assert_array_equal(entry.change("signed", 16, 2), entry.values[2]["signed"])
    np.testing.assert_array_equal(entry.change("squared", 8, 4), entry.keys[8]["squared"] + entry.values[4]["squared"])
    assert not entry.change("squared", 16, 16).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(schema="moa-profile/1"), "top level: moa-profile/1 has no tiers"),
        (lambda c, t: [c.update(schema="moa-profile/2"), c.pop("tiers")], "top level: moa-profile/2 needs tiers"),
        (lambda c, t: c["tiers"].update(bits=[4, 8]), "tiers: the tiers' bits are [4, 8]"),
        (lambda c, t: c["tiers"].update(bits=[5]), "tiers: the tiers' bits are [5]"),
        (lambda c, t: c["tiers"]["lengths"].pop(), "top level: the tiers' lengths aren't the profile's"),
        (lambda c, t: c["tiers"]["lengths"][0].update(windows=[64]), "tiers.lengths.0: the last window"),
        (lambda c, t: c["tiers"].update(bit=1), "tiers.bit: unknown key (did you mean 'bits'?)"),
        (lambda c, t: t["transforms/mean"].fill(0), "damaged, its content doesn't match its checksum"),
    ],
)
def test_errors_say_what_and_where(path: Path, change: Callable[[Any, Any], None], message: str) -> None:
    rewrite(path, change)
    assert error_of(path).startswith(message)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t.transforms.balance[1, 0].fill(0), "transforms/balance has no inverse at layer 1, KV head 0"),
        (lambda t: t.transforms.spectrum.fill(0), "spectrum isn't positive and decreasing at layer 0, KV head 0"),
        (lambda t: t.transforms.mean.fill(np.nan), "transforms/mean holds values that aren't finite"),
        (lambda t: t.by_length[512].keys[4]["signed"].fill(np.inf), "512/key4/signed"),
        (lambda t: t.by_length[512].keys.pop(4), "tensor 512/key4/squared is missing"),
        (lambda t: t.by_length[512].keys.update({3: t.by_length[512].keys[4]}), "belongs to no length"),
    ],
)
def test_nothing_is_written_that_could_not_be_read(
    tiny_profile: Profile, tmp_path: Path, spoil: Callable[[Any], None], says: str
) -> None:
    profile = tiered(tiny_profile)
    spoil(profile.tiers)
    with pytest.raises(ProfileFormatError, match=says):
        profile.save(tmp_path / "spoiled.safetensors")
    assert not (tmp_path / "spoiled.safetensors").exists()


def test_native_layers_change_nothing(native_profile: Profile, tmp_path: Path) -> None:
    profile = tiered(native_profile)
    with pytest.raises(ProfileFormatError, match="isn't zero in native layer 1"):
        profile.save(tmp_path / "native.safetensors")


def other(profile: Profile, seed: int, **fields: Any) -> Profile:
    """``profile`` as of other samples."""
    calibration = {"samples": 1, "hash": str(seed), "sample_hashes": [str(seed)]}
    return dataclasses.replace(profile, header=profile.header.model_copy(update={"calibration": calibration}), **fields)


class TestMerging:
    def test_changes_of_all_samples_are_kept(self, tiny_profile: Profile, tmp_path: Path) -> None:
        one, two = (other(tiered(tiny_profile, seed=seed), seed) for seed in (1, 2))
        merged = merge([one, two])
        assert merged.tiers is not None
        assert one.tiers is not None
        assert two.tiers is not None
        for name, values in merged.tiers.arrays().items():
            parts = [one.tiers.arrays()[name], two.tiers.arrays()[name]]
            expected = parts[0] if name.startswith("transforms/") else np.concatenate(parts)
            np.testing.assert_array_equal(values, expected)
        merged.save(tmp_path / "merged.safetensors")
        assert Profile.load(tmp_path / "merged.safetensors").header.tiers == one.header.tiers

    def test_other_tiers_are_named(self, tiny_profile: Profile) -> None:
        one, two, plain = (
            other(profile, seed)
            for seed, profile in enumerate((tiered(tiny_profile), tiered(tiny_profile, (8, 4)), tiny_profile))
        )
        with pytest.raises(ConfigError, match=r"profile 2 has tiers 8, 4, the first has tiers 8, 4, 2.*--tiers"):
            merge([one, two])
        with pytest.raises(ConfigError, match="profile 2 has no tiers, the first has tiers 8, 4, 2"):
            merge([one, plain])

    def test_transforms_from_before_are_other_ones(self, tiny_profile: Profile) -> None:
        one, two = (other(tiered(tiny_profile), seed) for seed in (1, 2))
        assert two.tiers is not None
        known = dataclasses.replace(two.tiers.transforms, spectrum=None)
        two = dataclasses.replace(two, tiers=dataclasses.replace(two.tiers, transforms=known))
        for pair in ([one, two], [two, one]):
            with pytest.raises(ConfigError, match=r"profile 2 has other transforms of keys.*--transforms"):
                merge(pair)

    def test_other_transforms_are_refused(self, tiny_profile: Profile) -> None:
        one, two = (other(tiered(tiny_profile), seed) for seed in (1, 2))
        assert two.tiers is not None
        two.tiers.transforms.mean[0, 0, 0] += 1
        with pytest.raises(ConfigError, match=r"profile 2 has other transforms of keys.*--transforms"):
            merge([one, two])


def finer(profile: Profile) -> Profile:
    """``profile`` as files from before held it: the same changes of what sees everything, in several buckets and beside
    other windows."""
    assert profile.tiers is not None
    assert profile.header.tiers is not None
    by_length = {}
    for length, entry in profile.tiers.by_length.items():
        grid = entry.header.model_copy(update={"windows": (64, length), "row_buckets": 2})

        def split(side: dict[int, dict[str, np.ndarray]]) -> dict[int, dict[str, np.ndarray]]:
            return {
                bits: {
                    name: np.concatenate([values * part for part in (0.25, 0.75)], -2) * np.float32([7, 1])
                    for name, values in statistics.items()
                }
                for bits, statistics in side.items()
            }

        by_length[length] = TierLength(grid, entry.answer_tokens, split(entry.keys), split(entry.values))
    lengths = tuple(entry.header for entry in by_length.values())
    tiers = profile.header.tiers.model_copy(update={"lengths": lengths})
    return dataclasses.replace(
        profile,
        header=profile.header.model_copy(update={"tiers": tiers}),
        tiers=TierStatistics(profile.tiers.transforms, by_length),
    )


class TestFinerGridsOfBefore:
    @pytest.mark.parametrize("criterion", ["signed", "squared", "root_squared"])
    def test_a_search_reads_the_same_losses(self, tiny_profile: Profile, tmp_path: Path, criterion: str) -> None:
        coarse = tiered(tiny_profile)
        rules, tiers = [SpanRule(40, 0), SpanRule(20, 96), DENSE], [(16, 16), (16, 4), (8, 2), (2, 8)]
        found = []
        for name, profile in (("coarse", coarse), ("fine", finer(coarse))):
            profile.save(tmp_path / name)
            found.append(rule_losses(Profile.load(tmp_path / name), rules, criterion, tiers=tiers))
        for one, two in zip(*found, strict=True):
            # Each grid's own rounding to float16 aside
            np.testing.assert_allclose(one.mean, two.mean, rtol=2e-3)

    def test_they_merge_with_todays(self, tiny_profile: Profile, tmp_path: Path) -> None:
        one, two = (other(tiered(tiny_profile, seed=seed), seed) for seed in (1, 2))
        expected, found = merge([one, two]), merge([finer(one), two])
        assert found.header.tiers == expected.header.tiers
        assert found.tiers is not None
        assert expected.tiers is not None
        for name, values in expected.tiers.arrays().items():
            np.testing.assert_allclose(found.tiers.arrays()[name], values, rtol=1e-6, atol=1e-7)
        found.save(tmp_path / "merged.safetensors")


def test_bits_are_those_that_the_kernels_store() -> None:
    from moa_kernels.codes import BITS

    assert (16, *CODED_BITS) == BITS
