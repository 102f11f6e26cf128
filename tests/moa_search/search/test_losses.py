"""Rule losses against a slow reference, written from the definition."""

import numpy as np
import pytest

from moa_search.errors import ConfigError
from moa_search.formats.profile import (
    MEAN_STATISTICS,
    SAMPLE_STATISTICS,
    LengthHeader,
    LengthProfile,
    Profile,
    ProfileHeader,
)
from moa_search.search.losses import CRITERIA, rule_losses
from moa_search.spans import DENSE, SpanRule

SINK, BLOCK = 4, 16
RULES = [SpanRule(20, 0), SpanRule(75, 0), SpanRule(-40, 128), SpanRule(30, 96), SpanRule(150, 128), DENSE]
SHAPES = [(200, (16, 32, 64, 128, 200), 8), (203, (16, 48, 203), 10), (10, (5, 10), 16), (64, (64,), 4)]


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


def looked_up(entry, values, rule):
    """Sum over buckets of ``values[bucket]``, interpolated at the window of the bucket's middle row."""
    length, windows, buckets = entry.header.length, entry.header.windows, entry.header.row_buckets
    total = 0.0
    for bucket in range(buckets):
        contexts = [n for n in range(1, length + 1) if (n - 1) // -(-length // buckets) == bucket]
        if not contexts:
            continue  # buckets beyond the last row hold zeros when measured
        kept = {n: min(n, max(SINK + BLOCK, rule.alpha + rule.beta_256 * n // 256)) for n in contexts}
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


def expected(entry, criterion, layer, head, rule):
    if criterion in ("squared", "root_squared", "signed"):
        values = entry.per_sample["signed" if criterion == "signed" else "squared"]
        totals = [looked_up(entry, sample[layer, head], rule) for sample in values]
        if criterion == "root_squared":
            totals = [total**0.5 for total in totals]
        return sum(map(abs, totals)) / len(totals)
    total = looked_up(entry, entry.mean[criterion][layer, head], rule)
    if criterion == "recall":
        return sum(float(bucket[-1]) for bucket in entry.mean["recall"][layer, head]) - total
    return total


@pytest.mark.parametrize("criterion", CRITERIA)
def test_as_defined(profile, criterion):
    (losses,) = rule_losses(without_empty_buckets(profile), RULES, criterion)
    (entry,) = profile.by_length.values()
    model = profile.header.model
    for layer in range(model.num_hidden_layers):
        for head in range(model.num_key_value_heads):
            row = losses.mean[layer * model.num_key_value_heads + head]
            for index, rule in enumerate(RULES):
                reference = expected(entry, criterion, layer, head, rule)
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
