"""The best few rules for a layer whose heads may use only so many different ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

CHUNK_BYTES = 2**20
"""Work on as many layers at once as the processor's cache holds."""


def best_assignment(priced: Doubles, most: int | None) -> Integers:
    """The cheapest rule for every head, with at most ``most`` different rules in each layer.

    Exact, by enumeration of single rules or of pairs.

    Args:
        priced: ``[layer, head, rule]``; inf where a head can't have a rule.
        most: 1, 2, or None for any number.

    Returns:
        Rule per head, ``[layer, head]``.
    """
    if most is None:
        return np.asarray(priced.argmin(2))
    if most == 1:
        best = priced.sum(1).argmin(1)[:, None]
    elif most == 2:
        best = _best_pairs(priced)
    else:
        raise ValueError(f"{most} rules per layer; at most 2 can be enumerated")
    # best [layer, most]: rules of each layer; within [layer, head, most]: their prices
    within = np.take_along_axis(priced, best[:, None, :], axis=2)
    return np.take_along_axis(best, within.argmin(2), axis=1)


def pair_values(layer: Doubles) -> Doubles:
    """``[rule, rule]``: what a layer costs with two rules, each head taking the better one; symmetric.

    Args:
        layer: Prices, ``[head, rule]``.
    """
    rules = layer.shape[1]
    values = np.empty((rules, rules))
    for first in range(rules):
        values[first, first:] = values[first:, first] = np.minimum(layer[:, first:], layer[:, first, None]).sum(0)
    return values


def _best_pairs(priced: Doubles) -> Integers:
    """``[layer, 2]``."""
    layers, heads, rules = priced.shape
    at_once = max(1, CHUNK_BYTES // (8 * heads * rules))
    pairs = np.zeros((layers, 2), dtype=np.int64)  # stays so where no two rules serve all heads
    for top in range(0, layers, at_once):
        # Layers last: the innermost loop then runs over contiguous memory.
        table = np.ascontiguousarray(priced[top : top + at_once].transpose(1, 2, 0))  # [head, rule, layer]
        best = np.full(table.shape[2], np.inf)
        for first in range(rules):
            sums = np.minimum(table[:, first:], table[:, first, None]).sum(0)  # [second rule, layer]
            second = sums.argmin(0)
            value = sums[second, np.arange(len(best))]  # [layer]
            better = value < best
            best[better] = value[better]
            pairs[top : top + at_once][better] = np.stack([np.full(len(best), first), first + second], 1)[better]
    return pairs
