"""The profile's statistics by the CPU library against whole matrices in float64, on the Triton kernels' problems."""

from __future__ import annotations

import pytest
import torch
from moa_kernels.coded_influence import coded_changes
from moa_kernels.cpu.library import unavailable
from moa_kernels.influence import influence_statistics

from .. import test_coded_influence as codes
from .. import test_influence_kernel as kernel
from ..seeds import seeds

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.mark.parametrize("seed", seeds(240))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "n", "sink", "softcap", "has_sinks", "row_buckets"), codes.CASES)
def test_changes_by_codecs(heads, kv_heads, n, sink, softcap, has_sinks, row_buckets, dtype):
    query, key, value, grad = codes.drawn(heads, kv_heads, n)
    keys, values = (x.to(dtype) for x in codes.coded(query, key, value, sink))
    query, grad = query.to(dtype), grad.to(dtype)
    options = {
        "windows": [*(w for w in (16, 32, 48, 80, 160) if w < n), n],
        "row_buckets": row_buckets,
        "bucket_rows": -(-n // row_buckets),
        "sink": sink,
        "scale": 0.35,
        "softcap": softcap,
        "sink_logits": torch.randn(heads, generator=torch.Generator().manual_seed(0)) * 2 if has_sinks else None,
    }
    found, plain = (coded_changes(query, keys, values, grad, **options, impl=impl) for impl in ("cpu", "torch"))
    exact = coded_changes(*(x.double() for x in (query, keys, values, grad)), **options, impl="torch")
    for name, changes in found.items():
        # Signed terms cancel: what counts is what they are sums of.
        size = influence_statistics(query, keys[-1], values[0], grad, **options, impl="torch")["absolute"].max().item()
        error, yardstick = ((each[name].double() - exact[name]).abs().max().item() for each in (found, plain))
        assert changes.shape == exact[name].shape
        assert error <= 2 * yardstick + 2e-6 * (exact[name].abs().max().item() + size), name
