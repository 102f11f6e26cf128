"""Rotary embedding as transformers' models do it, and its undoing."""

import math

import pytest
import torch
from moa_kernels.codes import Codec, Rotary, Transform
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as neighbours
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

WIDTH = 16
FREQUENCIES = 10000.0 ** (-torch.arange(WIDTH // 2, dtype=torch.float64) / (WIDTH // 2))


def turned_by_transformers(x, positions, apply):
    angles = positions.double()[:, None] * FREQUENCIES
    both = torch.cat([angles, angles], -1)[None]
    return apply(x[None], x[None], both.cos(), both.sin())[0][0]


@pytest.mark.parametrize(
    ("apply", "order"),
    [(halves, torch.arange(WIDTH)), (neighbours, torch.arange(WIDTH).view(-1, 2).T.flatten())],
)
def test_turns_are_those_of_transformers(apply, order):
    x = torch.randn(3, 20, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.arange(1000, 1020)
    rotary = Rotary(FREQUENCIES, order)
    expected = turned_by_transformers(x, positions, apply)
    torch.testing.assert_close(rotary.turn(x, positions), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(rotary.turn(expected, positions, back=True), x, rtol=0, atol=1e-11)


def test_keys_of_one_direction_keep_few_bits_error_at_every_position():
    """What all keys have in common before rotary embedding costs nothing, however far they are turned."""
    rng = torch.Generator().manual_seed(1)
    rotary = Rotary(FREQUENCIES, torch.arange(WIDTH))
    mean = 20 * torch.randn(1, WIDTH, generator=rng, dtype=torch.float64)
    before = mean[:, None] + torch.randn(1, 400, WIDTH, generator=rng, dtype=torch.float64)
    known = Codec(2, Transform.balanced(torch.eye(WIDTH)[None], mean, rotary))
    for first in (0, 100_000):
        positions = torch.arange(first, first + 400)
        keys = rotary.turn(before, positions)
        error = (known.seen(keys, positions, sink=0) - keys).square().mean()
        assert error < 0.2  # of a variance of 1
    fixed = Codec(2, Transform.balanced(torch.eye(WIDTH)[None], keys.mean(1)))
    assert (fixed.seen(keys, positions, sink=0) - keys).square().mean() > 10 * error


@pytest.mark.parametrize(
    ("frequencies", "order", "says"),
    [
        (torch.zeros(3), torch.arange(8), "frequencies for pairs among 8 channels"),
        (torch.full((4,), math.nan), torch.arange(8), "must be finite"),
        (torch.zeros(4), torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]), "every channel once"),
    ],
)
def test_what_turns_nothing_is_refused(frequencies, order, says):
    with pytest.raises(ValueError, match=says):
        Rotary(frequencies, order)
