"""Profiling compiled for the GPU at hand, beside the torch reference."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch
from moa_kernels.influence import STATISTICS, influence_statistics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def problem(length, dim, dtype):
    generator = torch.Generator("cuda").manual_seed(length + dim)

    def randn(heads):
        return torch.randn(heads, length, dim, generator=generator, device="cuda").to(dtype)

    tensors = [randn(6), randn(2), randn(2), randn(6)]
    windows = [*range(64, 1025, 64), 1536, 2048, length]
    options = {"row_buckets": 32, "bucket_rows": -(-length // 32), "sink": 16, "scale": dim**-0.5}
    return tensors, {**options, "windows": sorted(set(windows))}


LENGTHS = (2048, 4099)
KINDS = ((64, torch.float16), (128, torch.bfloat16), (256, torch.bfloat16))


def drawn(length, dim, dtype, aligned):
    tensors, options = problem(length, dim, dtype)
    if not aligned:
        options["windows"] = [1, 37, 100, *options["windows"][5:]]
    exact = influence_statistics(*(x.double() for x in tensors), **options, impl="torch")
    # Signed terms cancel: they are off as far as they are large.
    return tensors, options, exact, {name: exact["absolute" if name == "signed" else name].max() for name in STATISTICS}


@functools.cache
def yardstick():
    """How far torch in float32 is off, at most, of the largest number of each statistic, over all cases."""
    worst = dict.fromkeys(STATISTICS, 0.0)
    for length, (dim, dtype), aligned in product(LENGTHS, KINDS, (True, False)):
        tensors, options, exact, size = drawn(length, dim, dtype, aligned)
        plain = influence_statistics(*(x.float() for x in tensors), **options, impl="torch")
        for name in STATISTICS:
            worst[name] = max(worst[name], float((plain[name] - exact[name]).abs().max() / size[name]))
    return worst


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("dim", "dtype"), KINDS)
@pytest.mark.parametrize("aligned", [True, False])
def test_equals_the_reference(length, dim, dtype, aligned):
    tensors, options, exact, size = drawn(length, dim, dtype, aligned)
    found = influence_statistics(*tensors, **options, impl="triton")
    for name in STATISTICS:
        error = float((found[name] - exact[name]).abs().max() / size[name])
        assert error <= 2 * yardstick()[name] + 1e-5, name


def test_two_runs_agree_to_the_bit():
    tensors, options = problem(4096, 128, torch.bfloat16)
    first, second = (influence_statistics(*tensors, **options, impl="triton") for _ in range(2))
    for name in STATISTICS:
        assert torch.equal(first[name], second[name])
