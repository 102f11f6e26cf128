"""Means with bootstrap intervals."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

__all__ = ["bootstrap_interval", "summarise"]

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap_interval(values: npt.ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, at 95 %, from 2,000 resamples.

    Args:
        values: One number per item, ``[item]``.
        seed: Equal seeds resample the same items, so that variants are compared on the same draws.
    """
    data = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(data), size=(RESAMPLES, len(data)))
    low, high = np.quantile(data[draws].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def summarise(items: pd.DataFrame) -> pd.DataFrame:
    """One row per variant, task and length, from one row per item.

    Args:
        items: Columns ``variant``, ``task``, ``length``, ``density``, ``attention_density``, ``metric``, ``nll``,
            ``score``.

    Returns:
        Those keys with ``n``, and mean, low and high of ``nll`` and ``score``, in the order of appearance.
    """
    keys = ["task", "length", "variant"]
    rows = []
    for key, group in items.groupby(keys, sort=False):
        row = dict(zip(keys, key, strict=True))
        row |= {name: group[name].iloc[0] for name in ("density", "attention_density", "metric")}
        row["n"] = len(group)
        for name in ("nll", "score"):
            row[name] = group[name].mean()
            row[f"{name}_low"], row[f"{name}_high"] = bootstrap_interval(group[name])
        rows.append(row)
    return pd.DataFrame(rows)
