"""Effective context length: how far a model still finds what it is asked for.

For one variant and one retrieval task, the effective context length is the longest tested length at which at least
`THRESHOLD` of the items are answered rightly (MoA, arXiv 2406.14909). Lengths are a grid, so the truth lies between the
length that passes and the next one, which fails. Accuracy needn't fall steadily with the length: shorter lengths that
fail are named too.

Two multiples say what a plan gains over spans that are alike for all heads; both use a plan's effective context N and
its average span S = density(N) · N:

* *at equal average span* (MoA's 3.9x): N over the effective context of one constant window of S tokens. That window is
  dense up to S tokens, so the multiple is at most 1 / density(N) where dense attention passes at S;
* *at equal density*: N over the effective context of the uniform plan that keeps the same share of the cache at every
  length. Uniform spans of a share d find about d of uniformly spread passkeys at any length, so this denominator is
  often below the shortest tested length, and the multiple then only bounded from below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from moa_search.evaluation.statistics import accuracy_by_item, draws_of, interval_of

THRESHOLD = 0.9
"""Share of items that have to be answered rightly."""

WINDOW_STEPS = (1.0, 1.0625, 1.125, 1.1875, 1.25, 1.375, 1.5, 2.0)
"""Lengths at which a constant window is tried, in windows."""


@dataclass(frozen=True)
class EffectiveContext:
    """How far a variant carries on one task.

    Attributes:
        passes: Longest tested length that passes, in tokens; 0 where none does.
        fails: The tested length after it, which fails; None where the longest passes.
        low: Lower end of the 95 % bootstrap interval of ``passes``, over items.
        high: Its upper end.
        shortest: Shortest tested length.
        items: Items at each tested length, the fewest.
        gaps: Shorter tested lengths that fail.
    """

    passes: int
    fails: int | None
    low: int
    high: int
    shortest: int
    items: int
    gaps: tuple[int, ...] = ()

    @property
    def bracket(self) -> str:
        """Where the effective context lies, in words."""
        if not self.passes:
            return f"below {self.shortest}"
        reach = f"at least {self.passes}" if self.fails is None else f"{self.passes} to {self.fails}"
        return f"{reach}, but not {', '.join(map(str, self.gaps))}" if self.gaps else reach


def effective_context(items: pd.DataFrame, *, threshold: float = THRESHOLD) -> EffectiveContext:
    """The effective context of one variant on one task.

    Args:
        items: Rows of that variant and task alone, as `moa_search.evaluation.compare_variants` returns them.
        threshold: Least mean score that passes.
    """
    scores = accuracy_by_item(items)
    lengths = np.array(list(scores))
    means = np.array([values.mean() for values in scores.values()])
    resampled = np.stack([values[draws_of(len(values))].mean(axis=1) for values in scores.values()])
    passes = _passes(means[:, None], lengths, threshold)[0]
    low, high = interval_of(_passes(resampled, lengths, threshold).astype(float))
    fails = lengths[lengths > passes]
    return EffectiveContext(
        passes=int(passes),
        fails=int(fails[0]) if len(fails) else None,
        low=int(low),
        high=int(high),
        shortest=int(lengths[0]),
        items=min(map(len, scores.values())),
        gaps=tuple(lengths[(lengths < passes) & ~enough(means, threshold)].tolist()),
    )


def effective_contexts(items: pd.DataFrame, task: str) -> dict[str, EffectiveContext]:
    """The effective context of every variant on one task, in the order of appearance."""
    mine = items[items["task"] == task]
    return {name: effective_context(rows) for name, rows in mine.groupby("variant", sort=False)}


def _passes(
    accuracy: npt.NDArray[np.float64], lengths: npt.NDArray[np.int64], threshold: float
) -> npt.NDArray[np.int64]:
    """For accuracies ``[length, resample]``, the last length that passes, 0 where none does."""
    reached = np.where(enough(accuracy, threshold), lengths[:, None], 0).max(axis=0)
    return np.asarray(reached, dtype=np.int64)


def enough(accuracy: npt.ArrayLike, threshold: float = THRESHOLD) -> npt.NDArray[np.bool_]:
    """Whether accuracies pass: means of zeros and ones reach a threshold such as 0.9 exactly, up to rounding."""
    return np.asarray(accuracy) >= threshold - 1e-9


def multiple(plan: EffectiveContext, uniform: EffectiveContext) -> tuple[float | None, str]:
    """How many times as far a plan carries as uniform spans do, and that in words with what the grids leave open.

    Returns:
        The ratio of the lengths that pass, None where either passes nowhere; and its bracket, from the plan's passing
        length over the uniform failing one to the plan's failing length over the uniform passing one.
    """
    if not plan.passes:
        return None, "the plan passes at no tested length"
    if not uniform.passes:
        return None, f"over {plan.passes / uniform.shortest:.2f}"
    low = "" if uniform.fails is None else f"{plan.passes / uniform.fails:.2f}"
    high = "" if plan.fails is None else f"{plan.fails / uniform.passes:.2f}"
    return plan.passes / uniform.passes, f"{low or 'unknown'} to {high or 'unknown'}"


def effective_table(
    items: pd.DataFrame,
    tasks: Sequence[str],
    *,
    uniform: Mapping[str, str],
    windows: Mapping[str, Mapping[str, int]],
    window_items: pd.DataFrame,
) -> pd.DataFrame:
    """Effective contexts of every variant with the multiples that plans have.

    Args:
        items: As `moa_search.evaluation.compare_variants` returns them.
        tasks: Retrieval tasks.
        uniform: For a plan's variant, the one that keeps as much of the cache with spans that are alike.
        windows: By task, for a plan's variant, its average span in tokens at its effective context.
        window_items: Scores of constant windows of these spans, with ``window N`` as variant.

    Returns:
        One row per task and variant: ``effective_context`` with ``low``, ``high`` and ``fails_at`` in tokens, shorter
        lengths that fail as ``but_not_at``, ``n``, the ``density`` and ``average_span`` there, and of plans the two
        multiples of this module, each with the effective context that it divides by and its bracket.
    """
    rows = []
    for task in tasks:
        found = effective_contexts(items, task)
        carried = effective_contexts(window_items, task)
        for name, context in found.items():
            at = items[(items["task"] == task) & (items["variant"] == name) & (items["length"] == context.passes)]
            density = float(at["density"].iloc[0]) if len(at) else None
            row: dict[str, object] = {
                "task": task,
                "variant": name,
                "n": context.items,
                "effective_context": context.passes,
                "low": context.low,
                "high": context.high,
                "fails_at": context.fails,
                "but_not_at": ", ".join(map(str, context.gaps)),
                "density": density,
                "average_span": None if density is None else round(density * context.passes),
            }
            if uniform.get(name) in found:
                other = found[uniform[name]]
                ratio, bracket = multiple(context, other)
                row |= {"uniform_context": other.passes, "at_equal_density": ratio, "at_equal_density_bracket": bracket}
            window = windows.get(task, {}).get(name)
            if window is not None and f"window {window}" in carried:
                other = carried[f"window {window}"]
                ratio, bracket = multiple(context, other)
                row |= {"window_context": other.passes, "at_equal_span": ratio, "at_equal_span_bracket": bracket}
            rows.append(row)
    columns = ["task", "variant", "n", "effective_context", "low", "high", "fails_at", "but_not_at"]
    columns += ["density", "average_span"]
    for denominator, ratio_name in (("uniform_context", "at_equal_density"), ("window_context", "at_equal_span")):
        columns += [denominator, ratio_name, f"{ratio_name}_bracket"]
    return (
        pd.DataFrame(rows, columns=columns)
        .astype({"fails_at": "Int64", "average_span": "Int64"})
        .astype({"uniform_context": "Int64", "window_context": "Int64"})
    )


def window_lengths(window: int, longest: int) -> list[int]:
    """Lengths at which a constant window of so many tokens is tried, up to ``longest``, increasing."""
    return sorted({min(round(step * window), longest) for step in WINDOW_STEPS if window <= longest})
