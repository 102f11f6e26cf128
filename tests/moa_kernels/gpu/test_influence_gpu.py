"""Profiling compiled for the GPU at hand, with codes and without, beside the torch references."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch
from moa_kernels.coded_influence import CODED_STATISTICS, coded_changes
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


CODECS = (3, 2)
"""Of keys and of values beside the plain ones."""


@functools.cache
def coded(length, dim, dtype, whole, codecs=CODECS):
    """Keys and values off by about as much as codes of 8 to 2 bits are."""
    (query, key, value, grad_out), options = problem(length, dim, dtype)
    generator = torch.Generator("cuda").manual_seed(length)
    seen = [query]
    for plain, count in zip((key, value), codecs, strict=True):
        noise = torch.randn(count, *plain.shape, generator=generator, device="cuda")
        noise *= torch.tensor([0.01, 0.1, 0.4, 0.2][:count], device="cuda").view(-1, 1, 1, 1)
        noise[:, :, : options["sink"]] = 0
        seen.append(torch.cat([plain[None], (plain + noise).to(dtype)]))
    if whole:  # what profiles ask for
        options |= {"windows": [length], "row_buckets": 1, "bucket_rows": length}
    return [*seen, grad_out], options


@functools.cache
def coded_exact(length, dim, dtype, whole):
    """Changes in float64, and how large what they are sums of is."""
    (query, keys, values, grad_out), options = coded(length, dim, dtype, whole)
    wide = [x.double() for x in (query, keys, values, grad_out)]
    absolute = influence_statistics(query, keys[-1], values[-1], grad_out, **options, impl="torch")["absolute"].max()
    exact = coded_changes(*wide, **options, impl="torch")
    return exact, {"squared": exact["squared"].abs().max(), "signed": exact["signed"].abs().max() + absolute}


@functools.cache
def coded_yardstick():
    """How far torch in float32 is off, at most, over all cases."""
    worst = dict.fromkeys(CODED_STATISTICS, 0.0)
    for length, (dim, dtype), whole in product(LENGTHS, KINDS, (True, False)):
        tensors, options = coded(length, dim, dtype, whole)
        exact, size = coded_exact(length, dim, dtype, whole)
        plain = coded_changes(*(x.float() for x in tensors), **options, impl="torch")
        for name in CODED_STATISTICS:
            worst[name] = max(worst[name], float((plain[name] - exact[name]).abs().max() / size[name]))
    return worst


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("dim", "dtype"), KINDS)
@pytest.mark.parametrize("whole", [True, False])
def test_codes_equal_the_reference(length, dim, dtype, whole):
    tensors, options = coded(length, dim, dtype, whole)
    exact, size = coded_exact(length, dim, dtype, whole)
    found = coded_changes(*tensors, **options, impl="triton")
    for name in CODED_STATISTICS:
        error = float((found[name] - exact[name]).abs().max() / size[name])
        assert error <= 2 * coded_yardstick()[name] + 1e-5, name


def test_two_runs_over_codes_agree_to_the_bit():
    tensors, options = coded(4096, 128, torch.bfloat16, True, (4, 4))
    first, second = (coded_changes(*tensors, **options) for _ in range(2))
    for name in CODED_STATISTICS:
        assert torch.equal(first[name], second[name])


def test_memory_over_codes_is_linear_in_the_length():
    def peak(length):
        tensors, options = coded(length, 64, torch.bfloat16, True, (3, 3))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        coded_changes(*tensors, **options, impl="triton")
        return torch.cuda.max_memory_allocated() - before

    assert peak(32768) < 2.2 * peak(16384)
