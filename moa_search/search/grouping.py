"""Plans whose KV heads fall into equally large groups of one rule each, as a paged cache holds them.

vLLM keeps a block table per group of heads, and its groups are equally large (docs/vllm.md). A free plan's groups hold
more than their heads attend; here the rules are chosen with the groups, so that what is held is what is attended.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from moa_search.search.solver import Problem, Solution, solve_exact

MOST_ROUNDS = 100
"""Rounds from one start: far more than are needed, each loses less than the one before."""

SMALL = 1e-12
"""Share of the losses below which a change is rounding."""

Solve = Callable[[Problem], Solution]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def equal_groups(heads: int, most: int) -> int:
    """The largest number of equally large groups up to ``most``."""
    return max(count for count in range(1, min(most, heads) + 1) if heads % count == 0)


def solve_in_groups(problem: Problem, groups: int, solve: Solve = solve_exact) -> Solution:
    """A choice in which equally large groups of heads have one rule each.

    From several starts it goes back and forth between two exact steps: the best rules for given groups, by ``solve``
    on one head per group, and the best groups for given rules. Groups of one size cost the same whoever is in them, so
    both keep the budgets, and neither loses more than before. What comes out isn't proven best among grouped choices;
    the bound is that of the free choice.

    Args:
        problem: Budgets cost every head alike.
        groups: Most groups; as many are made as divide the heads evenly.
        solve: Solves a problem without groups.

    Raises:
        BudgetInfeasibleError: No such choice keeps the budgets.
        SolverError: No plan found in time.
    """
    assert problem.head_costs is None
    assert problem.rule_limit is None
    free = solve(problem)
    heads = len(problem.losses)
    count = equal_groups(heads, groups)
    losses = np.where(problem.choices, problem.losses, np.inf)
    found = [_improved(problem, losses, labels, count, solve) for labels in _starts(problem, free, count)]
    best = min((choice for choice in found if choice is not None), key=problem.loss, default=None)
    if best is None:
        # Some head's floor rules out every rule that its group could have; one rule for all is the last resort.
        best = solve(dataclasses.replace(problem, losses=_joined(losses, np.zeros(heads, dtype=np.int64), 1))).choice
    return Solution(best, problem.loss(best), free.bound)


def _starts(problem: Problem, free: Solution, count: int) -> Iterable[Integers]:
    """Groups of like heads by what the free plan gives them, and by what short spans cost them."""
    size = len(problem.losses) // count
    spent = problem.costs[:, free.choice] / np.maximum(problem.costs.max(1), 1)[:, None]
    for key in (spent.mean(0), *spent, problem.losses.sum(1), np.sqrt(problem.losses).sum(1)):
        labels = np.empty(len(key), dtype=np.int64)
        labels[np.argsort(-key, kind="stable")] = np.arange(len(key)) // size
        yield labels


def _improved(problem: Problem, losses: Doubles, labels: Integers, count: int, solve: Solve) -> Integers | None:
    """Alternate until nothing gets better; None if the groups' heads have no rule in common."""
    best: Integers | None = None
    for _ in range(MOST_ROUNDS):
        joined = _joined(losses, labels, count)
        if not np.isfinite(joined).any(1).all():
            return best
        size = len(labels) // count
        together = Problem(
            losses=np.where(np.isfinite(joined), joined, 0.0),
            costs=problem.costs * size,
            limits=problem.limits,
            allowed=np.isfinite(joined),
        )
        rules = solve(together).choice
        choice = rules[labels]
        if best is not None and problem.loss(choice) >= problem.loss(best) - SMALL * float(problem.loss(best)):
            return best
        best = choice
        labels = balanced(losses[:, rules], labels)
    return best


def _joined(losses: Doubles, labels: Integers, count: int) -> Doubles:
    """``[group, rule]``: what a group loses under each rule, inf where a head of it may not have it."""
    return np.stack([losses[labels == group].sum(0) for group in range(count)])


def balanced(losses: Doubles, labels: Integers) -> Integers:
    """The best groups of unchanged sizes, by cancelling negative cycles: exact, since no such cycle is left.

    Args:
        losses: ``[head, group]``, what a head loses in a group; inf where it may not be.
        labels: Its group, ``[head]``.
    """
    labels, count = labels.copy(), losses.shape[1]
    while True:
        # The cheapest head to move from group a to group b.
        own = losses[np.arange(len(labels)), labels]
        moves, movers = np.full((count, count), np.inf), np.zeros((count, count), dtype=np.int64)
        for group in range(count):
            mine = np.flatnonzero(labels == group)
            change = losses[mine] - own[mine, None]
            moves[group], movers[group] = change.min(0), mine[change.argmin(0)]
        np.fill_diagonal(moves, np.inf)
        cycle = _negative_cycle(moves, SMALL * float(own.sum()))
        if cycle is None:
            return labels
        for source, target in cycle:
            labels[movers[source, target]] = target


def _negative_cycle(moves: Doubles, tolerance: float) -> list[tuple[int, int]] | None:
    """Groups along a cycle whose moves add up to less than ``-tolerance``, as pairs; None if there is none."""
    count = len(moves)
    distance, before = np.zeros(count), np.full(count, -1, dtype=np.int64)
    for _ in range(count):
        reached = distance[:, None] + moves
        nearest = reached.min(0)
        shorter = nearest < distance - tolerance
        if not shorter.any():
            return None
        before[shorter], distance = reached.argmin(0)[shorter], np.where(shorter, nearest, distance)
    node = int(np.flatnonzero(shorter)[0])
    for _ in range(count):
        node = int(before[node])
    path = [node]
    while (previous := int(before[path[-1]])) != node:
        path.append(previous)
    path.append(node)
    path.reverse()
    cycle = list(itertools.pairwise(path))
    return cycle if sum(float(moves[pair]) for pair in cycle) < -tolerance else None
