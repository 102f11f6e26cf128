"""Medians over repetitions, and where a gain comes from."""

from __future__ import annotations

from typing import Any

import pandas as pd

CELL = ["variant", "kind", "length", "batch"]
MEASURED = ("prefill_ms", "decode_ms", "decode_tokens_per_s")


def summarise_throughput(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per way, length and batch.

    Args:
        runs: As `measure` returns them.

    Returns:
        Median, lowest and highest of each time (``prefill_ms``, ``prefill_ms_low``, ...), the largest ``peak_bytes``
        and ``cache_bytes``, ``n``, and against the first dense way at the same length and batch, where that ran:
        ``prefill_ratio`` and ``decode_ratio``, the median over repetitions of how many times as fast it was.
    """
    rows = []
    for _, group in runs.groupby(CELL, sort=False):
        first = group.iloc[0]
        row: dict[str, Any] = {name: first[name] for name in (*CELL, "density", "attention_density", "is_largest")}
        row["n"] = len(group)
        for name in MEASURED:
            row[name] = group[name].median()
            row[f"{name}_low"], row[f"{name}_high"] = group[name].min(), group[name].max()
        for name in ("cache_bytes", "peak_bytes"):
            row[name] = group[name].max()
        dense = _dense_beside(runs, first)
        row["prefill_ratio"] = _ratio(dense, group, "prefill_ms")
        row["decode_ratio"] = _ratio(group, dense, "decode_tokens_per_s")
        rows.append(row)
    return pd.DataFrame(rows)


def split_gains(summary: pd.DataFrame) -> pd.DataFrame:
    """Split the gain in decoded tokens per second, at each way's largest batch, into factors that multiply to it.

    Every factor is the ratio of two measured cells that differ in one thing:

    * ``attention``: the plan instead of dense attention, at the dense way's largest batch: less is read per step.
    * ``batch``: the plan's own largest batch instead of that one: what the memory that it frees is good for.
    * ``static_cache``: the plan's compiled way, on a cache of fixed size, instead of the growing one, each at its
      largest batch; 1 for the growing one itself.

    Against ``dense``, all three apply. Against ``dense-static``, the compiled plan differs in attention and batch only;
    the growing plan differs in the kind of cache as well, so there only the gain is given.

    Args:
        summary: Of runs with the largest batches, as `summarise_throughput` returns it.

    Returns:
        One row per plan, kind, length and dense way: ``variant``, ``kind``, ``length``, ``against``, ``dense_batch``,
        ``plan_batch``, ``gain``, ``attention``, ``batch``, ``static_cache`` (NaN where they don't apply). No rows where
        no largest batches were run.
    """
    speed = {
        (row["variant"], row["kind"], row["length"], row["batch"]): row["decode_tokens_per_s"]
        for row in summary.to_dict("records")
    }
    largest = {
        (row["variant"], row["kind"], row["length"]): row["batch"]
        for row in summary[summary["is_largest"]].to_dict("records")
    }
    rows = []
    for (way, kind, length), batch in largest.items():
        for against in ("dense", "dense-static"):
            dense_batch = largest.get((against, against, length))
            if kind.startswith("dense") or dense_batch is None:
                continue
            base, best = speed[against, against, length, dense_batch], speed[way, kind, length, batch]
            row = {"variant": way, "kind": kind, "length": length, "against": against}
            row |= {"dense_batch": dense_batch, "plan_batch": batch, "gain": best / base}
            like = "plan" if against == "dense" else "plan-static"  # has the dense way's kind of cache
            like_batch = largest.get((way, like, length))
            if like_batch is not None and (against == "dense" or kind == like):
                at_dense = speed.get((way, like, length, dense_batch), float("nan"))  # not run where it doesn't fit
                at_own = speed[way, like, length, like_batch]
                row |= {"attention": at_dense / base, "batch": at_own / at_dense, "static_cache": best / at_own}
            rows.append(row)
    return pd.DataFrame(rows)


def _dense_beside(runs: pd.DataFrame, cell: pd.Series[Any]) -> pd.DataFrame:
    """Runs of the first dense way at a cell's length and batch."""
    beside = runs[(runs["length"] == cell["length"]) & (runs["batch"] == cell["batch"])]
    dense = beside[beside["kind"].str.startswith("dense")]
    return dense[dense["kind"] == dense["kind"].iloc[0]] if len(dense) else dense


def _ratio(upper: pd.DataFrame, lower: pd.DataFrame, name: str) -> float:
    """Median over repetitions of the ratio, run by run."""
    pairs = upper.set_index("repetition")[name] / lower.set_index("repetition")[name]
    return float(pairs.median())
