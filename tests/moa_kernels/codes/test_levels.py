"""Levels: errors as theory says, scores kept, and numbers that aren't finite."""

import math

import pytest
import torch
from moa_kernels.codes.levels import NORMAL_ERRORS, NORMAL_STEPS, dequantise, quantise

CODED = (8, 4, 3, 2)
BY_NORMAL_STEPS = CODED[1:]


def normal_error(step, bits):
    """Squared error of evenly spaced levels for the standard normal distribution, by the closed form."""

    def density(x):
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def below(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    def between(low, high, level):
        mass, first = below(high) - below(low), density(low) - density(high)
        second = mass + low * density(low) - (0 if high == math.inf else high * density(high))
        return second - 2 * level * first + level**2 * mass

    top = 2 ** (bits - 1)
    edges = [i * step for i in range(top)] + [math.inf]
    return 2 * sum(between(edges[i], edges[i + 1], (i + 0.5) * step) for i in range(top))


@pytest.mark.parametrize("bits", NORMAL_STEPS)
def test_the_step_is_the_best_one_for_normal_numbers(bits):
    best = normal_error(NORMAL_STEPS[bits], bits)
    assert best < normal_error(NORMAL_STEPS[bits] * 1.001, bits)
    assert best < normal_error(NORMAL_STEPS[bits] * 0.999, bits)
    assert NORMAL_ERRORS[bits] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("bits", BY_NORMAL_STEPS)
def test_error_of_normal_numbers_is_the_theoretical_one(bits):
    x = torch.randn(200, 2048, generator=torch.Generator().manual_seed(0))
    error = (dequantise(*quantise(x, bits), bits) - x).square().sum() / x.square().sum()
    least = normal_error(NORMAL_STEPS[bits], bits)
    # A scale that keeps scores makes the least squared error D into D / (1 - D).
    assert error == pytest.approx(least / (1 - least), rel=0.02)


@pytest.mark.parametrize("bits", BY_NORMAL_STEPS)
@pytest.mark.parametrize("width", [64, 80, 128])
def test_error_of_a_heads_vectors_is_the_theoretical_one(bits, width):
    x = torch.randn(4000, width, generator=torch.Generator().manual_seed(0))
    error = (dequantise(*quantise(x, bits), bits) - x).square().sum() / x.square().sum()
    # Divided by its root mean square, a normal vector is uniform on a sphere: its channels have lighter tails.
    t = torch.linspace(-1, 1, 200001, dtype=torch.float64) * width**0.5
    density = (1 - t * t / width).clamp_min(0) ** ((width - 3) / 2)
    step, top = NORMAL_STEPS[bits], 2 ** (bits - 1)
    levels = (t / step).floor().clamp(-top, top - 1).add(0.5) * step
    kept, along = ((part * density).sum() / density.sum() for part in (levels.square(), levels * t))
    assert error == pytest.approx(float(kept / along**2 - 1), rel=0.03)


def test_8_bits_err_by_a_step_over_root_12():
    x = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = x.abs().amax(-1, keepdim=True) / 127.5
    error = (dequantise(*quantise(x, 8), 8) - x) / step
    assert error.square().mean() == pytest.approx(1 / 12, rel=0.05)


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_scores_along_a_vector_keep_their_size(bits, size):
    x = size * torch.randn(500, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 0] *= 20  # an outlier
    back = dequantise(*quantise(x, bits), bits)
    half = torch.finfo(torch.float16)
    rounding = half.eps / 2 + half.smallest_normal * half.eps / quantise(x, bits)[1].double().min()
    assert ((x * back).sum(-1) / x.square().sum(-1) - 1).abs().max() <= rounding


@pytest.mark.parametrize("bits", CODED)
def test_every_code_is_in_range_and_used(bits):
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(2))
    codes, scales = quantise(x, bits)
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.float16)
    assert codes.unique().tolist() == list(range(2**bits))


@pytest.mark.parametrize("bits", CODED)
def test_zero_comes_back_as_zero(bits):
    assert dequantise(*quantise(torch.zeros(3, 16), bits), bits).eq(0).all()


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_what_no_scale_can_hold_is_nan_for_its_vector_alone(bits, bad):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    clean = dequantise(*quantise(x, bits), bits)
    x[2, 5] = bad
    back = dequantise(*quantise(x, bits), bits)
    assert back[2].isnan().all()
    assert torch.equal(back[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_vectors_code_depends_on_the_vector_alone(bits, dtype):
    x = torch.randn(3, 257, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    codes, scales = quantise(x, bits)
    for token in (0, 1, 128, 256):
        alone = quantise(x[1, token], bits)
        assert torch.equal(alone[0], codes[1, token])
        assert torch.equal(alone[1], scales[1, token])
