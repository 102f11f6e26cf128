"""The streaming statistics against whole N x N matrices, explicitly masked."""

import pytest
import torch
from moa_kernels.influence import causal_attention, influence_backward

NAMES = ("squared", "signed", "absolute", "elementwise", "recall")


def direct(query, key, value, grad_out, windows, row_buckets, sink, scale, softcap, window):
    """Output and statistics from full matrices; every window is its own masked softmax."""
    heads, n, _ = query.shape
    group = heads // key.shape[0]
    keys, values = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = query @ keys.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    visible = (j <= i) & (i - j < (window or n + 1))
    scores = scores.masked_fill(~visible, float("-inf"))
    attention = scores.softmax(-1)
    out = attention @ values
    gain, row_gain = grad_out @ values.mT, (grad_out * out).sum(-1, keepdim=True)
    effect = (attention * (gain - row_gain) / (1 - attention).clamp_min(1e-6)).abs()
    rows = -(-n // row_buckets)
    totals = {name: torch.zeros(key.shape[0], row_buckets, len(windows), dtype=query.dtype) for name in NAMES}
    for index, size in enumerate(windows):
        kept = visible & ((i - j < size) | (j < sink))
        restricted = scores.masked_fill(~kept, float("-inf")).softmax(-1) @ values
        delta = (grad_out * (restricted - out)).sum(-1)
        by_row = {
            "squared": delta**2,
            "signed": delta,
            "absolute": delta.abs(),
            "elementwise": (effect * (visible & ~kept)).sum(-1),
            "recall": (attention * kept).sum(-1),
        }
        for name, values_by_row in by_row.items():
            grouped = values_by_row.unflatten(0, (-1, group)).sum(1)
            for bucket in range(row_buckets):
                totals[name][:, bucket, index] = grouped[:, bucket * rows : (bucket + 1) * rows].sum(1)
    return out, totals


CASES = [
    # heads, kv_heads, N, sink, softcap, window, row_buckets
    (6, 2, 333, 0, None, None, 16),
    (3, 1, 97, 1, None, None, 7),
    (4, 4, 260, 64, None, None, 32),
    (9, 3, 129, 16, None, None, 32),
    (8, 1, 128, 4, None, None, 1),
    (6, 3, 301, 5, 8.0, None, 8),
    (4, 2, 301, 4, None, 50, 8),
    (2, 2, 200, 3, 3.0, 70, 5),
    (2, 1, 70, 100, None, None, 4),
    (2, 1, 1, 0, None, None, 4),
    (2, 1, 2, 0, None, None, 4),
]


@pytest.mark.parametrize(("heads", "kv_heads", "n", "sink", "softcap", "window", "row_buckets"), CASES)
def test_statistics_equal_whole_matrices(heads, kv_heads, n, sink, softcap, window, row_buckets):
    torch.manual_seed(n)
    query = (torch.randn(heads, n, 8, dtype=torch.float64) * 2).requires_grad_()
    key, value = (torch.randn(kv_heads, n, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    grad_out = torch.randn(heads, n, 8, dtype=torch.float64)
    windows = [*(w for w in (1, 2, 5, 16, 17, 64, 100, 129, 200, 300) if w < n), n]
    expected_out, expected = direct(query, key, value, grad_out, windows, row_buckets, sink, 0.35, softcap, window)
    expected_out.backward(grad_out)
    with torch.no_grad():
        out = causal_attention(query, key, value, scale=0.35, softcap=softcap, window=window)
        result = influence_backward(
            query,
            key,
            value,
            grad_out,
            windows=windows,
            row_buckets=row_buckets,
            sink=sink,
            scale=0.35,
            softcap=softcap,
            window=window,
        )
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(result.grad_query, query.grad)
    torch.testing.assert_close(result.grad_key, key.grad)
    torch.testing.assert_close(result.grad_value, value.grad)
    for name in NAMES:
        # 1e-9 relative, as promised; sums of signed terms that cancel are compared with what they are sums of.
        yardstick = expected["absolute"] if name == "signed" else expected[name]
        error = (result.statistics[name] - expected[name]).abs()
        assert (error <= 1e-9 * yardstick + 1e-14).all(), name


def test_whole_window_costs_exactly_nothing():
    torch.manual_seed(0)
    query, grad_out = torch.randn(2, 4, 150, 16)
    key, value = torch.randn(2, 2, 150, 16)
    result = influence_backward(query, key, value, grad_out, windows=[10, 140, 150], row_buckets=5, sink=10, scale=0.25)
    for name in ("squared", "signed", "absolute", "elementwise"):
        assert (result.statistics[name][..., 1:] == 0).all(), f"{name}: sink 10 and window 140 see all 150 keys"
        assert (result.statistics[name][..., 1:, 0].abs() > 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float64(dtype):
    """Statistics accumulate in float32 whatever the inputs: the error is that of float32, not of the inputs."""
    torch.manual_seed(1)
    query, grad_out = torch.randn(2, 6, 400, 32).to(dtype)
    key, value = torch.randn(2, 2, 400, 32).to(dtype)
    settings = {"windows": [32, 64, 128, 400], "row_buckets": 8, "sink": 4, "scale": 32**-0.5}
    low = influence_backward(query, key, value, grad_out, **settings)
    high = influence_backward(*(x.double() for x in (query, key, value, grad_out)), **settings)
    for name in ("squared", "absolute", "elementwise", "recall"):
        torch.testing.assert_close(low.statistics[name].double(), high.statistics[name], rtol=1e-4, atol=1e-4)


def test_memory_is_linear_in_length():
    """No tensor of the backward pass holds N x N entries."""
    largest = {}
    for n in (512, 1024, 2048):
        query, grad_out = torch.randn(2, 2, n, 8)
        key, value = torch.randn(2, 1, n, 8)
        with torch.profiler.profile(profile_memory=True, record_shapes=False) as trace:
            influence_backward(query, key, value, grad_out, windows=[64, n], row_buckets=8, sink=4, scale=0.3)
        largest[n] = max(event.self_cpu_memory_usage for event in trace.events())
    assert largest[2048] <= 2.2 * largest[1024] <= 2.2**2 * largest[512], largest
