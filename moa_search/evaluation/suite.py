"""Dense attention, plans and uniform spans over many tasks and lengths, measured cell by cell and kept."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import pandas as pd

from moa_search.data import Sample, hash_samples
from moa_search.errors import CalibrationError
from moa_search.evaluation.compare import Variant, constant_like, kept_tokens, measure
from moa_search.evaluation.effective import effective_context, effective_contexts, enough, window_lengths
from moa_search.evaluation.result_folder import ResultFolder
from moa_search.formats import Plan
from moa_search.modeling.loading import weights_hash
from moa_search.modeling.text import dtype_name
from moa_search.tasks import AnswerMode, Task

CELLS_SCHEMA: Final = "moa-cells/1"

PARTS = ("item", "depth", "nll", "score")
"""Columns that a cell's file keeps, in this order; the others follow from its key."""

REFINED_TO_TOKENS = 64


@dataclass(frozen=True)
class Grid:
    """Which items: lengths, and how many at each.

    Attributes:
        counts: Items, or items per depth, by length in tokens, increasing.
        depths: Where the sought text stands; empty for evenly spread.
        seed: Random seed for drawing items.
        answers: How they are answered.
    """

    counts: Mapping[int, int]
    depths: tuple[float, ...] = ()
    seed: int = 0
    answers: AnswerMode = "forced"

    @property
    def lengths(self) -> list[int]:
        """Lengths in tokens, increasing."""
        return list(self.counts)

    def count_at(self, length: int) -> int:
        """Items at a length between those of the grid: as many as at the next longer one."""
        return next((count for known, count in self.counts.items() if known >= length), list(self.counts.values())[-1])

    def work(self, tasks: Sequence[Task], variants: int) -> int:
        """Tokens of all items under so many variants."""
        places = sum(task.places(self.depths) for task in tasks)
        return variants * places * sum(length * count for length, count in self.counts.items())


@dataclass
class Evaluator:
    """One model and what was measured of it before.

    Every cell (one plan, one task, one length) is kept at once, by plan, weights, type, items and how they are
    answered.

    Attributes:
        model: A dense transformers model; left dense.
        tokenizer: Its tokenizer.
        folder: Where cells are kept; None keeps none.
        report: Told the tokens of each item, measured or found.
    """

    model: Any
    tokenizer: Any
    folder: str | os.PathLike[str] | None = None
    report: Callable[[int], None] = lambda tokens: None
    _weights: str = field(init=False)
    _kept: ResultFolder | None = field(init=False)
    _items: dict[tuple[Any, ...], list[Sample]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._weights = weights_hash(self.model)
        self._kept = None if self.folder is None else ResultFolder(self.folder, schema=CELLS_SCHEMA, what="scores")

    def items(self, task: Task, length: int, grid: Grid) -> list[Sample]:
        """The items of a task at a length; those of the last call are remembered."""
        key = (task.name, length, grid.count_at(length), grid.depths, grid.seed)
        if key not in self._items:
            self._items = {
                key: task.held_out(
                    self.tokenizer, length=length, count=grid.count_at(length), seed=grid.seed, depths=grid.depths
                )
            }
        return self._items[key]

    def cell(self, variant: Variant, task: Task, length: int, grid: Grid) -> list[dict[str, Any]]:
        """Rows of one cell, as `compare_variants` returns them."""
        samples, answers = self.items(task, length, grid), task.answer_mode(grid.answers)
        described = {"task": task.name, "length": length, "variant": variant.name, **variant.costs(length)}
        described |= {"metric": task.metric_of(answers), "answers": answers}
        key = self._key(variant, task, length, samples, answers)
        parts = None if self._kept is None else self._kept.read(key)
        if parts is None:
            with variant.running(self.model, length):
                rows = measure(self.model, task, samples, answers=grid.answers, report=self.report)
            parts = [[None if _is_nan(row[name]) else row[name] for name in PARTS] for row in rows]
            if self._kept is not None:
                self._kept.write(key, parts)
        else:
            self.report(sum(sample.target_length for sample in samples))
        return [
            {**described, **{n: math.nan if v is None else v for n, v in zip(PARTS, part, strict=True)}}
            for part in parts
        ]

    def _key(
        self, variant: Variant, task: Task, length: int, samples: Sequence[Sample], answers: AnswerMode
    ) -> dict[str, Any]:
        return {
            "plan": variant.key(length),
            "weights": self._weights,
            "dtype": dtype_name(self.model),
            "task": task.name,
            "metric": task.metric_of(answers),
            "items": hash_samples(samples),
            "length": length,
            "answers": answers,
        }


def measure_grid(evaluator: Evaluator, variants: Sequence[Variant], tasks: Sequence[Task], grid: Grid) -> pd.DataFrame:
    """Every variant on every task at every length, the short lengths first."""
    rows: list[dict[str, Any]] = []
    for length in grid.lengths:
        for task in tasks:
            for variant in variants:
                rows += evaluator.cell(variant, task, length, grid)
    return pd.DataFrame(rows)


def refine_grid(
    evaluator: Evaluator, variants: Sequence[Variant], task: Task, grid: Grid, items: pd.DataFrame, steps: int
) -> pd.DataFrame:
    """Rows at lengths between a variant's last that passes and its first that fails, halving the gap ``steps`` times.

    Args:
        evaluator: Measures.
        variants: Which of them to look at more closely.
        task: A retrieval task.
        grid: Lengths measured already.
        items: What was measured on it.
        steps: Halvings at most; lengths are multiples of 64 tokens.
    """
    found = pd.DataFrame(columns=items.columns)
    for variant in variants:
        mine = items[(items["task"] == task.name) & (items["variant"] == variant.name)]
        for _ in range(steps):
            bracket = effective_context(mine)
            if not bracket.passes or bracket.fails is None:
                break
            middle = (bracket.passes + bracket.fails) // 2 // REFINED_TO_TOKENS * REFINED_TO_TOKENS
            if middle <= bracket.passes:
                break
            rows = pd.DataFrame(evaluator.cell(variant, task, middle, grid))
            mine = pd.concat([mine, rows])
            found = rows if found.empty else pd.concat([found, rows])
    return found


def measure_windows(
    evaluator: Evaluator, plans: Mapping[str, Plan], task: Task, grid: Grid, items: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, int]]:
    """How far one constant window carries that is as long as each plan's average span at its effective context.

    A window is tried at rising lengths until it fails, so these rows end where its effective context does.

    Args:
        evaluator: Measures.
        plans: By name of the variant.
        task: A retrieval task.
        grid: Says how many items.
        items: What was measured of the plans.

    Returns:
        The rows, with ``window N`` as variant, and the window in tokens of each plan that passes somewhere.
    """
    reached = effective_contexts(items, task.name)
    windows: dict[str, int] = {}
    longest: dict[int, int] = {}
    for name, plan in plans.items():
        passes = reached[name].passes
        if passes:
            windows[name] = kept_tokens(plan, passes)
            longest[windows[name]] = max(passes, longest.get(windows[name], 0))
    rows: list[dict[str, Any]] = []
    for window, length in sorted(longest.items()):
        plan = next(plans[name] for name, span in windows.items() if span == window)
        variant = Variant(f"window {window}", partial(_always, constant_like(plan, window)))
        rows += _until_it_fails(evaluator, variant, task, grid, window, length)
    return pd.DataFrame(rows, columns=items.columns), windows


def _always(plan: Plan, length: int) -> Plan:
    return plan


def _until_it_fails(
    evaluator: Evaluator, variant: Variant, task: Task, grid: Grid, window: int, longest: int
) -> Iterator[dict[str, Any]]:
    for length in window_lengths(window, longest):
        try:
            rows = evaluator.cell(variant, task, length, grid)
        except CalibrationError:  # shorter than the task's items can be
            continue
        yield from rows
        if not enough(np.mean([row["score"] for row in rows])):
            return


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
