"""Moving padding out of the way: to one end of the new tokens, sample by sample."""

from __future__ import annotations

import torch


def real_first(states: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, tokens, dim]`` with each sample's real tokens in front: columns become positions."""
    return reordered(states, (~valid).long().argsort(dim=1, stable=True))


def reordered(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, tokens, dim]`` with each sample's tokens in the order ``[batch, tokens]``."""
    return states.gather(2, order[:, None, :, None].expand_as(states))
