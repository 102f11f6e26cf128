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

STILL = 1e-12
"""Radians per position up to which a frequency is the rounding of sums, and no turn at any position."""


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
    squares = {shift: _products(moved, moved).diagonal(dim1=-2, dim2=-1).sum(-1) for shift, moved in keys.items()}
    products = {shift: _products(keys[0], moved) for shift, moved in keys.items() if shift}

    def left(order: Tensor) -> Tensor:
        """Largest share over shifts that turns of these pairs don't explain, ``[layer]``."""
        explained = [
            2 * _turned(product, order).abs().sum(-1) / (squares[0] + squares[shift])
            for shift, product in products.items()
        ]
        return 1 - torch.stack(explained).amin(0)

    best = min(orders, key=lambda order: float(left(order).sum()))
    frequencies = torch.zeros(len(keys[0]), width // 2, dtype=torch.float64)
    for shift, product in products.items():
        phase = _turned(product, best).angle()
        whole = torch.round((frequencies * shift - phase) / (2 * torch.pi))
        frequencies = (phase + 2 * torch.pi * whole) / shift
    turns = (left(best) < LEAST_LEFT)[:, None] & (frequencies.abs() > STILL)
    return torch.where(turns, frequencies, 0.0), best


def _halves(width: int, turned: int) -> Tensor:
    """Pairs (i, i + turned / 2) among the first ``turned`` channels, as in Llama and GPT-NeoX; others in any pairs."""
    first, rest = torch.arange(turned), torch.arange(turned, width)
    half, other = turned // 2, (width - turned) // 2
    return torch.cat([first[:half], rest[:other], first[half:], rest[other:]])


def _neighbours(width: int) -> Tensor:
    """Pairs (2i, 2i + 1), as in GPT-J and GLM."""
    return torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])


def _products(still: Tensor, moved: Tensor) -> Tensor:
    """``sum x_i x'_j`` over heads and tokens, ``[layer, width, width]``: enough for pairs of any channels."""
    one, two = (x.double().flatten(1, 2) for x in (still, moved))  # [layer, kv_heads * tokens, width]
    return one.mT @ two


def _turned(product: Tensor, order: Tensor) -> Tensor:
    """``sum conj(z) z'`` of each pair as a complex number, ``[layer, width / 2]``, of what `_products` gives."""
    first, second = order.chunk(2)
    real = product[:, first, first] + product[:, second, second]
    return torch.complex(real, product[:, first, second] - product[:, second, first])
