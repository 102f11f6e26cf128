"""Effective context against examples worked out by hand."""

import pandas as pd
import pytest

from moa_search.evaluation.effective import (
    EffectiveContext,
    effective_context,
    effective_table,
    multiple,
    window_lengths,
)


def scored(**right):
    """Rows of ten items per length, so many of them right: ``at512=9``."""
    rows = [
        {"length": int(name.removeprefix("at")), "item": item, "score": float(item < count)}
        for name, count in right.items()
        for item in range(10)
    ]
    return pd.DataFrame(rows)


def test_the_longest_length_that_passes_and_the_next():
    found = effective_context(scored(at512=10, at1024=9, at2048=8, at4096=2))
    assert (found.passes, found.fails, found.items) == (1024, 2048, 10)
    assert found.bracket == "1024 to 2048"


def test_a_length_that_passes_beyond_one_that_fails_does_not_count():
    found = effective_context(scored(at512=10, at1024=5, at2048=10))
    assert (found.passes, found.fails, found.longest) == (512, 1024, 2048)


def test_nothing_passes():
    found = effective_context(scored(at512=8, at1024=10))
    assert (found.passes, found.fails, found.bracket) == (0, 512, "below 512")


def test_everything_passes():
    found = effective_context(scored(at512=10, at1024=10))
    assert (found.passes, found.fails, found.bracket) == (1024, None, "at least 1024")
    assert (found.low, found.high) == (1024, 1024)


def test_the_interval_follows_the_luck_of_the_draw():
    """Nine of ten pass in about half of the resamples; two of ten pass in none, ten of ten in all."""
    found = effective_context(scored(at512=10, at1024=9, at2048=2))
    assert (found.low, found.high) == (512, 1024)
    assert (effective_context(scored(at512=2, at1024=9)).high) == 0


def test_another_threshold():
    assert effective_context(scored(at512=10, at1024=8, at2048=7), threshold=0.8).passes == 1024


def test_order_of_rows_and_parts_of_items_do_not_matter():
    rows = scored(at1024=9, at512=10)
    halves = pd.concat([rows.assign(score=rows["score"] * 2), rows.assign(score=0.0)])
    assert effective_context(halves) == effective_context(rows) == effective_context(rows[::-1])


def carrying(passes, fails, shortest=256):
    return EffectiveContext(passes, fails, passes, passes, shortest, 10, passes)


@pytest.mark.parametrize(
    ("plan", "uniform", "ratio", "words"),
    [
        (carrying(2048, 4096), carrying(512, 640), 4.0, "3.20 to 8.00"),
        (carrying(2048, None), carrying(512, 640), 4.0, "3.20 to unknown"),
        (carrying(2048, 4096), carrying(2048, None), 1.0, "unknown to 2.00"),
        (carrying(2048, 4096), carrying(0, 256), None, "over 8.00"),
        (carrying(0, 256), carrying(512, 640), None, "the plan passes at no tested length"),
    ],
)
def test_multiples_say_what_the_grid_leaves_open(plan, uniform, ratio, words):
    assert multiple(plan, uniform) == (ratio, words)


def test_a_window_is_tried_where_it_begins_to_miss():
    assert window_lengths(512, 8192) == [512, 544, 576, 608, 640, 704, 768, 1024]
    assert window_lengths(512, 600) == [512, 544, 576, 600]
    assert window_lengths(512, 300) == []


def test_the_table_divides_by_the_uniform_plan_and_by_the_window():
    def rows(variant, density, **right):
        return scored(**right).assign(task="passkey", variant=variant, density=density)

    items = pd.concat(
        [
            rows("dense", 1.0, at512=10, at1024=10, at2048=10),
            rows("plan", 0.25, at512=10, at1024=10, at2048=5),
            rows("uniform", 0.25, at512=9, at1024=3, at2048=1),
            rows("lost", 0.1, at512=1, at1024=1, at2048=1),
        ]
    )
    window_items = rows("window 256", 1.0, at256=10, at288=9, at320=3)
    table = effective_table(
        items, ["passkey"], uniform={"plan": "uniform", "lost": "uniform"}, windows={"passkey": {"plan": 256}},
        window_items=window_items,
    ).set_index("variant")  # fmt: skip
    plan = table.loc["plan"]
    assert (plan["effective_context"], plan["fails_at"], plan["average_span"], plan["n"]) == (1024, 2048, 256, 10)
    assert (plan["uniform_context"], plan["at_equal_density"]) == (512, 2.0)
    assert plan["at_equal_density_bracket"] == "1.00 to 4.00"
    assert (plan["window_context"], plan["at_equal_span"]) == (288, 1024 / 288)
    assert plan["at_equal_span_bracket"] == "3.20 to 7.11"
    assert pd.isna(table.loc["dense", "fails_at"])
    assert pd.isna(table.loc["dense", "at_equal_density"])
    assert pd.isna(table.loc["lost", "average_span"])
    assert table.loc["lost", "at_equal_density_bracket"] == "the plan passes at no tested length"
