"""Caches of single requests joined into a batch's, and samples taken out of a batch's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from moa_search.errors import UnsupportedInputError
from moa_search.runtime.coded import CodedCacheLayer
from moa_search.runtime.layer import MoACacheLayer
from moa_search.runtime.state import LayerState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moa_search.runtime.cache import MoACache


def growing_layers(cache: MoACache, what: str) -> list[MoACacheLayer]:
    """The layers of a cache whose states can be taken apart.

    Args:
        cache: The cache.
        what: Is to be done with it, for errors.

    Raises:
        UnsupportedInputError: It isn't such a cache, or holds no whole passes.
    """
    for layer in cache.layers:
        if type(layer) not in (MoACacheLayer, CodedCacheLayer):
            kind = "of fixed size" if layer.is_compileable and isinstance(layer, MoACacheLayer) else _name(layer)
            raise UnsupportedInputError(
                f"a cache {kind} can't be {what}; fill one that grows, of plain attention layers"
            )
    if len({layer.get_seq_length() for layer in cache.layers}) > 1 or any(layer.is_staged for layer in cache.layers):
        raise UnsupportedInputError(
            f"a cache can't be {what} whose last forward pass failed or was interrupted midway; reset() it"
        )
    if not cache.layers[0].is_initialized:
        raise UnsupportedInputError(f"an empty cache can't be {what}; fill it first")
    return list(cache.layers)


def _name(layer: Any) -> str:
    return f"with a {type(layer).__name__}"


def merge(caches: Sequence[MoACache]) -> MoACache:
    """As `MoACache.merge`."""
    if not caches:
        raise UnsupportedInputError("no caches to merge")
    if len({cache.fingerprint for cache in caches}) > 1:
        raise UnsupportedInputError("caches under different plans can't be merged")
    by_layer = list(zip(*(growing_layers(cache, "merged") for cache in caches), strict=True))
    return type(caches[0]).of_layers([_merged(layers) for layers in by_layer], caches[0].fingerprint)


def take(cache: MoACache, samples: Sequence[int]) -> MoACache:
    """As `MoACache.take`."""
    layers = growing_layers(cache, "taken apart")
    batch = len(layers[0].lens)
    if not samples:
        raise UnsupportedInputError("no samples to take")
    for sample in samples:
        if not 0 <= sample < batch:
            raise UnsupportedInputError(f"the cache has samples 0 to {batch - 1}, not {sample}")
    return type(cache).of_layers([_taken(layer, samples) for layer in layers], cache.fingerprint)


def _merged(layers: Sequence[MoACacheLayer]) -> MoACacheLayer:
    """One layer with the samples of several."""
    states = [layer.state() for layer in layers]
    reserved, slack = max(state.reserved for state in states), max(state.slack for state in states)
    rollbacks = [state.rollback for state in states if state.rollback is not None]
    laid_out = []
    for layer, state in zip(layers, states, strict=True):
        twin = _twin(layer, state)
        twin.lay_out(reserved, slack)
        laid_out.append(twin.state().tensors)
    for name, first in laid_out[0].items():
        for other in (tensors[name] for tensors in laid_out):
            if (other.dtype, other.device, other.shape[2:]) != (first.dtype, first.device, first.shape[2:]):
                held = " and ".join(f"{tensor.dtype} on {tensor.device}" for tensor in (first, other))
                raise UnsupportedInputError(f"caches that hold {held} can't be merged")
    joined = {name: torch.cat([tensors[name] for tensors in laid_out]) for name in laid_out[0]}
    return _twin(layers[0], _unpadded(LayerState(joined, reserved, slack, max(rollbacks, default=None), 0, 0)))


def _taken(layer: MoACacheLayer, samples: Sequence[int]) -> MoACacheLayer:
    """A layer with some samples of another, in no more memory than they need."""
    state = layer.state()
    chosen = {name: tensor[list(samples)] for name, tensor in state.tensors.items()}
    twin = _twin(layer, _unpadded(replace(state, tensors=chosen)))
    twin.lay_out(twin.rules.roomy_length(twin.longest), state.slack)
    return twin


def _twin(layer: MoACacheLayer, state: LayerState) -> MoACacheLayer:
    twin = type(layer)(layer.rules)
    twin.restore(state)
    return twin


def _unpadded(state: LayerState) -> LayerState:
    """The same without padding but what samples of different lengths have on their left."""
    lens = state.tensors["lens"]
    return replace(state, seen=int(lens.max()), unpadded=int(lens.min()))
