"""The profiling kernels compiled for the GPU at hand, with the launch settings that users get."""

from __future__ import annotations

import pytest
import torch
from moa_kernels.influence import STATISTICS, influence_statistics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def problem(n, head_dim, dtype, unit=64, heads=8, kv_heads=2, extras=False):
    """Inputs ``[heads, n, head_dim]`` as models give them, rows outermost, and the windows of a profile."""
    generator = torch.Generator("cuda").manual_seed(n + head_dim)

    def randn(count):
        full = torch.randn(n, count, head_dim, generator=generator, device="cuda", dtype=torch.float32)
        return full.to(dtype).transpose(0, 1)

    tensors = [randn(heads), randn(kv_heads), randn(kv_heads), randn(heads)]
    options = {
        "windows": [*range(unit, 16 * unit, unit), 18 * unit, 25 * unit, n],
        "row_buckets": 32,
        "bucket_rows": -(-n // 32),
        "sink": 64,
        "scale": head_dim**-0.5,
    }
    if extras:
        options |= {"softcap": 20.0, "sink_logits": torch.randn(heads, generator=generator, device="cuda")}
    return tensors, options


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("n", "unit", "extras"), [(2048, 64, False), (2001, 60, True), (4096, 16, False)])
def test_close_to_float64(n, unit, extras, head_dim, dtype):
    tensors, options = problem(n, head_dim, dtype, unit, extras=extras)
    found = influence_statistics(*tensors, impl="triton", **options)
    plain = influence_statistics(*tensors, impl="torch", **options)
    exact = influence_statistics(*(tensor.double() for tensor in tensors), impl="torch", **options)
    for name in STATISTICS:
        # Sums of terms that cancel are as far off as the terms are large; exp2 is good to 2 ** -22 on the device.
        size = exact["absolute" if name == "signed" else name].amax(-1, keepdim=True)
        yardstick = (plain[name].double() - exact[name]).abs().max()
        error = (found[name].double() - exact[name]).abs()
        assert (error <= 2 * yardstick + 1e-5 * size).all(), f"{name}: {error.max():.3g}, torch {yardstick:.3g}"


@pytest.mark.parametrize("unit", [64, 60])
def test_runs_are_equal_to_the_bit(unit):
    tensors, options = problem(4096, 128, torch.bfloat16, unit, extras=True)
    first = influence_statistics(*tensors, impl="triton", **options)
    for _ in range(5):
        again = influence_statistics(*tensors, impl="triton", **options)
        for name in STATISTICS:
            assert torch.equal(first[name], again[name]), name


def test_whole_windows_cost_exactly_nothing():
    tensors, options = problem(2048, 128, torch.bfloat16)
    found = influence_statistics(*tensors, impl="triton", **options)
    for name in ("squared", "signed", "absolute", "elementwise"):
        assert (found[name][..., -1] == 0).all(), name
        assert (found[name][:, 0] == 0).all(), f"{name}: sink 64 holds all of the first bucket's keys"


def test_given_output_and_log_sum_exp():
    tensors, options = problem(4096, 128, torch.bfloat16)
    query, key, value, _ = tensors
    scores = query.float() @ key.float().repeat_interleave(4, 0).mT * options["scale"]
    scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))
    out = scores.softmax(-1) @ value.float().repeat_interleave(4, 0)
    given = influence_statistics(*tensors, impl="triton", out=out, lse=scores.logsumexp(-1), **options)
    alone = influence_statistics(*tensors, impl="triton", **options)
    for name in STATISTICS:
        size = alone["absolute" if name == "signed" else name].amax(-1, keepdim=True)
        assert ((given[name] - alone[name]).abs() <= 1e-3 * size).all(), name


def test_auto_takes_triton():
    tensors, options = problem(2048, 64, torch.bfloat16)
    auto, triton = (influence_statistics(*tensors, impl=impl, **options) for impl in ("auto", "triton"))
    for name in STATISTICS:
        assert torch.equal(auto[name], triton[name])
