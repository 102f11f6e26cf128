"""Means and their bootstrap intervals."""

import numpy as np
import pandas as pd
import pytest

from moa_search.errors import ConfigError
from moa_search.evaluation import paired_differences, summarise
from moa_search.evaluation.statistics import bootstrap_interval


def test_constant_data_has_no_spread():
    assert bootstrap_interval([0.25] * 10) == (0.25, 0.25)


def test_a_single_item_is_its_own_interval():
    assert bootstrap_interval([3.0]) == (3.0, 3.0)


def test_near_the_normal_interval_where_that_holds():
    values = np.random.default_rng(0).normal(5, 2, 400)
    half = 1.96 * values.std() / 20
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_covers_the_true_mean_about_as_often_as_it_says():
    """Percentile intervals of 30 skewed items cover somewhat less than 95 %."""
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.exponential(1.0, 30), seed=trial) for trial in range(200)]
    covered = sum(low <= 1 <= high for low, high in intervals) / len(intervals)
    assert 0.88 <= covered <= 0.98


def test_equal_seeds_resample_the_same_items():
    """So a variant that is better by the same amount everywhere has its interval moved by exactly that."""
    values = np.random.default_rng(0).normal(size=50)
    low, high = bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values + 1, seed=3) == pytest.approx((low + 1, high + 1))
    assert bootstrap_interval(values, seed=4) != (low, high)


@pytest.fixture
def items():
    rows = [
        {"task": task, "length": length, "variant": variant, "density": 0.5, "attention_density": 0.6,
         "metric": "exact match", "item": item, "nll": item + 10.0 * (variant == "plan"), "score": float(item % 2)}
        for task in ("passkey", "copy") for length in (1024, 512) for variant in ("dense", "plan") for item in range(4)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_one_row_per_task_length_and_variant_in_order(items):
    summary = summarise(items)
    assert summary[["task", "length", "variant"]].to_numpy().tolist() == [
        [task, length, variant]
        for task in ("passkey", "copy")
        for length in (1024, 512)
        for variant in ("dense", "plan")
    ]


def test_means_with_their_intervals(items):
    row = summarise(items).set_index(["task", "length", "variant"]).loc[("copy", 512, "plan")]
    assert row["n"] == 4
    assert (row["nll"], row["score"]) == (11.5, 0.5)
    assert (row["nll_low"], row["nll_high"]) == bootstrap_interval([10, 11, 12, 13])
    assert (row["score_low"], row["score_high"]) == bootstrap_interval([0, 1, 0, 1])
    assert (row["density"], row["attention_density"], row["metric"]) == (0.5, 0.6, "exact match")


def test_parts_of_one_item_are_not_items_of_their_own(items):
    halves = pd.concat([items.assign(nll=items["nll"] - 1), items.assign(nll=items["nll"] + 1)])
    pd.testing.assert_frame_equal(summarise(halves), summarise(items))


class TestPairedDifferences:
    def test_each_variant_less_the_one_it_is_compared_with(self, items):
        table = paired_differences(items)
        assert table[["task", "length", "variant", "against", "n"]].to_numpy().tolist() == [
            [task, length, "plan", "dense", 4] for task in ("passkey", "copy") for length in (1024, 512)
        ]
        assert (table["nll_difference"] == 10).all()
        assert (table[["nll_difference_low", "nll_difference_high"]] == 10).all(axis=None), "pairs differ by no more"
        assert (table["score_difference"] == 0).all()

    def test_any_variant_can_be_the_other(self, items):
        table = paired_differences(items, against="plan")
        assert set(table["variant"]) == {"dense"}
        assert (table["nll_difference"] == -10).all()

    def test_items_are_matched_whatever_their_order(self, items):
        shuffled = items.sample(frac=1, random_state=0)
        key = ["task", "length"]
        mine, theirs = (paired_differences(rows).sort_values(key).reset_index(drop=True) for rows in (shuffled, items))
        pd.testing.assert_frame_equal(mine, theirs)

    def test_only_what_both_have_counts(self, items):
        fewer = items[(items["variant"] == "dense") | (items["item"] < 3)]
        assert set(paired_differences(fewer)["n"]) == {3}
        elsewhere = items[(items["variant"] == "dense") | (items["length"] == 512)]
        assert set(paired_differences(elsewhere)["length"]) == {512}

    def test_an_unknown_variant_suggests_the_nearest(self, items):
        with pytest.raises(ConfigError, match=r"'dence' is unknown \(did you mean 'dense'\?\)"):
            paired_differences(items, against="dence")
