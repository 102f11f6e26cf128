"""Rotary embedding found from keys alone, against what models' configurations say."""

import pytest
import torch
from moa_kernels.codes import Rotary

from moa_search.profiling.rotary import SHIFTS, rotary_of


def moved(rotary, layers=2, noise=0.0, seed=0):
    """Keys ``[layer, kv_head, tokens, width]`` by shift, of tokens at positions from 0 on."""
    rng = torch.Generator().manual_seed(seed)
    width = len(rotary.order)
    plain = torch.randn(layers, 2, 100, width, generator=rng, dtype=torch.float64)
    plain *= torch.logspace(-1, 0.5, width)
    keys = {}
    for shift in (0, *SHIFTS[:7]):
        turned = rotary.turn(plain, torch.arange(shift, shift + 100))
        keys[shift] = turned + noise * torch.randn(turned.shape, generator=rng) * turned.square().mean().sqrt()
    return keys


def frequencies(turned, base=10000.0):
    return base ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned)


def order_of(width, turned, neighbours):
    pairs = torch.arange(width).view(-1, 2) if neighbours else torch.arange(turned).view(2, -1).T
    rest = torch.arange(turned, width) if not neighbours else torch.arange(0)
    half = len(rest) // 2
    return torch.cat([pairs[:, 0], rest[:half], pairs[:, 1], rest[half:]])


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize(
    ("width", "turned", "neighbours"), [(16, 16, False), (16, 4, False), (20, 8, False), (16, 16, True)]
)
def test_frequencies_and_pairs_are_found(width, turned, neighbours, noise):
    speeds = torch.zeros(width // 2, dtype=torch.float64)
    speeds[: turned // 2] = frequencies(turned)
    truth = Rotary(speeds, order_of(width, turned, neighbours))
    found, order = rotary_of(moved(truth, noise=noise))
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    positions = torch.arange(8000, 8050)
    for layer in found:
        got = Rotary(layer, order).turn(x, positions)
        torch.testing.assert_close(got, truth.turn(x, positions), rtol=0, atol=1e-6 if noise == 0 else 0.1)


def test_keys_that_do_not_turn_have_no_frequencies():
    still = moved(Rotary(torch.zeros(8, dtype=torch.float64), torch.arange(16)))
    assert not rotary_of(still)[0].any()
    other = {shift: moved(Rotary(frequencies(16), torch.arange(16)), seed=shift)[0] for shift in (0, 1, 4, 16)}
    assert not rotary_of(other)[0].any(), "other keys at every shift"
