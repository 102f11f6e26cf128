"""Moments: parts add up, and the transform solved from them is the balanced one."""

import pytest
import torch
from moa_kernels.codes import Moments, Transform, balance


def drawn(tokens=300, kv_heads=2, group=3, width=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(kv_heads * group, tokens, width, generator=rng)
    key = 5 + torch.randn(kv_heads, tokens, width, generator=rng) * torch.logspace(-1, 1, width)
    return query, key, torch.randn(kv_heads, tokens, 8, generator=rng)


def test_parts_add_up_to_the_whole():
    whole = Moments.of(*drawn())
    parts = [Moments.of(*(x[:, start:stop] for x in drawn())) for start, stop in ((0, 7), (7, 200), (200, 300))]
    total = parts[0] + parts[1] + parts[2]
    assert total.tokens == 300
    for name in ("key", "key_square", "query_square", "value", "value_square"):
        assert torch.allclose(getattr(total, name), getattr(whole, name), rtol=1e-12), name


def test_statics_are_mean_and_balance_of_covariance_and_queries():
    query, key, value = drawn()
    matrix, mean, _ = Moments.of(query, key, value).key_statics()
    assert (matrix.dtype, mean.dtype) == (torch.float32, torch.float32)
    assert torch.allclose(mean, key.mean(1), rtol=1e-5)
    for head in range(2):
        spread = torch.cov(key[head].double().T, correction=0)
        shared = query[3 * head : 3 * head + 3].double().flatten(0, 1)
        wanted = balance(spread[None], (shared.T @ shared)[None])[0][0]
        # Columns are eigenvectors: their signs are anyone's.
        signs = (wanted * matrix[head].double()).sum(0).sign()
        assert torch.allclose(matrix[head].double() * signs, wanted, rtol=1e-3, atol=1e-4)


def test_means_of_many_spreads_cost_no_precision():
    """Qwen2's keys have biases of some hundreds in channels that vary by about one."""
    query, key, value = drawn(tokens=2000)
    off = torch.tensor([300.0, -300.0] + [0.0] * 14)
    plain, shifted = (
        Moments.of(query, key, value).key_statics()[0],
        Moments.of(query, key + off, value).key_statics()[0],
    )
    assert torch.allclose(shifted.abs(), plain.abs(), rtol=1e-3, atol=1e-3)


def test_the_transform_follows():
    query, key, value = drawn()
    transform = Transform.balanced(*Moments.of(query, key, value).key_statics()[:2])
    stored = transform.apply(key)
    assert stored.mean(1).abs().max() < 1e-5 * key.abs().max()
    assert torch.allclose(transform.invert(stored), key.double(), rtol=0, atol=1e-9)


def test_no_tokens_give_no_statics():
    with pytest.raises(ValueError, match="no token was seen"):
        Moments.of(torch.zeros(3, 0, 16), torch.zeros(1, 0, 16), torch.zeros(1, 0, 8)).key_statics()
