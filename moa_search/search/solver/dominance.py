"""Choices that another beats in every respect: cheaper in every budget and no worse in loss."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moa_search.search.solver.problem import Problem

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


def undominated(problem: Problem) -> Booleans:
    """``[head, rule]``: allowed, and no other allowed rule makes it useless.

    One does that is no worse in loss and in every cost, and better in one of them, or earlier.

    Per head that is whether the least loss among all that costs no more is a rule's own. The least losses spread from
    cheap to dear along the covers of the costs' partial order, few for each, for all heads at once.

    Where costs depend on the head every allowed rule is kept.
    """
    if problem.head_costs is not None:
        return problem.choices
    losses = np.where(problem.choices, problem.losses, np.inf)
    kept = np.zeros(losses.shape, dtype=bool)
    # Rules of equal costs share a column; of each head's best there, the earliest stands for them.
    costs, column = np.unique(problem.costs.T, axis=0, return_inverse=True)  # [column, budget], lexicographic
    members = np.split(np.argsort(column, kind="stable"), np.bincount(column).cumsum()[:-1])
    heads = np.arange(len(losses))
    least: list[Doubles] = []  # by column, [head]: the smallest loss of what costs no more
    for rules, covers in zip(members, _covers(costs), strict=True):
        first = rules[losses[:, rules].argmin(1)]
        own, below = losses[heads, first], np.full(len(losses), np.inf)
        for cover in covers:
            below = np.minimum(below, least[cover])
        better = own < below
        kept[heads[better], first[better]] = True
        least.append(np.minimum(own, below))
    return kept


def _covers(costs: Integers) -> list[list[int]]:
    """For each of different costs ``[column, budget]`` in lexicographic order, the largest ones that are no dearer.

    All that is no dearer than a column is no dearer than one of its covers. Sets of columns are bits of whole numbers.
    """
    no_dearer = np.ones((len(costs), len(costs)), dtype=bool)  # [column, other]
    for row in costs.T:
        no_dearer &= row[None, :] <= row[:, None]
    sets = [int.from_bytes(bits.tobytes(), "little") for bits in np.packbits(no_dearer, axis=1, bitorder="little")]
    covers = []
    for index, others in enumerate(sets):
        left, found = others & ~(1 << index), []
        while left:  # in lexicographic order the last one left is below none that is left
            found.append(left.bit_length() - 1)
            left &= ~sets[found[-1]]
        covers.append(found)
    return covers
