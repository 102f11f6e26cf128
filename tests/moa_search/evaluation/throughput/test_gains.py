import pandas as pd
import pytest

from moa_search.evaluation.throughput import split_gains, summarise_throughput


def runs(*cells):
    """Three runs of each ``(way, kind, batch, is_largest, speeds)``; prefill takes 1000 / speed."""
    return pd.DataFrame(
        [
            {
                "variant": way, "kind": kind, "density": 0.5, "attention_density": 0.6, "length": 64, "batch": batch,
                "is_largest": largest, "repetition": repetition, "prefill_ms": 1000 / speed, "decode_ms": 1 / speed,
                "decode_tokens_per_s": speed, "cache_bytes": 10 * batch, "peak_bytes": 100 + repetition,
            }
            for way, kind, batch, largest, speeds in cells
            for repetition, speed in enumerate(speeds)
        ]
    )  # fmt: skip


def test_medians_spread_and_ratios_run_by_run():
    summary = summarise_throughput(
        runs(("dense", "dense", 1, False, (10, 20, 5)), ("half", "plan", 1, False, (30, 20, 20)))
    )
    dense, half = summary.to_dict("records")
    assert (half["decode_tokens_per_s"], half["decode_tokens_per_s_low"], half["decode_tokens_per_s_high"]) == (
        20,
        20,
        30,
    )
    assert half["decode_ratio"] == 3, "the median of 3, 1 and 4: a slow moment hits both ways"
    assert half["prefill_ratio"] == pytest.approx(3)
    assert (dense["decode_ratio"], dense["n"], dense["peak_bytes"]) == (1, 3, 102)


def test_a_cell_without_dense_beside_it_has_no_ratio():
    summary = summarise_throughput(runs(("dense", "dense", 1, False, (10,) * 3), ("half", "plan", 2, False, (30,) * 3)))
    assert summary["decode_ratio"].isna().tolist() == [False, True]
    assert split_gains(summary).empty


def test_factors_multiply_to_the_gain():
    cells = [
        ("dense", "dense", 4, True, (100,) * 3),
        ("dense-static", "dense-static", 5, True, (150,) * 3),
        ("half", "plan", 8, True, (360,) * 3),
        ("half", "plan-static", 9, True, (720,) * 3),
        ("half", "plan", 4, False, (200,) * 3),
        ("half", "plan-static", 5, False, (300,) * 3),
    ]
    gains = split_gains(summarise_throughput(runs(*cells))).set_index(["kind", "against"])
    growing = gains.loc["plan", "dense"]
    assert growing[["gain", "attention", "batch", "static_cache"]].tolist() == [3.6, 2.0, 1.8, 1.0]
    assert (growing["dense_batch"], growing["plan_batch"]) == (4, 8)
    compiled = gains.loc["plan-static", "dense"]
    assert compiled[["gain", "attention", "batch", "static_cache"]].tolist() == [7.2, 2.0, 1.8, 2.0]
    like_with_like = gains.loc["plan-static", "dense-static"]
    assert like_with_like[["gain", "attention", "batch", "static_cache"]].tolist() == [4.8, 2.0, 2.4, 1.0]
    unlike = gains.loc["plan", "dense-static"]
    assert unlike["gain"] == 2.4
    assert unlike[["attention", "batch", "static_cache"]].isna().all()
