"""Rule losses against a slow reference, written from the definition."""

import numpy as np
import pytest

from moa_search.errors import ConfigError, ProfilingError
from moa_search.formats import Plan
from moa_search.formats.criteria import CRITERIA
from moa_search.formats.profile import Profile
from moa_search.formats.profile_content import (
    MEAN_STATISTICS,
    SAMPLE_STATISTICS,
    LengthHeader,
    LengthProfile,
    ProfileHeader,
)
from moa_search.search.losses import losses_from, rule_losses
from moa_search.search.rules import rule_grid
from moa_search.spans import DENSE, SpanRule

SINK, BLOCK = 4, 16
RULES = [SpanRule(20, 0), SpanRule(75, 0), SpanRule(-40, 128), SpanRule(30, 96), SpanRule(150, 128), DENSE]
SHAPES = [(200, (16, 32, 64, 128, 200), 8), (203, (16, 48, 203), 10), (10, (5, 10), 16), (64, (32, 64), 4)]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]} tokens")
def profile(request, tiny_signature):
    """Random statistics that, as measured ones, vanish at the last window (``recall`` is whole there)."""
    length, windows, buckets = request.param
    rng = np.random.default_rng(length)
    entry = LengthHeader(length=length, windows=windows, row_buckets=buckets, samples=3)
    grid = (tiny_signature.num_hidden_layers, tiny_signature.num_key_value_heads, buckets, len(windows))

    def missing(*shape):
        values = rng.normal(size=(*shape, *grid))
        values[..., -1] = 0
        return values.astype(np.float32)

    mean = {name: np.abs(missing()) for name in MEAN_STATISTICS}
    mean["recall"] = 20 - mean["recall"]
    per_sample = {name: missing(3) for name in SAMPLE_STATISTICS}
    per_sample["squared"] = np.abs(per_sample["squared"])
    error = {name: np.abs(missing()) for name in MEAN_STATISTICS}
    header = ProfileHeader(
        model=tiny_signature, model_name="", dtype="float32", sink=SINK, block=BLOCK, seed=0, lengths=(entry,)
    )
    return Profile(header, {length: LengthProfile(entry, np.ones(3, np.float32), per_sample, mean, error)})


def looked_up(entry, values, rule, anchor="position"):
    """Sum over buckets of ``values[bucket]``, interpolated at the window of the bucket's middle row."""
    length, windows, buckets = entry.header.length, entry.header.windows, entry.header.row_buckets
    total = 0.0
    for bucket in range(buckets):
        contexts = [n for n in range(1, length + 1) if (n - 1) // -(-length // buckets) == bucket]
        if not contexts:
            continue  # buckets beyond the last row hold zeros when measured
        at = {n: length if anchor == "prompt" else n for n in contexts}
        kept = {n: min(n, max(SINK + BLOCK, rule.alpha + rule.beta_256 * at[n] // 256)) for n in contexts}
        everything = all(kept[n] == n for n in contexts)
        window = windows[-1] if everything else kept[contexts[(len(contexts) - 1) // 2]] - SINK
        total += float(np.interp(window, windows, values[bucket].astype(float)))
    return total


def without_empty_buckets(profile):
    """Zero the buckets that hold no row, as profiling leaves them."""
    for entry in profile.by_length.values():
        length, buckets = entry.header.length, entry.header.row_buckets
        used = -(-length // -(-length // buckets))
        for group in (entry.per_sample, entry.mean, entry.error):
            for values in group.values():
                values[..., used:, :] = 0
    return profile


def expected(entry, criterion, layer, head, rule, anchor):
    if criterion in ("squared", "root_squared", "signed"):
        values = entry.per_sample["signed" if criterion == "signed" else "squared"]
        totals = [looked_up(entry, sample[layer, head], rule, anchor) for sample in values]
        if criterion == "root_squared":
            totals = [total**0.5 for total in totals]
        return sum(map(abs, totals)) / len(totals)
    total = looked_up(entry, entry.mean[criterion][layer, head], rule, anchor)
    if criterion == "recall":
        return sum(float(bucket[-1]) for bucket in entry.mean["recall"][layer, head]) - total
    return total


@pytest.mark.parametrize("anchor", ["position", "prompt"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_as_defined(profile, criterion, anchor):
    (losses,) = rule_losses(without_empty_buckets(profile), RULES, criterion, anchor=anchor)
    (entry,) = profile.by_length.values()
    model = profile.header.model
    for layer in range(model.num_hidden_layers):
        for head in range(model.num_key_value_heads):
            row = losses.mean[layer * model.num_key_value_heads + head]
            for index, rule in enumerate(RULES):
                reference = max(0, expected(entry, criterion, layer, head, rule, anchor))
                assert row[index] == pytest.approx(reference, rel=1e-9, abs=1e-9), (layer, head, rule)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_dense_loses_exactly_nothing(profile, criterion):
    (losses,) = rule_losses(profile, RULES, criterion)
    assert (losses.mean[:, RULES.index(DENSE)] == 0).all()
    assert (losses.mean >= 0).all()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_entry_per_profiled_length(tiny_profile, criterion):
    losses = rule_losses(tiny_profile, RULES, criterion)
    assert [entry.length for entry in losses] == [512, 1024]
    assert all(entry.mean.shape == (6, len(RULES)) for entry in losses)


class TestOfChoice:
    CHOICE = np.array([0, 1, 2, 3, 4, 5])

    def test_standard_error_over_samples(self, tiny_profile):
        losses = rule_losses(tiny_profile, RULES, "squared")[0]
        totals = [sum(sample[head, rule] for head, rule in enumerate(self.CHOICE)) for sample in losses.per_sample]
        loss, error = losses.of_choice(self.CHOICE)
        assert loss == pytest.approx(np.mean(totals))
        assert error == pytest.approx(np.std(totals, ddof=1) / 3**0.5)

    def test_errors_of_means_add_up(self, tiny_profile):
        losses = rule_losses(tiny_profile, RULES, "absolute")[0]
        loss, error = losses.of_choice(self.CHOICE)
        assert loss == pytest.approx(sum(losses.mean[head, rule] for head, rule in enumerate(self.CHOICE)))
        assert error == pytest.approx(0.1 * loss)  # the fixture's errors are a tenth of its means

    def test_one_sample_tells_no_error(self, tiny_profile):
        for entry in tiny_profile.by_length.values():
            entry.per_sample["squared"] = entry.per_sample["squared"][:1]
        assert rule_losses(tiny_profile, RULES, "squared")[0].of_choice(self.CHOICE)[1] == 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_heads_of_native_layers_are_left_out(tiny_profile, windowed_signature, criterion):
    every = rule_losses(tiny_profile, RULES, criterion)
    header = tiny_profile.header.model_copy(update={"model": windowed_signature, "native_layers": (0, 2)})
    some = rule_losses(Profile(header, tiny_profile.by_length), RULES, criterion)
    choice = np.array([1, 3])
    for whole, part in zip(every, some, strict=True):
        assert (part.mean == whole.mean[2:4]).all()
        assert part.of_choice(choice)[0] == whole.mean[[2, 3], choice].sum()


def test_unknown_criterion_suggests_the_nearest(tiny_profile):
    with pytest.raises(ConfigError, match=r"'sqared' is unknown \(did you mean 'squared'\?\).*recall"):
        rule_losses(tiny_profile, RULES, "sqared")


class TestPromptAnchor:
    def test_as_the_plan_that_runs_it(self, tiny_profile, tiny_signature):
        """A rule anchored at the prompt loses what the plan's fixed rule does, anchored at positions."""
        by_prompt = rule_losses(tiny_profile, RULES, "squared", anchor="prompt")
        for losses in by_prompt:
            for index, rule in enumerate(RULES):
                plan = Plan.from_rules([[rule] * 2] * 3, tiny_signature, sink=4, block=64, anchor="prompt")
                fixed = plan.anchored_at(losses.length).rules[0][0]
                at = tiny_profile.lengths.index(losses.length)
                alone = rule_losses(tiny_profile, [fixed], "squared")[at]
                assert alone.mean[:, 0] == pytest.approx(losses.mean[:, index], rel=1e-12), rule

    def test_constant_rules_lose_the_same_either_way(self, tiny_profile):
        constants = [SpanRule(100, 0), SpanRule(300, 0), DENSE]
        for one, other in zip(
            rule_losses(tiny_profile, constants, "signed"),
            rule_losses(tiny_profile, constants, "signed", anchor="prompt"),
            strict=True,
        ):
            assert (one.mean == other.mean).all()

    def test_unknown_anchor_suggests_the_nearest(self, tiny_profile):
        with pytest.raises(ConfigError, match=r"'promt' is unknown \(did you mean 'prompt'\?\)"):
            rule_losses(tiny_profile, RULES, "signed", anchor="promt")


def test_a_rules_losses_do_not_depend_on_the_others(tiny_profile):
    """Rules are looked up together; which others are asked for changes no bit."""
    grid = rule_grid([512, 1024], sink=4, block=64)
    together = rule_losses(tiny_profile, grid, "absolute")[1].mean
    some = rule_losses(tiny_profile, grid[::7], "absolute")[1].mean
    assert together[:, ::7] == pytest.approx(some, rel=1e-14)


class TestRobust:
    def test_adds_standard_errors_over_samples(self, tiny_profile):
        losses = rule_losses(tiny_profile, RULES, "signed")[0]
        for head, rule in ((0, 0), (3, 2), (5, 1)):
            values = [sample[head, rule] for sample in losses.per_sample]
            error = np.std(values, ddof=1) / 3**0.5
            assert losses.robust(1.5)[head, rule] == pytest.approx(np.mean(values) + 1.5 * error)

    def test_adds_stored_errors(self, tiny_profile):
        losses = rule_losses(tiny_profile, RULES, "absolute")[0]
        assert losses.robust(2) == pytest.approx(1.2 * losses.mean)  # the fixture's errors are a tenth of its means

    def test_the_report_stays_plain(self, tiny_profile):
        losses = rule_losses(tiny_profile, RULES, "signed")[0]
        before = losses.of_choice(TestOfChoice.CHOICE)
        losses.robust(3)
        assert losses.of_choice(TestOfChoice.CHOICE) == before

    def test_none_is_the_mean(self, tiny_profile):
        losses = rule_losses(tiny_profile, RULES, "signed")[0]
        assert (losses.robust(0) == losses.mean).all()

    @pytest.mark.parametrize("k", [-1, float("nan"), float("inf")])
    def test_no_number_of_errors(self, tiny_profile, k):
        with pytest.raises(ConfigError, match=r"robust is .*; it must be a finite number"):
            rule_losses(tiny_profile, RULES, "signed")[0].robust(k)

    def test_one_sample_tells_no_error(self, tiny_profile):
        entry = tiny_profile.by_length[512]
        entry.per_sample["signed"] = entry.per_sample["signed"][:1]
        entry.error["absolute"][:] = 0
        for criterion in ("signed", "absolute"):
            with pytest.raises(ConfigError, match="one sample at 512 tokens tells no standard error"):
                rule_losses(tiny_profile, RULES, criterion)[0].robust(1)


class TestUnusableStatistics:
    """What a file can't hold may still be in a profile built in Python, or say nothing."""

    def statistic(self, profile, criterion):
        entry = profile.by_length[1024]
        return {**entry.mean, **entry.per_sample, "root_squared": entry.per_sample["squared"]}[criterion]

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("criterion", CRITERIA)
    def test_not_finite(self, tiny_profile, criterion, bad):
        self.statistic(tiny_profile, criterion)[..., 1, 1, 0, 2] = bad
        with pytest.raises(ProfilingError, match=r"statistic \w+ at 1024 tokens holds values that aren't finite"):
            rule_losses(tiny_profile, RULES, criterion)

    def test_errors_that_are_not_finite(self, tiny_profile):
        tiny_profile.by_length[512].error["recall"][0, 0, 0, 0] = np.nan
        with pytest.raises(ProfilingError, match="standard errors of statistic recall at 512 tokens"):
            rule_losses(tiny_profile, RULES, "recall")

    @pytest.mark.parametrize("criterion", CRITERIA)
    def test_zero_everywhere(self, tiny_profile, criterion):
        self.statistic(tiny_profile, criterion)[:] = 0
        with pytest.raises(ProfilingError, match=r"at 1024 tokens is the same for every window, .*another criterion"):
            rule_losses(tiny_profile, RULES, criterion)

    def test_recall_that_no_window_lowers(self, tiny_profile):
        recall = self.statistic(tiny_profile, "recall")
        recall[:] = recall[..., -1:]
        with pytest.raises(ProfilingError, match="statistic recall at 1024 tokens is the same for every window"):
            rule_losses(tiny_profile, RULES, "recall")

    @pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"signed"}))
    def test_negative_where_that_cannot_be(self, tiny_profile, criterion):
        values = self.statistic(tiny_profile, criterion)
        values[..., 2, 0, 1, 3] = -0.01 * values.max()
        with pytest.raises(ProfilingError, match=r"at 1024 tokens holds -\S+, which can't be negative"):
            rule_losses(tiny_profile, RULES, criterion)

    @pytest.mark.parametrize("criterion", ["squared", "absolute"])
    def test_rounding_below_zero_is_none(self, tiny_profile, criterion):
        values = self.statistic(tiny_profile, criterion)
        values[..., 2, 0, :, -1] = -1e-9 * values.max()
        losses = rule_losses(tiny_profile, RULES, criterion)[1]
        assert (losses.mean[:, RULES.index(DENSE)] == 0).all()

    def test_others_still_work(self, tiny_profile):
        self.statistic(tiny_profile, "signed")[:] = 0
        assert len(rule_losses(tiny_profile, RULES, "recall")) == 2


def test_statistics_serve_at_another_length(tiny_profile):
    """Windows halved, rows at the same share: constants of twice the window lose as much at twice the length."""
    entry = tiny_profile.by_length[512]
    here = losses_from(entry, tiny_profile, [SpanRule(4 + 128, 0), DENSE], "signed", length=512)
    there = losses_from(
        entry, tiny_profile, [SpanRule(4 + 256, 0), DENSE], "signed", length=1024, profiled_window=lambda w: w / 2
    )
    assert there.length == 1024
    assert there.mean == pytest.approx(here.mean)
