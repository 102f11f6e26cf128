import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from moa_search.formats.profile import RunSummary
from moa_search.inspection.frames.profiles import profile_facts, profile_frame, tier_frame
from moa_search.inspection.printing import fact_lines, to_rich
from moa_search.inspection.quality import profile_quality, sample_advice
from tests.moa_search.formats.test_tiers import tiered


def with_signed(profile, make, samples):
    """The profile with other signed statistics: ``make(rng) -> [sample, head]`` spread over every bucket and window."""
    by_length, headers = {}, []
    for length, entry in profile.by_length.items():
        header = entry.header.model_copy(update={"samples": samples})
        by_head = make(np.random.default_rng(length), samples)
        shape = (samples, 3, 2, header.row_buckets, len(header.windows))
        signed = np.broadcast_to(by_head.reshape(samples, 3, 2, 1, 1) / header.row_buckets, shape)
        signed = signed.astype(np.float32).copy()
        signed[..., -1] = 0
        by_length[length] = dataclasses.replace(
            entry,
            header=header,
            loss=np.full(samples, 2.0, np.float32),
            per_sample={"signed": signed, "squared": signed**2},
        )
        headers.append(header)
    return dataclasses.replace(
        profile, header=profile.header.model_copy(update={"lengths": tuple(headers)}), by_length=by_length
    )


def test_reliability_is_the_share_of_variance_that_returns(tiny_profile):
    """Heads of variance 1 and samples of variance v: n samples have reliability 1 / (1 + v / n)."""

    def noisy(rng, samples):
        return 10 + rng.normal(size=6) + 0 * rng.normal(size=(samples, 6))

    exact = profile_quality(with_signed(tiny_profile, noisy, 4))
    assert all(quality.reliability == pytest.approx(1, abs=1e-6) for quality in exact)
    found = []
    for seed in range(200):

        def noisier(rng, samples, seed=seed):
            rng = np.random.default_rng(seed)
            return 100 + rng.normal(size=6) + rng.normal(size=(samples, 6)) * 2

        found.append(profile_quality(with_signed(tiny_profile, noisier, 4))[0].reliability)
    assert np.median(found) == pytest.approx(0.5, abs=0.15)


def test_local_heads_are_those_that_an_eighth_costs_next_to_nothing(tiny_profile):
    def two_matter(rng, samples):
        return np.tile([0.001, 0.001, 0.5, 0.001, 0.9, 0.001], (samples, 1))

    assert profile_quality(with_signed(tiny_profile, two_matter, 2))[0].local_heads == pytest.approx(4 / 6)


def test_advice(tiny_profile):
    def clear(rng, samples):
        return np.arange(1, 7) + 0.01 * rng.normal(size=(samples, 6))

    def noise(rng, samples):
        return 10 + np.arange(6) / 3 + rng.normal(size=(samples, 6)) * 3

    assert sample_advice(with_signed(tiny_profile, clear, 8)) is None
    assert "about" in sample_advice(with_signed(tiny_profile, noise, 8))
    assert "a single sample" in sample_advice(with_signed(tiny_profile, clear, 1))


def test_error_beyond_the_difference_is_all_of_it(tiny_profile):
    def lost(rng, samples):
        return 10 + np.tile([-3.0, 3.0], samples // 2)[:, None] * np.array([1, -1, 1, -1, 1, -1])

    noisy = with_signed(tiny_profile, lost, 4)
    uneven = noisy.by_length[512].per_sample["signed"]
    uneven[:, 0] *= 1.01  # the heads differ a little, by far less than their errors
    assert profile_quality(noisy)[0].reliability < 0
    assert "100% of the difference" in sample_advice(noisy)
    assert "-" not in text_of(to_rich(profile_frame(noisy))).split("512")[1].split("\n")[0]


def text_of(renderable):
    console = Console(width=200, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def test_table_and_lines(tiny_profile):
    run = RunSummary(measured=4, resumed=2, seconds_per_sample={512: 1.25}, peak_memory_bytes=3 * 2**30, on_gpu=False)
    header = tiny_profile.header.model_copy(
        update={
            "calibration": {
                "sources": ["passkey", "data.jsonl"],
                "answers": "model",
                "chat": True,
                "answered": {"passkey": {"tried": 5, "kept": 5}, "data.jsonl": {"tried": 9, "kept": 4}},
            }
        }
    )
    profile = dataclasses.replace(tiny_profile, header=header, run=run)
    lines = "\n".join(fact_lines(profile_facts(profile)))
    assert "passkey, data.jsonl; the model's own answers, in its chat template" in lines
    assert "data.jsonl: 5 of 9, answered wrongly" in lines
    assert "dropped   passkey" not in lines
    assert "4 samples measured, 2 taken over" in lines
    assert "4,608 tokens" in lines
    assert "3.0 GiB" in lines
    table = text_of(to_rich(profile_frame(profile)))
    assert "1.2" in table
    assert "512" in table
    assert "1024" in table
    assert "s/sample" not in text_of(to_rich(profile_frame(tiny_profile))), "a profile from a file doesn't tell"
    assert not any("run " in line for line in fact_lines(profile_facts(tiny_profile))), (
        "a profile from a file doesn't tell"
    )


def test_tiers_are_told_with_what_they_add(tiny_profile):
    profile = tiered(tiny_profile, (8, 2))
    assert profile_facts(profile)["tiers"] == "16, 8, 2 bits"
    assert "tiers" not in profile_facts(tiny_profile)
    for entry in profile.tiers.by_length.values():
        for side in (entry.keys, entry.values):
            for statistics in side.values():
                statistics["squared"][:] = 0
    entry = profile.tiers.by_length[1024]
    keys = entry.keys[2]["squared"]
    keys[:, 1, 0, :, -1] = 0.25  # a head that changes in every bucket of every sample
    table, tokens = tier_frame(profile), entry.answer_tokens.mean()
    assert [(row["length"], row["bits"]) for row in table.rows] == [(512, 8), (512, 2), (1024, 8), (1024, 2)]
    assert table.rows[-1]["keys"] == pytest.approx(0.25 * keys.shape[3] * tokens)
    assert [row["values"] for row in table.rows] == [0] * 4
    assert f"{0.25 * keys.shape[3] * tokens:.3g}" in text_of(to_rich(table))
