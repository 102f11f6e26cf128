"""Cache layers by number: a compiled graph takes tensors, and a layer that lays its memory out anew is none."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

if TYPE_CHECKING:
    from moa_search.runtime.layer import MoACacheLayer

_LAYERS: WeakValueDictionary[int, MoACacheLayer] = WeakValueDictionary()
_NUMBERS = itertools.count()


def ticket_for(layer: MoACacheLayer) -> torch.Tensor:
    """A scalar on the CPU that stands for a layer in a graph, whatever cache the graph runs on next."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    with torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


def layer_of(ticket: torch.Tensor) -> MoACacheLayer:
    """The layer that a ticket stands for."""
    return _LAYERS[int(ticket)]
