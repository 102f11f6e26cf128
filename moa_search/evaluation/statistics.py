"""Means and paired differences with bootstrap intervals.

Resampling is over items. Readings of one item, such as the slices of a document, are averaged first: they aren't
independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from moa_search.errors import ConfigError
from moa_search.formats.files import nearest

RESAMPLES = 2000
LEVEL = 0.95
CELL = ["task", "length", "variant"]
DESCRIBED = ("density", "attention_density", "kv_share", "kv_peak", "extra_passes", "metric", "answers")


def bootstrap_interval(values: npt.ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, at 95 %, from 2,000 resamples.

    Args:
        values: One number per item, ``[item]``.
        seed: Equal seeds resample the same items, so that variants are compared on the same draws.
    """
    data = np.asarray(values, dtype=float)
    return interval_of(data[draws_of(len(data), seed)].mean(axis=1))


def draws_of(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Which of ``count`` items each resample takes, ``[resample, item]``."""
    return np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))


def interval_of(resampled: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of a statistic's values over resamples, ``[resample]``."""
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def summarise(items: pd.DataFrame) -> pd.DataFrame:
    """One row per variant, task and length, from one row per item or part of it.

    Args:
        items: As `moa_search.evaluation.compare_variants` returns them.

    Returns:
        Those keys with ``n``, the number of items, and mean, low and high of ``nll`` and ``score``, in the order of
        appearance.
    """
    rows = []
    for key, group in items.groupby(CELL, sort=False):
        row = dict(zip(CELL, key, strict=True))
        row |= {name: group[name].iloc[0] for name in DESCRIBED if name in group}
        by_item = group.groupby("item", sort=False)[["nll", "score"]].mean()
        row["n"] = len(by_item)
        for name in ("nll", "score"):
            row[name] = by_item[name].mean()
            row[f"{name}_low"], row[f"{name}_high"] = bootstrap_interval(by_item[name])
        rows.append(row)
    return pd.DataFrame(rows)


def paired_differences(items: pd.DataFrame, against: str = "dense") -> pd.DataFrame:
    """How much every variant differs from one of them on the same items.

    Args:
        items: As for `summarise`.
        against: Name of the variant that the others are compared with.

    Returns:
        One row per task, length and other variant: ``against``, ``n`` and mean, low and high of ``nll_difference``
        and ``score_difference`` (the variant less ``against``), over the items that both have.

    Raises:
        ConfigError: There is no variant of that name.
    """
    names = list(dict.fromkeys(items["variant"]))
    if against not in names:
        raise ConfigError(f"variant {against!r} is unknown{nearest(against, names)}; choose from {', '.join(names)}")
    by_item = items.groupby([*CELL, "item"], sort=False)[["nll", "score"]].mean().reset_index()
    cells = {key: cell.set_index("item")[["nll", "score"]] for key, cell in by_item.groupby(CELL, sort=False)}
    rows = []
    for (task, length, variant), cell in cells.items():
        other = cells.get((task, length, against))
        if variant == against or other is None:
            continue
        difference = cell.loc[cell.index.isin(other.index)].sort_index()
        difference = difference - other.loc[difference.index]
        row: dict[str, object] = {"task": task, "length": length, "variant": variant, "against": against}
        row["n"] = len(difference)
        for name in ("nll", "score"):
            row[f"{name}_difference"] = difference[name].mean()
            low, high = bootstrap_interval(difference[name])
            row |= {f"{name}_difference_low": low, f"{name}_difference_high": high}
        rows.append(row)
    columns = [*CELL, "against", "n"]
    columns += [f"{name}_difference{end}" for name in ("nll", "score") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=columns)


def accuracy_by_item(items: pd.DataFrame) -> dict[int, npt.NDArray[np.float64]]:
    """The scores of one variant and task by length, increasing, ``[item]`` each."""
    lengths: Sequence[int] = sorted(items["length"].unique().tolist())
    return {
        length: items[items["length"] == length].groupby("item")["score"].mean().to_numpy(dtype=float)
        for length in lengths
    }
