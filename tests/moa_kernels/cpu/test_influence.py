"""The profile's statistics by the CPU library against whole matrices in float64, on the Triton kernels' problems."""

from __future__ import annotations

import pytest
import torch
from moa_kernels.cpu.library import unavailable
from moa_kernels.influence import influence_statistics

from .. import test_influence_kernel as kernel

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.mark.parametrize("seed", range(160))
def test_random_problems(seed):
    before = torch.get_num_threads()
    torch.set_num_threads(1 + seed % 2)
    case = kernel.problem(seed)
    kernel.assert_close(case.run("cpu"), case)
    torch.set_num_threads(before)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scales_that_turn_the_order_of_scores_around(scale):
    case = kernel.problem(5)
    case.options["scale"] = scale
    kernel.assert_close(case.run("cpu"), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_a_packed_panel_and_wide_heads(dtype):
    generator = torch.Generator().manual_seed(0)
    query, grad = (torch.randn(4, 700, 100, generator=generator).to(dtype) for _ in range(2))
    key, value = (torch.randn(2, 700, 100, generator=generator).to(dtype) for _ in range(2))
    options = {"windows": (32, 64, 200, 500, 900), "row_buckets": 16, "bucket_rows": 45, "sink": 20, "scale": 0.1}
    found, expected = (influence_statistics(query, key, value, grad, **options, impl=impl) for impl in ("cpu", "torch"))
    exact = influence_statistics(*(x.double() for x in (query, key, value, grad)), **options, impl="torch")
    for name, statistic in found.items():
        error, yardstick = ((each[name].double() - exact[name]).abs().max() for each in (found, expected))
        assert error <= 2 * yardstick + 1e-6 * exact[name].abs().max(), name
        assert statistic.dtype == torch.float32
