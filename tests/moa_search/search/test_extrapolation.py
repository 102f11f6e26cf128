"""Losses at lengths that were never profiled."""

import dataclasses

import numpy as np
import pytest

from moa_search.errors import ConfigError
from moa_search.formats import Profile
from moa_search.formats.criteria import CRITERIA
from moa_search.search.extrapolation import extrapolate, require_reachable
from moa_search.search.losses import losses_from, rule_losses
from moa_search.search.rules import rule_grid
from moa_search.spans import DENSE, SpanRule

RULES = [SpanRule(68, 0), SpanRule(300, 0), SpanRule(-100, 128), SpanRule(100, 64), DENSE]
CHOICE = np.array([0, 1, 2, 3, 0, 1])


def only(profile, length):
    """The profile of one of its lengths."""
    entry = profile.by_length[length]
    header = profile.header.model_copy(update={"lengths": (entry.header,)})
    return Profile(header, {length: entry})


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("anchor", ["position", "prompt"])
def test_profiled_lengths_are_as_profiled(tiny_profile, criterion, anchor):
    for known in rule_losses(tiny_profile, RULES, criterion, anchor=anchor):
        found = extrapolate(tiny_profile, RULES, criterion, known.length, anchor=anchor)
        assert (found.mean == known.mean).all()
        assert found.of_choice(CHOICE) == known.of_choice(CHOICE)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("length", [513, 700, 1023, 1500, 8192])
def test_what_holds_at_every_length(tiny_profile, criterion, length):
    found = extrapolate(tiny_profile, RULES, criterion, length)
    assert found.length == length
    assert found.mean.shape == (6, len(RULES))
    assert (found.mean >= 0).all()
    assert (found.mean[:, RULES.index(DENSE)] == 0).all()
    loss, error = found.of_choice(CHOICE)
    assert loss > 0
    assert error > 0
    assert found.robust(1)[0, 0] > found.mean[0, 0]


@pytest.mark.parametrize("length", [512, 700, 1024, 3000, 8192])
def test_larger_windows_lose_less(tiny_profile, length):
    constants = [SpanRule(tokens, 0) for tokens in range(68, length, 97)]
    mean = extrapolate(tiny_profile, constants, "squared", length).mean
    assert (np.diff(mean, axis=1) <= 1e-12).all()


@pytest.mark.parametrize("length", [2048, 4096])
def test_windows_keep_their_share_of_the_way_in_log_length(tiny_profile, length):
    """A block stands for a block, and a quarter of the way in log length for a quarter of the way."""
    profile = only(tiny_profile, 1024)
    (known,) = rule_losses(profile, [SpanRule(4 + 64, 0), SpanRule(4 + round(64 * 16**0.25), 0)], "absolute")
    same = [SpanRule(4 + 64, 0), SpanRule(4 + round(64 * (length / 64) ** 0.25), 0)]
    found = extrapolate(profile, same, "absolute", length)
    assert found.mean == pytest.approx(known.mean, rel=0.02)  # windows are whole tokens


def test_the_longest_length_alone_tells_what_lies_beyond(tiny_profile):
    both, one = (extrapolate(p, RULES, "signed", 2000) for p in (tiny_profile, only(tiny_profile, 1024)))
    assert (both.mean == one.mean).all()


class TestBetween:
    def test_both_neighbours_count_by_their_nearness(self, tiny_profile):
        length = round(512 * 2**0.25)
        near, far = self.neighbours(tiny_profile, "recall", length)
        found = extrapolate(tiny_profile, RULES, "recall", length)
        share = np.log2(length / 512)
        assert found.mean == pytest.approx((1 - share) * near.mean + share * far.mean)
        assert found.error == pytest.approx(np.sqrt(((1 - share) * near.error) ** 2 + (share * far.error) ** 2))

    def test_errors_of_independent_samples(self, tiny_profile):
        """Mean and standard error of a choice are those of a sum of two independent means, whatever their counts."""
        longer = tiny_profile.by_length[1024]
        longer.per_sample["signed"] = np.concatenate([longer.per_sample["signed"], 2 * longer.per_sample["signed"]])
        near, far = self.neighbours(tiny_profile, "signed", 724)
        share = np.log2(724 / 512)
        loss, error = extrapolate(tiny_profile, RULES, "signed", 724).of_choice(CHOICE)
        (loss_near, error_near), (loss_far, error_far) = near.of_choice(CHOICE), far.of_choice(CHOICE)
        assert loss == pytest.approx((1 - share) * loss_near + share * loss_far)
        assert error == pytest.approx(np.hypot((1 - share) * error_near, share * error_far))

    def test_a_step_away_from_a_profiled_length_changes_little(self, tiny_profile):
        rules = rule_grid([1024], sink=4, block=64)
        at, before, after = (extrapolate(tiny_profile, rules, "squared", n).mean for n in (1024, 1022, 1026))
        scale = at.max(1, keepdims=True)
        assert (abs(before - at) < 0.03 * scale).mean() > 0.95
        assert (abs(after - at) < 0.03 * scale).mean() > 0.95

    @staticmethod
    def neighbours(profile, criterion, length):
        """Losses at ``length`` from the shorter and from the longer profiled length alone."""

        def from_one(known):
            def log_share(windows):
                to, at = np.log([64, known]), np.log([64, length])
                return np.exp(to[0] + (np.log(np.maximum(windows, 64)) - at[0]) * np.diff(to) / np.diff(at))

            entry = profile.by_length[known]
            return losses_from(entry, profile, RULES, criterion, length=length, profiled_window=log_share)

        return from_one(512), from_one(1024)


class TestOutOfReach:
    def test_below_the_shortest(self, tiny_profile):
        with pytest.raises(
            ConfigError, match="losses at 511 tokens can't be told: the shortest profiled length is 512"
        ):
            extrapolate(tiny_profile, RULES, "signed", 511)

    def test_far_beyond_the_longest(self, tiny_profile):
        require_reachable(tiny_profile, 8192)
        with pytest.raises(ConfigError, match=r"beyond 8 times the longest profiled length, 1024.*1025 tokens or more"):
            extrapolate(tiny_profile, RULES, "signed", 8193)


def test_lengths_within_the_smallest_window(tiny_profile):
    """Odd, but no crash: at most a block was profiled, and every rule keeps it all there."""
    entry = tiny_profile.by_length[512]
    short = dataclasses.replace(entry, header=entry.header.model_copy(update={"length": 60}))
    profile = Profile(tiny_profile.header.model_copy(update={"lengths": (short.header,)}), {60: short})
    assert np.isfinite(extrapolate(profile, RULES, "signed", 100).mean).all()


def test_heads_of_native_layers_are_left_out(native_profile):
    assert extrapolate(native_profile, RULES, "signed", 2048).mean.shape == (4, len(RULES))
