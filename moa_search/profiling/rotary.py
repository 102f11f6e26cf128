"""A model's rotary embedding, measured: how keys turn when the same tokens stand at later positions.

Attention under rotary embedding depends on distances only, so tokens moved along by some positions have the same keys
as before, turned. The angle of each pair of channels at growing shifts gives its frequency, whatever the model calls
its settings, and what is left tells whether keys are turned at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SHIFTS = tuple(4**power for power in range(9))
"""Tokens that a sample is moved along by. Each angle must be known to within half a turn from the one before."""

TOKENS = 256
"""Of a sample that is moved along."""

LEAST_LEFT = 0.05
"""Share of a layer's keys, squared, that no turn explains, above which they count as not turned."""


def rotary_of(keys: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Frequencies and order of `moa_kernels.codes.Rotary`, of every layer.

    Args:
        keys: The same tokens' keys by shift in tokens, 0 and ascending others, each
            ``[layer, kv_head, tokens, width]``.

    Returns:
        Frequencies, float64 ``[layer, width / 2]``, zeros where keys aren't turned; and the order, int64 ``[width]``.
    """
    width = keys[0].shape[-1]
    orders = [_halves(width, turned) for turned in range(width, 1, -2)] + [_neighbours(width)]
    left, order = min(((_left(keys, order), order) for order in orders), key=lambda found: float(found[0].sum()))
    phases = {shift: turned.angle() for shift, turned, _ in _turns(keys, order)}
    frequencies = torch.zeros(len(keys[0]), width // 2, dtype=torch.float64)
    for shift, phase in phases.items():
        whole = torch.round((frequencies * shift - phase) / (2 * torch.pi))
        frequencies = (phase + 2 * torch.pi * whole) / shift
    return torch.where((left < LEAST_LEFT)[:, None], frequencies, 0.0), order


def _halves(width: int, turned: int) -> Tensor:
    """Pairs (i, i + turned / 2) among the first ``turned`` channels, as in Llama and GPT-NeoX; others in any pairs."""
    first, rest = torch.arange(turned), torch.arange(turned, width)
    half, other = turned // 2, (width - turned) // 2
    return torch.cat([first[:half], rest[:other], first[half:], rest[other:]])


def _neighbours(width: int) -> Tensor:
    """Pairs (2i, 2i + 1), as in GPT-J and GLM."""
    return torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])


def _turns(keys: Mapping[int, Tensor], order: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """By shift: ``sum conj(z) z'`` of each pair as a complex number, ``[layer, width / 2]``, and both's mean square."""

    def pairs(x: Tensor) -> Tensor:
        first, second = x.double()[..., order].chunk(2, -1)
        return torch.complex(first, second).flatten(1, 2)  # [layer, kv_heads * tokens, width / 2]

    still = pairs(keys[0])
    found = []
    for shift, moved in keys.items():
        if shift:
            z = pairs(moved)
            square = (still.abs().square().sum(1) + z.abs().square().sum(1)) / 2
            found.append((shift, (still.conj() * z).sum(1), square))
    return found


def _left(keys: Mapping[int, Tensor], order: Tensor) -> Tensor:
    """Largest share over shifts that turns of these pairs don't explain, ``[layer]``."""
    shares = [1 - turned.abs().sum(-1) / square.sum(-1) for _, turned, square in _turns(keys, order)]
    return torch.stack(shares).amax(0)
