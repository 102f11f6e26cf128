"""The streaming statistics against whole N x N matrices, explicitly masked."""

import pytest
import torch
from moa_kernels.influence import STATISTICS, influence_statistics

from .whole_matrices import direct

CASES = [
    # heads, kv_heads, N, sink, softcap, sink logits, row_buckets
    (6, 2, 333, 0, None, False, 16),
    (3, 1, 97, 1, None, False, 7),
    (4, 4, 260, 64, None, False, 32),
    (9, 3, 129, 16, None, False, 32),
    (8, 1, 128, 4, None, False, 1),
    (6, 3, 301, 5, 8.0, False, 8),
    (4, 2, 301, 4, None, True, 8),
    (2, 2, 200, 0, 3.0, True, 5),
    (2, 1, 70, 100, None, False, 4),
    (2, 1, 1, 0, None, False, 4),
    (2, 1, 2, 0, None, True, 4),
]


@pytest.mark.parametrize("windows", [(1, 2, 5, 16, 17, 64, 100, 129, 200, 300), (16, 32, 48, 80, 160, 256)])
@pytest.mark.parametrize(("heads", "kv_heads", "n", "sink", "softcap", "has_sinks", "row_buckets"), CASES)
def test_statistics_equal_whole_matrices(
    heads, kv_heads, n, sink, softcap, has_sinks, row_buckets, windows, monkeypatch
):
    monkeypatch.setattr("moa_kernels.influence.reference.CPU_SCORES", 2**14)  # several chunks even at these lengths
    torch.manual_seed(n)
    query = torch.randn(heads, n, 8, dtype=torch.float64) * 2
    key, value = torch.randn(2, kv_heads, n, 8, dtype=torch.float64)
    grad_out = torch.randn(heads, n, 8, dtype=torch.float64)
    sinks = torch.randn(heads, dtype=torch.float64) * 2 if has_sinks else None
    windows = [*(w for w in windows if w < n), n]
    options = {
        "windows": windows,
        "row_buckets": row_buckets,
        "bucket_rows": -(-n // row_buckets),
        "sink": sink,
        "scale": 0.35,
        "softcap": softcap,
        "sink_logits": sinks,
    }
    expected = direct(query, key, value, grad_out, **options)
    statistics = influence_statistics(query, key, value, grad_out, **options)
    assert tuple(statistics) == STATISTICS
    for name in STATISTICS:
        # 1e-9 relative, as promised; sums of signed terms that cancel are compared with what they are sums of.
        yardstick = expected["absolute"] if name == "signed" else expected[name]
        error = (statistics[name] - expected[name]).abs()
        assert (error <= 1e-9 * yardstick + 1e-14).all(), name


def test_whole_window_costs_exactly_nothing():
    torch.manual_seed(0)
    query, grad_out = torch.randn(2, 4, 150, 16)
    key, value = torch.randn(2, 2, 150, 16)
    statistics = influence_statistics(
        query, key, value, grad_out, windows=[10, 140, 150], row_buckets=5, bucket_rows=30, sink=10, scale=0.25
    )
    for name in ("squared", "signed", "absolute", "elementwise"):
        assert (statistics[name][..., 1:] == 0).all(), f"{name}: sink 10 and window 140 see all 150 keys"
        assert (statistics[name][..., 1:, 0].abs() > 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float64(dtype):
    """Statistics accumulate in float32 whatever the inputs: the error is that of float32, not of the inputs."""
    torch.manual_seed(1)
    query, grad_out = torch.randn(2, 6, 400, 32).to(dtype)
    key, value = torch.randn(2, 2, 400, 32).to(dtype)
    settings = {"windows": [32, 64, 128, 400], "row_buckets": 8, "bucket_rows": 50, "sink": 4, "scale": 32**-0.5}
    low = influence_statistics(query, key, value, grad_out, **settings)
    high = influence_statistics(*(x.double() for x in (query, key, value, grad_out)), **settings)
    for name in ("squared", "absolute", "elementwise", "recall"):
        torch.testing.assert_close(low[name].double(), high[name], rtol=1e-4, atol=1e-4)


def test_memory_is_linear_in_length():
    """No tensor of the pass holds N x N entries."""
    largest = {}
    for n in (1024, 4096):
        query, grad_out = torch.randn(2, 2, n, 8)
        key, value = torch.randn(2, 1, n, 8)
        with torch.profiler.profile(profile_memory=True) as trace:
            influence_statistics(
                query, key, value, grad_out, windows=[64, n], row_buckets=8, bucket_rows=n // 8, sink=4, scale=0.3
            )
        largest[n] = max(event.self_cpu_memory_usage for event in trace.events())
    assert largest[4096] <= 4.5 * largest[1024], largest
