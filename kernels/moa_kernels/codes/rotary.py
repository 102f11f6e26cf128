"""Rotary embedding, and its undoing, as codes of keys need it.

What a model's keys have in common (their mean, how they spread) is fixed before rotary embedding (RoFormer, arXiv
2104.09864) and turns with the position after it. So keys are turned back before they are coded, and forward again when
they are decoded: at equal bits the error of scores is a fraction of what it is without (KVQuant, arXiv 2401.18079).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Turns of pairs of channels, in proportion to the position. Any factor on keys is no part of it.

    Attributes:
        frequencies: Radians per position of each pair, ``[width / 2]``, float64; zeros turn nothing.
        order: Channels, the pairs' first ones, then their second ones, ``[width]``, int64.
    """

    frequencies: Tensor
    order: Tensor

    def __post_init__(self) -> None:
        """Check shapes.

        Raises:
            ValueError: They don't fit together, a frequency isn't finite, or ``order`` isn't one of all channels.
        """
        width = len(self.order)
        if self.frequencies.shape != (width // 2,) or width % 2:
            raise ValueError(f"{tuple(self.frequencies.shape)} frequencies for pairs among {width} channels")
        if not self.frequencies.isfinite().all():
            raise ValueError("frequencies must be finite")
        if not torch.equal(self.order.sort().values, torch.arange(width, device=self.order.device)):
            raise ValueError("order must name every channel once")

    @cached_property
    def places(self) -> Tensor:
        """Where each channel stands in ``order``, ``[width]``."""
        return self.order.argsort()

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float64 ``[..., tokens, width / 2]``.

        Args:
            positions: Integers ``[..., tokens]``.
        """
        angles = positions.double()[..., None] * self.frequencies
        return angles.cos(), angles.sin()

    def turn(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """``x`` as keys at their positions, float64.

        Args:
            x: ``[..., tokens, width]``.
            positions: Integers that broadcast to ``[..., tokens]``.
            back: Undo it instead.
        """
        cos, sin = self.angles(positions)
        if back:
            sin = -sin
        first, second = x.double()[..., self.order].chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return turned[..., self.places]

    def to(self, device: torch.device | str) -> Rotary:
        """The same on another device."""
        return Rotary(self.frequencies.to(device), self.order.to(device))
