"""Grids of cells, each measured once."""

import json

import pandas as pd
import pytest

from moa_search.errors import ConfigError
from moa_search.evaluation import compare_variants
from moa_search.evaluation.compare import Variant
from moa_search.evaluation.suite import Evaluator, Grid, measure_grid, measure_windows, refine_grid
from moa_search.formats import ModelSignature, Plan
from moa_search.spans import SpanRule
from moa_search.tasks import TASKS

DENSE = Variant("dense", lambda length: None)
TWO = [TASKS["passkey"], TASKS["perplexity"]]


@pytest.fixture
def short(tiny_model):
    plan = Plan.uniform(SpanRule(90, 0), ModelSignature.of(tiny_model[0].config))
    return Variant("short", lambda length: plan)


@pytest.fixture
def evaluator(tiny_model, tmp_path):
    return Evaluator(*tiny_model, folder=tmp_path / "cells")


def fails(*arguments, **options):
    raise AssertionError("something was measured")


@pytest.fixture
def nothing_is_measured(monkeypatch):
    return lambda: monkeypatch.setattr("moa_search.evaluation.suite.measure", fails)


def test_a_grid_has_the_rows_of_a_plain_comparison(evaluator, tiny_model, short):
    grid = Grid({300: 2, 500: 1})
    rows = measure_grid(evaluator, [DENSE, short], TWO, grid)
    plain = [
        compare_variants(
            *tiny_model, [DENSE, short], tasks=["passkey", "perplexity"], lengths=[length], count=count, seed=0
        )
        for length, count in grid.counts.items()
    ]
    pd.testing.assert_frame_equal(rows, pd.concat(plain, ignore_index=True)[rows.columns.tolist()])


@pytest.mark.parametrize("answers", ["forced", "generated"])
def test_what_was_measured_is_found_again(evaluator, tiny_model, short, tmp_path, nothing_is_measured, answers):
    grid = Grid({300: 2}, answers=answers)
    first = measure_grid(evaluator, [DENSE, short], TWO, grid)
    nothing_is_measured()
    tokens = []
    again = Evaluator(*tiny_model, folder=tmp_path / "cells", report=tokens.append)
    pd.testing.assert_frame_equal(measure_grid(again, [DENSE, short], TWO, grid), first)
    assert sum(tokens) == grid.work(TWO, 2) == 2 * 2 * 2 * 300


def test_a_stopped_run_keeps_its_cells(evaluator, tiny_model, short, tmp_path, monkeypatch):
    grid = Grid({300: 2})

    def stop(length):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_grid(evaluator, [DENSE, Variant("stops", stop)], TWO, grid)
    (kept,) = (tmp_path / "cells").iterdir()
    assert kept.name.startswith("dense-300-")
    assert json.loads(kept.read_text())["task"] == "passkey"


@pytest.mark.parametrize(
    "change",
    [
        {"counts": {300: 3}},
        {"counts": {301: 2}},
        {"seed": 1},
        {"answers": "generated"},
        {"depths": (0.5,)},
    ],
)
def test_other_items_are_other_cells(evaluator, change, nothing_is_measured):
    grid = {"counts": {300: 2}, "seed": 0, "answers": "forced", "depths": ()}
    measure_grid(evaluator, [DENSE], [TASKS["passkey"]], Grid(**grid))
    nothing_is_measured()
    with pytest.raises(AssertionError, match="something was measured"):
        measure_grid(evaluator, [DENSE], [TASKS["passkey"]], Grid(**{**grid, **change}))


def test_other_plans_and_tasks_are_other_cells(evaluator, short, nothing_is_measured):
    grid = Grid({300: 2})
    measure_grid(evaluator, [DENSE], [TASKS["passkey"]], grid)
    nothing_is_measured()
    for variant, task in ((short, "passkey"), (DENSE, "copy")):
        with pytest.raises(AssertionError, match="something was measured"):
            measure_grid(evaluator, [variant], [TASKS[task]], grid)


def test_a_folder_that_cannot_be_made_is_found_at_once(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="measured scores can't be made"):
        Evaluator(*tiny_model, folder=tmp_path / "file")


def test_between_lengths_as_many_items_as_at_the_next_longer_one():
    grid = Grid({512: 40, 1024: 20, 2048: 10})
    assert [grid.count_at(length) for length in (300, 512, 600, 2048, 5000)] == [40, 40, 20, 10, 10]


class FoundUpTo:
    """In the place of a evaluator: a variant finds everything up to so many tokens, and nothing beyond."""

    def __init__(self, **reach):
        self.reach, self.asked = reach, []

    def cell(self, variant, task, length, grid):
        self.asked.append((variant.name, length))
        reach = self.reach[variant.name.replace(" ", "")]
        keys = {"task": task.name, "length": length, "variant": variant.name, "density": 0.5}
        return [{**keys, "item": item, "score": float(length <= reach)} for item in range(4)]


class TestRefining:
    def test_the_gap_is_halved_as_often_as_asked(self):
        evaluator, grid, task = FoundUpTo(dense=5000, short=900), Grid({512: 4, 1024: 4, 2048: 4}), TASKS["passkey"]
        variants = [DENSE, Variant("short", lambda length: None)]
        rows = measure_grid(evaluator, variants, [task], grid)
        evaluator.asked.clear()
        between = refine_grid(evaluator, variants, task, grid, rows, 2)
        assert evaluator.asked == [("short", 768), ("short", 896)]
        assert between["length"].unique().tolist() == [768, 896]

    def test_no_further_than_lengths_can_be_told_apart(self):
        evaluator, grid, task = FoundUpTo(short=600), Grid({512: 4, 640: 4}), TASKS["passkey"]
        variants = [Variant("short", lambda length: None)]
        rows = measure_grid(evaluator, variants, [task], grid)
        evaluator.asked.clear()
        refine_grid(evaluator, variants, task, grid, rows, 9)
        assert evaluator.asked == [("short", 576)]

    def test_nothing_to_do_where_all_or_nothing_passes(self):
        evaluator, grid, task = FoundUpTo(dense=5000, short=0), Grid({512: 4, 1024: 4}), TASKS["passkey"]
        variants = [DENSE, Variant("short", lambda length: None)]
        rows = measure_grid(evaluator, variants, [task], grid)
        assert refine_grid(evaluator, variants, task, grid, rows, 3).empty


class TestWindows:
    @pytest.fixture
    def plans(self, tiny_model):
        signature = ModelSignature.of(tiny_model[0].config)
        half = Plan.uniform(SpanRule(0, 128), signature)
        return {"half": half, "mirror": half, "low": Plan.uniform(SpanRule(0, 32), signature)}

    def test_each_is_the_plans_average_span_and_is_tried_until_it_fails(self, plans):
        reach = {"half": 1024, "mirror": 1024, "low": 0, "window512": 550}
        evaluator, grid, task = FoundUpTo(**reach), Grid({512: 4, 1024: 4, 2048: 4}), TASKS["passkey"]
        variants = [Variant(name, lambda length: None) for name in plans]
        rows = measure_grid(evaluator, variants, [task], grid)
        evaluator.asked.clear()
        tried, windows = measure_windows(evaluator, plans, task, grid, rows)
        assert windows == {"half": 512, "mirror": 512}, "one that passes nowhere has no average span"
        assert evaluator.asked == [("window 512", 512), ("window 512", 544), ("window 512", 576)]
        assert tried["length"].unique().tolist() == [512, 544, 576]

    def test_a_window_really_is_one_constant_span(self, plans, tiny_model):
        seen = []

        class Looking(FoundUpTo):
            def cell(self, variant, task, length, grid):
                seen.append(variant.plan_at(length))
                return super().cell(variant, task, length, grid)

        evaluator, grid, task = FoundUpTo(half=512), Grid({512: 4, 1024: 4}), TASKS["passkey"]
        rows = measure_grid(evaluator, [Variant("half", lambda length: None)], [task], grid)
        measure_windows(Looking(window256=0), {"half": plans["half"]}, task, grid, rows)
        assert seen
        assert {span for plan in seen for layer in plan.spans(2000) for span in layer} == {256}
