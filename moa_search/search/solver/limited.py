"""The exact choice where a layer may use at most one or two different rules."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import numpy.typing as npt

from moa_search.search.solver.assignment import MARGIN, Found, assign
from moa_search.search.solver.highs import INFINITY, Entries, solve_integer_program
from moa_search.search.solver.problem import Problem
from moa_search.search.solver.relaxation import Column, Relaxation, relax
from moa_search.search.solver.rule_sets import best_assignment, pair_values

PERTURBATIONS = (0.03, 0.1, 0.3)
"""Relative changes of the prices that give further assignments to combine."""

MOST_COLUMNS = 1_500
CORE_PAIRS = 200_000
"""(head, rule) pairs up to which the compact integer program is tried."""

WHOLE = 3_000
"""The same, up to which that program is the whole problem, whatever the limit."""

MOST_NODES = 4_000
SETS_GAP = 0.3
"""Part of the gap that choosing within given sets of rules may use up."""

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


def assign_limited(problem: Problem, losses: Doubles, *, gap: float, deadline: float) -> Found:
    """The best choice with at most ``problem.rule_limit`` different rules in each layer.

    The relaxation's bound already knows the limit: its columns are whole layers. The sets of rules of its
    heaviest columns, then those of the best combination of all columns, are filled exactly; a compact integer
    program over what reduced costs can't exclude has the last word.

    Args:
        problem: Costs, limits and the limit of rules.
        losses: ``[head, rule]``, scaled; inf for what isn't to be chosen.
        gap: Relative gap to stop at.
        deadline: ``time.monotonic()`` at which to stop with what is known.
    """
    if problem.rule_limit == 1:
        return _one_each(problem, losses, gap, deadline)
    # Prices without the limit are near, and their pricing is fast where enumerating pairs is slow.
    unlimited = relax(dataclasses.replace(problem, rules_per_layer=None), losses, deadline)
    relaxation = relax(problem, losses, deadline, unlimited.prices)
    if not np.isfinite(relaxation.bound):  # no set of so few rules serves all heads of some layer
        return Found(None, np.inf, -np.inf, relaxation.prices)
    # Stage 1: each layer keeps the rules of its heaviest column, and heads choose freely among those.
    found = Found(None, np.inf, relaxation.bound, relaxation.prices)
    found = _fill(problem, losses, _heaviest(problem, relaxation), found, gap, deadline)
    # Stage 2: the same with the rules of the best combination of columns, of which there are more at nearby prices.
    if not found.good(gap) and time.monotonic() < deadline:
        columns = _more_columns(problem, losses, relaxation, deadline)
        combined = _combine(problem, losses, relaxation, columns, deadline)
        if combined is not None:
            found = _fill(problem, losses, combined, found, gap, deadline)
    # At high prices every layer takes what costs least: feasible if anything is.
    if found.choice is None:
        cheap = best_assignment(_by_layer(problem, problem.priced(losses, 1e3 * relaxation.prices)), problem.rule_limit)
        found = _fill(problem, losses, cheap, found, gap, deadline)
    # Stage 3: an integer program that chooses rules and heads together, over all pairs or over those still possible.
    if not found.good(gap) and time.monotonic() < deadline:
        if int(np.isfinite(losses).sum()) <= WHOLE:
            found = _whole(problem, losses, found, gap, deadline)
        elif found.choice is not None:
            found = _compact(problem, losses, found, gap, deadline)
    return found


def _whole(problem: Problem, losses: Doubles, found: Found, gap: float, deadline: float) -> Found:
    """Binaries for all (head, rule) and (layer, rule): what a small problem is left to."""
    head, rule = np.nonzero(np.isfinite(losses))
    layer_of, rule_of = np.nonzero(np.ones((problem.layers, losses.shape[1]), dtype=bool))
    for margin in (0.0, MARGIN):
        outcome = _solve_compact(problem, losses, (head, rule), (layer_of, rule_of), found, gap, deadline, margin)
        if outcome is None:
            return found
        choice, bound = outcome
        if problem.is_feasible(choice):
            objective = float(losses[np.arange(len(choice)), choice].sum())
            best = Found(choice, objective, found.bound, found.prices) if objective < found.objective else found
            bound = max(found.bound, bound if margin == 0 else -np.inf)
            return dataclasses.replace(best, bound=min(bound, best.objective))
    return found


def _one_each(problem: Problem, losses: Doubles, gap: float, deadline: float) -> Found:
    """One rule for all heads of a layer: layers take the place of heads."""
    size = problem.heads_per_layer
    # [layer, rule]: what a layer loses, and takes of each budget, with one rule for all its heads
    whole = Problem(_by_layer(problem, losses).sum(1), size * problem.costs, problem.limits)
    if problem.head_costs is not None:
        # [budget, head, rule] -> [budget, layer, rule]
        by_layer = problem.head_costs.reshape(-1, problem.layers, size, losses.shape[1]).sum(2)
        whole = dataclasses.replace(whole, head_costs=by_layer, head_limits=problem.head_limits)
    if not np.isfinite(whole.losses).any(1).all():  # a layer whose heads share no possible rule
        return Found(None, np.inf, -np.inf, np.zeros(len(problem.all_limits)))
    found = assign(whole, whole.losses, gap=gap, deadline=deadline)
    choice = None if found.choice is None else np.repeat(found.choice, size)
    return dataclasses.replace(found, choice=choice)


def _by_layer(problem: Problem, values: Doubles) -> Doubles:
    """``[layers * heads, rule] -> [layer, head, rule]``."""
    return values.reshape(problem.layers, problem.heads_per_layer, -1)


def _heaviest(problem: Problem, relaxation: Relaxation) -> Integers:
    """Each layer's assignment with the largest share in the relaxation, ``[layer, head]``."""
    best: dict[int, Column] = {}
    for column in relaxation.columns:
        if column.layer not in best or column.share > best[column.layer].share:
            best[column.layer] = column
    return np.stack([best[layer].choice for layer in range(problem.layers)])


def _fill(problem: Problem, losses: Doubles, assignment: Integers, found: Found, gap: float, deadline: float) -> Found:
    """The best choice within each layer's rules in ``assignment``, if that beats ``found``."""
    within = np.zeros((problem.layers, losses.shape[1]), dtype=bool)  # [layer, rule]
    for layer, rules in enumerate(assignment):
        within[layer, rules] = True
    # With losses of inf outside of each layer's rules, a problem without a limit of rules is left.
    masked = np.where(np.repeat(within, problem.heads_per_layer, axis=0), losses, np.inf)
    free = dataclasses.replace(problem, rules_per_layer=None)
    filled = assign(free, masked, gap=SETS_GAP * gap, deadline=deadline, start=found.prices)
    if filled.choice is None or filled.objective >= found.objective:
        return found
    return Found(filled.choice, filled.objective, min(found.bound, filled.objective), found.prices)


def _more_columns(problem: Problem, losses: Doubles, relaxation: Relaxation, deadline: float) -> list[Column]:
    """The relaxation's columns, and the best assignments at prices near its own."""
    rng = np.random.default_rng(0)  # the same perturbations on every machine
    columns = list(relaxation.columns)
    known = {(column.layer, column.choice.tobytes()) for column in columns}
    for size in PERTURBATIONS * 3:
        if time.monotonic() > deadline:
            break
        prices = relaxation.prices * np.exp(rng.normal(0, size, len(relaxation.prices)))
        priced = _by_layer(problem, problem.priced(losses, prices))
        for layer, choice in enumerate(best_assignment(priced, problem.rule_limit)):
            if (layer, choice.tobytes()) not in known:
                known.add((layer, choice.tobytes()))
                columns.append(Column(layer, choice, 0.0))
    return columns


def _combine(
    problem: Problem, losses: Doubles, relaxation: Relaxation, columns: list[Column], deadline: float
) -> Integers | None:
    """One column per layer, the best feasible combination; None if there is none."""
    # What each column loses, [column], and takes of each budget, [column, budget]
    layer = np.array([column.layer for column in columns])
    heads = layer[:, None] * problem.heads_per_layer + np.arange(problem.heads_per_layer)
    choice = np.stack([column.choice for column in columns])
    lost = losses[heads, choice].sum(1)
    used = problem.cost(heads.ravel(), choice.ravel()).reshape(*choice.shape, -1).sum(1)
    # Reduced costs at the relaxation's prices: the columns nearest to their layer's best are worth combining.
    reduced = lost + used @ relaxation.prices
    lowest = np.full(problem.layers, np.inf)
    np.minimum.at(lowest, layer, reduced)
    kept = np.sort(np.argsort(reduced - lowest[layer], kind="stable")[: max(MOST_COLUMNS, 6 * problem.layers)])
    # One binary per column. Rows: budgets, in shares of their largest entry, then "exactly one" per layer.
    budgets, count = used.shape[1], len(kept)
    unit = np.maximum(used.max(0), 1)
    entries = Entries(
        np.tile(np.arange(budgets), count), np.repeat(np.arange(count), budgets), (used[kept] / unit).ravel()
    ) + Entries(budgets + layer[kept], np.arange(count), np.ones(count))
    outcome = solve_integer_program(
        lost[kept],
        entries,
        np.concatenate([np.full(budgets, -INFINITY), np.ones(problem.layers)]),
        np.concatenate([problem.all_limits / unit, np.ones(problem.layers)]),
        relative_gap=1e-4,
        absolute_gap=0.0,
        time_limit_s=max(0.3 * (deadline - time.monotonic()), 0.0),
        max_nodes=MOST_NODES // 4,
    )
    if outcome.values is None:
        return None
    # Ascending values, so that each layer ends with its largest one; rounding is HiGHS's, not ours.
    combined = np.zeros((problem.layers, problem.heads_per_layer), dtype=np.int64)
    for index in np.argsort(outcome.values, kind="stable"):
        combined[layer[kept[index]]] = choice[kept[index]]
    return combined


def _compact(problem: Problem, losses: Doubles, found: Found, gap: float, deadline: float) -> Found:
    """Binaries for (head, rule) and (layer, rule), without the pairs of rules that can't be in a better choice.

    At the relaxation's prices a layer with rules a and b costs at least V(a, b), and the layers together at least
    the bound; a pair of rules that costs more above its layer's best than the choice known loses above the bound
    is out.
    """
    heads_per_layer, layers = problem.heads_per_layer, problem.layers
    # What a better choice may lose above the bound, all layers together, hence also each layer alone
    room = (found.objective - found.bound) * (1 + 1e-9)
    priced = _by_layer(problem, problem.priced(losses, found.prices))
    rule_in = np.zeros((layers, losses.shape[1]), dtype=bool)  # [layer, rule]
    pair_in = np.zeros((layers, heads_per_layer, losses.shape[1]), dtype=bool)  # [layer, head, rule]
    for layer in range(layers):
        values = pair_values(priced[layer])  # [rule, rule]
        slack = values.min() + room - values  # what is left of the room when the layer has rules a and b
        for a, b in zip(*np.nonzero(np.triu(slack >= 0)), strict=True):
            base = np.minimum(priced[layer][:, a], priced[layer][:, b])  # [head]
            # A head may take the dearer of the two as long as that fits into the slack.
            for rule in (a, b):
                pair_in[layer, :, rule] |= priced[layer][:, rule] - base <= slack[a, b]
            rule_in[layer, [a, b]] = True
    head, rule = np.nonzero(pair_in.reshape(-1, losses.shape[1]) & np.isfinite(losses))
    if len(head) > CORE_PAIRS:
        return found
    layer_of, rule_of = np.nonzero(rule_in)
    outcome = _solve_compact(problem, losses, (head, rule), (layer_of, rule_of), found, gap, deadline)
    if outcome is None:
        return found
    choice, bound = outcome
    objective = float(losses[np.arange(len(choice)), choice].sum())
    bound = max(bound, found.bound)
    if not problem.is_feasible(choice) or objective > found.objective:
        return dataclasses.replace(found, bound=min(bound, found.objective))
    return Found(choice, objective, min(bound, objective), found.prices)


def _solve_compact(
    problem: Problem,
    losses: Doubles,
    pairs: tuple[Integers, Integers],
    uses: tuple[Integers, Integers],
    found: Found,
    gap: float,
    deadline: float,
    margin: float = 0.0,
) -> tuple[Integers, float] | None:
    """Rows: budgets, one rule per head, (head, rule) only with its (layer, rule), and the limit per layer."""
    # Columns: one binary x per (head, rule), [count]; then one binary y per (layer, rule).
    (head, rule), (layer_of, rule_of) = pairs, uses
    count, heads, layers = len(head), len(losses), problem.layers
    use = np.full((layers, losses.shape[1]), -1)  # [layer, rule] -> column of y
    use[layer_of, rule_of] = count + np.arange(len(layer_of))
    costs = problem.cost(head, rule)  # [count, budget]
    budgets, unit = costs.shape[1], np.maximum(costs.max(0), 1)
    # Rows: budgets; sum of x = 1 per head; x - y <= 0 per (head, rule); sum of y <= limit per layer.
    first_link, first_layer = budgets + heads, budgets + heads + count
    every = np.arange(count)
    entries = (
        Entries(np.tile(np.arange(budgets), count), np.repeat(every, budgets), (costs / unit).ravel())
        + Entries(budgets + head, every, np.ones(count))
        + Entries(first_link + every, every, np.ones(count))
        + Entries(first_link + every, use[head // problem.heads_per_layer, rule], -np.ones(count))
        + Entries(first_layer + layer_of, count + np.arange(len(layer_of)), np.ones(len(layer_of)))
    )
    lower = np.concatenate([np.full(budgets, -INFINITY), np.ones(heads), np.full(count + layers, -INFINITY)])
    upper = np.concatenate(
        [
            problem.all_limits / unit - margin * np.maximum(1, problem.all_limits / unit),
            np.ones(heads),
            np.zeros(count),
            np.full(layers, float(problem.rule_limit or 0)),
        ]
    )
    # The choice known is a start that HiGHS can only improve on.
    start = None
    if found.choice is not None and margin == 0:
        start = np.zeros(count + len(layer_of))
        start[:count] = found.choice[head] == rule
        start[use[np.arange(heads) // problem.heads_per_layer, found.choice]] = 1
    outcome = solve_integer_program(
        np.concatenate([losses[head, rule], np.zeros(len(layer_of))]),
        entries,
        lower,
        upper,
        relative_gap=0.0,
        absolute_gap=0.9 * gap * abs(found.bound),
        time_limit_s=max(deadline - time.monotonic(), 0.0),
        max_nodes=MOST_NODES,
        start=start,
    )
    if outcome.values is None:
        return None
    # Ascending values, so that each head ends with the rule of its largest one
    choice = np.zeros(heads, dtype=np.int64)
    order = np.argsort(outcome.values[:count], kind="stable")
    choice[head[order]] = rule[order]
    return choice, outcome.bound
