import dataclasses

import numpy as np
import pytest

from moa_search.errors import ConfigError, ModelMismatchError
from moa_search.formats import Profile
from moa_search.formats.merge import merge
from moa_search.formats.profile_content import MEAN_STATISTICS, SAMPLE_STATISTICS
from moa_search.profiling.accumulate import LengthAccumulator


def make_profile(template, samples, seed, lengths=(512, 1024)):
    """A profile of random samples, pooled as the profiler does, with the single samples."""
    rng = np.random.default_rng(seed)
    entries, drawn = {}, {}
    for length in lengths:
        header = template.by_length[length].header
        pool = LengthAccumulator(length, header.windows, header.row_buckets)
        drawn[length] = []
        for _ in range(samples):
            shape = (3, 2, header.row_buckets, len(header.windows))
            statistics = {
                name: rng.lognormal(size=shape).astype(np.float32) for name in (*SAMPLE_STATISTICS, *MEAN_STATISTICS)
            }
            drawn[length].append((rng.uniform(1, 2), statistics))
            pool.add(*drawn[length][-1])
        entries[length] = pool.result()
    calibration = {"samples": samples * len(lengths), "hash": f"h{seed}", "sample_hashes": [f"{seed}-{samples}"]}
    header = template.header.model_copy(
        update={"calibration": calibration, "lengths": tuple(entry.header for entry in entries.values())}
    )
    return Profile(header, entries), drawn


def change(profile, **fields):
    return dataclasses.replace(profile, header=profile.header.model_copy(update=fields))


def test_pooled_is_as_if_measured_in_one_run(tiny_profile, tmp_path):
    parts = [make_profile(tiny_profile, samples, seed) for seed, samples in enumerate((3, 1, 5))]
    merged = merge([profile for profile, _ in parts])
    for length, entry in merged.by_length.items():
        pool = LengthAccumulator(length, entry.header.windows, entry.header.row_buckets)
        for _, drawn in parts:
            for sample in drawn[length]:
                pool.add(*sample)
        expected = pool.result()
        assert entry.header == expected.header
        np.testing.assert_array_equal(entry.loss, expected.loss)
        for name in SAMPLE_STATISTICS:
            np.testing.assert_array_equal(entry.per_sample[name], expected.per_sample[name])
        for name in MEAN_STATISTICS:
            np.testing.assert_allclose(entry.mean[name], expected.mean[name], rtol=1e-5)
            np.testing.assert_allclose(entry.error[name], expected.error[name], rtol=1e-4)
    assert merged.header.calibration["samples"] == 18
    assert merged.header.calibration["sample_hashes"] == ["0-3", "1-1", "2-5"]
    merged.save(tmp_path / "merged.safetensors")
    assert Profile.load(tmp_path / "merged.safetensors").lengths == [512, 1024]


def test_merging_merged_profiles(tiny_profile):
    one, two, three = (make_profile(tiny_profile, 2, seed)[0] for seed in range(3))
    stepwise, at_once = merge([merge([one, two]), three]), merge([one, two, three])
    for length in (512, 1024):
        for name in MEAN_STATISTICS:
            np.testing.assert_allclose(
                stepwise.by_length[length].error[name], at_once.by_length[length].error[name], rtol=1e-5
            )
    with pytest.raises(ConfigError, match="share samples"):
        merge([merge([one, two]), two])


def test_lengths_of_one_alone_are_taken_over(tiny_profile):
    short, long = (make_profile(tiny_profile, 2, n, lengths=(n,))[0] for n in (512, 1024))
    assert merge([short, long]).lengths == [512, 1024]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"sink": 9}, ConfigError, "profile 2 has sink 9, the first has 4"),
        ({"block": 9}, ConfigError, "block 9"),
        ({"dtype": "float16"}, ConfigError, "dtype float16"),
        ({"weights_hash": "sha256:0"}, ModelMismatchError, "weights_hash"),
    ],
)
def test_other_settings_are_named(tiny_profile, changes, error, says):
    one, two = (make_profile(tiny_profile, 2, seed)[0] for seed in range(2))
    with pytest.raises(error, match=says):
        merge([one, change(two, **changes)])


def test_other_model(tiny_profile):
    one, two = (make_profile(tiny_profile, 2, seed)[0] for seed in range(2))
    other = two.header.model.model_copy(update={"head_dim": 16})
    with pytest.raises(ModelMismatchError, match="profile 2 was made for another model: head_dim: 16 != 8"):
        merge([one, change(two, model=other)])


def test_other_windows(tiny_profile):
    one, two = (make_profile(tiny_profile, 2, seed)[0] for seed in range(2))
    entry = two.by_length[512]
    wider = dataclasses.replace(entry, header=entry.header.model_copy(update={"windows": (1, 512)}))
    with pytest.raises(ConfigError, match="windows at length 512 differ"):
        merge([one, dataclasses.replace(two, by_length={512: wider})])


def test_the_same_samples_twice(tiny_profile):
    one = make_profile(tiny_profile, 2, 0)[0]
    with pytest.raises(ConfigError, match="profiles 1 and 2 share samples"):
        merge([one, one])
    older = change(one, calibration={"hash": "h"})  # files from before samples had hashes of their own
    with pytest.raises(ConfigError, match="share samples"):
        merge([older, older])


def test_one_alone(tiny_profile):
    with pytest.raises(ConfigError, match="at least two"):
        merge([tiny_profile])
