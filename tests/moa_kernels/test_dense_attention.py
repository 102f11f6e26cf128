"""Chunked attention against whole N x N matrices."""

import pytest
import torch
from moa_kernels.dense_attention import dense_attention

CASES = [
    # heads, kv_heads, N, softcap, window, sink logits
    (6, 2, 333, None, None, False),
    (8, 1, 128, None, None, False),
    (6, 3, 301, 8.0, None, False),
    (4, 2, 301, None, 50, False),
    (4, 2, 301, None, 301, False),
    (4, 2, 300, None, 1, False),
    (4, 2, 129, None, None, True),
    (6, 2, 390, 3.0, 130, True),
    (2, 1, 1, 5.0, 3, True),
]


def direct(query, key, value, scale, softcap, window, sinks):
    heads, n, _ = query.shape
    group = heads // key.shape[0]
    keys, values = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = query @ keys.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    scores = scores.masked_fill((j > i) | (i - j >= (window or n)), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, n, 1)], -1)
    return scores.softmax(-1)[..., :n] @ values


@pytest.mark.parametrize(("heads", "kv_heads", "n", "softcap", "window", "has_sinks"), CASES)
def test_output_and_gradients_equal_whole_matrices(heads, kv_heads, n, softcap, window, has_sinks):
    torch.manual_seed(n)
    query = (torch.randn(heads, n, 8, dtype=torch.float64) * 2).requires_grad_()
    key, value = (torch.randn(kv_heads, n, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    grad_out = torch.randn(heads, n, 8, dtype=torch.float64)
    sinks = torch.randn(heads, dtype=torch.float64) * 3 if has_sinks else None
    expected = direct(query, key, value, 0.35, softcap, window, sinks)
    out = dense_attention(query, key, value, scale=0.35, softcap=softcap, window=window, sink_logits=sinks)
    torch.testing.assert_close(out, expected)
    inputs = (query, key, value)
    for mine, theirs in zip(
        torch.autograd.grad(out, inputs, grad_out), torch.autograd.grad(expected, inputs, grad_out), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_the_type_and_accumulates_wider(dtype):
    torch.manual_seed(1)
    query, (key, value) = torch.randn(6, 300, 32).to(dtype), torch.randn(2, 2, 300, 32).to(dtype)
    low = dense_attention(query, key, value, scale=0.2, softcap=20.0)
    high = dense_attention(query.double(), key.double(), value.double(), scale=0.2, softcap=20.0)
    assert low.dtype == dtype
    assert (low.double() - high).abs().max() <= 2 * torch.finfo(dtype).eps * high.abs().max()


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"window": 64}], ids=["fused", "softcap", "window"])
def test_memory_is_linear_in_length(options):
    """Neither pass holds N x N entries."""
    largest = {}
    for n in (512, 2048):
        query, key, value = (torch.randn(2, n, 8, requires_grad=True) for _ in range(3))
        with torch.profiler.profile(profile_memory=True) as trace:
            dense_attention(query, key, value, scale=0.3, **options).sum().backward()
        largest[n] = max(event.self_cpu_memory_usage for event in trace.events())
    assert largest[2048] <= 4.5 * largest[512], largest
