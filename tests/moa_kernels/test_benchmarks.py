"""Benchmarks run, are gated, and write what they say, on tiny shapes without a GPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moa_kernels.spans import HeadSpans

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def plans(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("plans")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="--tiny is for machines without a GPU")
def test_all_kernels_tiny(tmp_path):
    command = [sys.executable, BENCHMARKS / "run.py", "--tiny", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "benchmarks.jsonl").read_text().splitlines()]
    assert {row["kernel"] for row in rows} == {
        "copy",
        "prefill",
        "decode",
        "append",
        "coded_decode",
        "coded_append",
        "influence",
        "coded_influence",
        "pages",
        "pages_store",
    }
    assert not [row for row in rows if "wrong" in row or "skipped" in row]
    for row in rows[1:]:
        assert {"kernel", "case", "ms", "reference", "reference_ms", "ratio", "device", "torch", "shapes"} <= set(row)
    table = (tmp_path / "benchmarks.md").read_text()
    assert table.count("\n|") == len(rows) + 1 + 1
    assert table.strip() in done.stdout


def test_plans_have_the_densities_of_their_names(plans):
    for name, density in (("dense", 1.0), ("25 %", 0.25), ("12.5 %", 0.125)):
        found = plans.attention_density(plans.spans_of(name), 32768)
        assert abs(found - density) < 0.01, name


def test_block_lists_cover_exactly_what_is_attended(plans):
    spans = HeadSpans.of([(0, 256), (-20, 130), (70, 0)], sink=20, min_span=33)
    length, block = 256, 16
    some, whole = plans.block_lists(spans, length, block, torch.device("cpu"))
    position = torch.arange(length)
    blocks = spans.visible(position, position).unflatten(1, (-1, block)).unflatten(3, (-1, block)).transpose(2, 3)
    assert torch.equal(whole, blocks.all((-1, -2)))
    assert torch.equal(some | whole, blocks.any(-1).any(-1))
