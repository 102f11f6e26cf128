"""Channels of two digits: what they stand for, one number at a time; errors as theory says; when there are none."""

import math

import pytest
import torch
from moa_kernels.codes import Codec, Moments, Transform
from moa_kernels.codes.digits import allotted, in_digits
from moa_kernels.codes.levels import NORMAL_ERRORS, NORMAL_STEPS, Digits, quantise

CODED = (4, 3, 2)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steep(width, fall):
    """Variances that fall from 1 by a factor ``exp(fall)``."""
    return torch.exp(-fall * torch.arange(width, dtype=torch.float64) / width)[None]


def of_keys(spectrum, bits):
    """Of keys whose channels, as they come, have these variances, which are also what an error in them costs."""
    width = spectrum.shape[-1]
    nothing = torch.zeros(len(spectrum), width)
    same = torch.eye(width).expand(len(spectrum), -1, -1)
    return Transform.of_keys(same, nothing[0, ::2], nothing, torch.arange(width), spectrum, bits=bits)


@pytest.mark.parametrize("bits", CODED)
def test_codes_and_scales_of_a_vector_number_by_number(bits):
    width, count, weight, norm = 16, 3, 0.4, 12.5
    digits = Digits(torch.tensor([count]), torch.tensor([weight]).double(), torch.tensor([norm]).double())
    x = normal(1, 1, width)
    x[..., count : 2 * count] = x[..., :count]
    codes, scales = quantise(x, bits, digits)
    numbers = x[0, 0].tolist()
    squares = sum(weight * n * n for n in numbers[:count]) + sum(n * n for n in numbers[2 * count :])
    step, along, expected = math.sqrt(squares / norm) * NORMAL_STEPS[bits], 0.0, [0] * width
    for place in [*range(count), *range(2 * count, width)]:
        wide = 2 * bits if place < count else bits
        code = min(max(math.floor(numbers[place] / step) + 2 ** (wide - 1), 0), 2**wide - 1)
        along += (weight if place < count else 1) * numbers[place] * (code - (2**wide - 1) / 2)
        if place < count:
            expected[place], expected[place + count] = divmod(code, 2**bits)
        else:
            expected[place] = code
    assert codes[0, 0].tolist() == expected
    assert float(scales) == pytest.approx(squares / along, rel=2**-11)


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("width", [16, 64, 80, 128])
def test_the_cost_of_errors_is_the_theoretical_one_and_far_below_that_of_equal_bits(bits, width):
    spectrum = steep(width, 5)
    x = normal(1, 4000, width) * spectrum.sqrt()
    cost = {}
    plain = Transform.balanced(torch.eye(width)[None], torch.zeros(1, width))
    for name, transform in (("digits", of_keys(spectrum, bits)), ("none", plain)):
        codec = Codec(bits, transform)
        back = codec.decode(codec.encode(x), torch.float64)
        cost[name] = float(((back - x).square().mean(1) * spectrum).sum())
    n = int(allotted(spectrum, bits)[0])
    most, some, least = spectrum[0].split([n, width - 2 * n, n])
    predicted = NORMAL_ERRORS[2 * bits] * most.sum() ** 2 / n + NORMAL_ERRORS[bits] * some.sum() ** 2 / (width - 2 * n)
    # The scale that keeps scores, and a step from the vector itself, change it a little.
    assert cost["digits"] == pytest.approx(float(predicted + least.square().sum()), rel=0.25)
    assert cost["digits"] < cost["none"] / 1.4


@pytest.mark.parametrize("bits", CODED)
def test_as_many_channels_as_cost_least_have_two_digits(bits):
    spectrum = torch.cat([steep(64, fall) for fall in (0, 0.5, 2, 4, 8, 16)])
    x = normal(6, 2000, 64) * spectrum.sqrt()[:, None]
    chosen = allotted(spectrum, bits)
    assert (chosen.diff() >= 0).all()
    assert chosen[0] == 0 < chosen[-1] < 32

    def cost(counts):
        same = torch.eye(64, dtype=torch.float64).expand(6, -1, -1)
        into, back, digits = in_digits(same, same, spectrum, counts, bits)
        codec = Codec(bits, Transform(into, back, digits=digits))
        errors = (codec.decode(codec.encode(x), torch.float64) - x).square().mean(1)
        return (errors * spectrum).sum(-1)

    found = cost(chosen)
    for count in range(0, 32, 4):
        assert (found <= 1.2 * cost(torch.full((6,), count))).all()


@pytest.mark.parametrize("bits", CODED)
def test_channels_that_are_all_alike_are_stored_as_without_digits(bits):
    x = normal(2, 30, 64).float()
    plain = Transform.balanced(torch.eye(64).expand(2, -1, -1), torch.zeros(2, 64))
    alike = of_keys(torch.ones(2, 64), bits)
    assert not alike.digits.counts.any()
    found, expected = Codec(bits, alike).encode(x), Codec(bits, plain).encode(x)
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_scores_along_a_vector_keep_their_size_but_for_the_channels_that_are_left_out(bits, size):
    spectrum = steep(64, 6)
    n = int(allotted(spectrum, bits)[0])
    x = size * normal(1, 500, 64) * spectrum.sqrt()
    codec = Codec(bits, of_keys(spectrum, bits))
    back = codec.decode(codec.encode(x), torch.float64)
    kept = x[..., : 64 - n]
    torch.testing.assert_close((kept * back[..., : 64 - n]).sum(-1), kept.square().sum(-1), rtol=1e-3, atol=0)
    assert not back[..., 64 - n :].any()


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_shows_throughout_its_vector_alone(bits, bad):
    spectrum = steep(32, 6)
    x = normal(1, 3, 32)
    x[0, 1, 5] = bad
    codec = Codec(bits, of_keys(spectrum, bits))
    back = codec.decode(codec.encode(x), torch.float64)
    assert back[0, 1].isnan().all()
    assert back[0, [0, 2]].isfinite().all()
    assert not codec.decode(codec.encode(torch.zeros(1, 2, 32)), torch.float64).any()


def measured(query, key, bits):
    """As profiles have them: without a spectrum and with one."""
    width = key.shape[-1]
    balance, mean, spectrum = Moments.of(query, key, key).key_statics()
    statics = balance, torch.zeros(width // 2), mean, torch.arange(width)
    return [Transform.of_keys(*statics, spectrum=one, bits=bits) for one in (None, spectrum)]


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("width", [8, 24, 40, 64, 80, 112, 256])
@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(lambda x: 0 * x, id="zeros"),
        pytest.param(lambda x: x[:, :1].expand_as(x), id="all alike"),
        pytest.param(lambda x: x[..., :1] * x[:, :1], id="one direction"),
        pytest.param(lambda x: 1e-22 * x, id="no number in float32"),
    ],
)
def test_keys_with_nothing_in_most_channels(keys, width, bits):
    x = normal(2, 2 * width, width)
    key = keys(x).float()
    plain, digits = measured(normal(2, 2 * width, width, seed=1), key, bits)
    assert digits.into.isfinite().all()
    assert digits.back.isfinite().all()
    seen = [Codec(bits, one).seen(key, torch.arange(2 * width), 0) for one in (plain, digits)]
    errors = [float((one - key).double().square().mean()) for one in seen]
    assert errors[1] <= 1.5 * errors[0] + 1e-3 * float(key.double().square().mean())


@pytest.mark.parametrize("bits", CODED)
def test_codes_of_tiny_keys_are_those_of_large_ones(bits):
    key, query = (normal(1, 200, 64, seed=seed) * steep(64, 10).sqrt() for seed in (0, 1))
    found = []
    for size in (1, 2.0**-16):
        digits = measured(query, size * key, bits)[1]
        assert digits.digits.counts.all()
        found.append(Codec(bits, digits).encode(size * key))
    assert (found[0].scales > 2**-14).all(), "no float16 of fewer digits"
    assert torch.equal(found[0].scales, found[1].scales)
    assert (found[0].packed != found[1].packed).double().mean() < 1e-3


def test_a_transform_is_for_codes_of_its_bits():
    transform = of_keys(steep(64, 5), 3)
    for bits in (8, 4, 2):
        with pytest.raises(ValueError, match=f"for codes of 3 bits, not {bits}"):
            Codec(bits, transform.of([0]).to("cpu"))


@pytest.mark.parametrize(
    "spectrum",
    [torch.zeros(1, 64), torch.ones(64), steep(64, 5).flip(-1), math.nan * steep(64, 5), torch.ones(2, 64)],
)
def test_a_spectrum_is_positive_and_decreasing(spectrum):
    statics = torch.eye(64)[None], torch.zeros(32), torch.zeros(1, 64), torch.arange(64)
    with pytest.raises(ValueError, match="spectrum"):
        Transform.of_keys(*statics, spectrum=spectrum, bits=2)
