"""What is left out beside every other choice, against a look at all pairs."""

import dataclasses
import time

import numpy as np
import pytest

from moa_search.search.solver.dominance import undominated
from moa_search.search.solver.exact import LARGE_PAIRS, MANY_GAP, MANY_RULES, solve_exact
from moa_search.search.solver.problem import Problem


def beats(problem, head, a, b):
    """Whether rule a makes rule b useless for a head."""
    if not problem.choices[head, a]:
        return False
    mine, other = [(problem.losses[head, rule], *problem.costs[:, rule].tolist()) for rule in (a, b)]
    return all(x <= y for x, y in zip(mine, other, strict=True)) and (mine != other or a < b)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_rule_stays_where_no_other_beats_it(allowed):
    rng = np.random.default_rng(int(allowed))
    for _ in range(60):
        heads, rules, budgets = rng.integers(1, 4), rng.integers(1, 16), rng.integers(1, 4)
        losses, costs = rng.integers(0, 4, (heads, rules)).astype(float), rng.integers(0, 4, (budgets, rules))
        some = rng.random((heads, rules)) < 0.7 if allowed else None
        problem = Problem(losses, costs, np.full(budgets, 99), allowed=some)
        kept = undominated(problem)
        for head, rule in np.ndindex(heads, rules):
            beaten = any(beats(problem, head, other, rule) for other in range(rules))
            assert kept[head, rule] == (problem.choices[head, rule] and not beaten)


def test_costs_of_heads_keep_every_allowed_rule():
    allowed = np.array([[True, False], [True, True]])
    problem = Problem(
        np.zeros((2, 2)),
        np.array([[1, 1]]),
        np.array([9]),
        allowed=allowed,
        head_costs=np.array([[[1, 2], [2, 1]]]),
        head_limits=np.array([9]),
    )
    assert (undominated(problem) == allowed).all()


def in_bytes(heads=90, spans=120, tiers=16):
    """Losses that fall with the span and with the bits, costs in bytes at three lengths."""
    rng = np.random.default_rng(0)
    share = np.sort(rng.uniform(0.05, 1, spans))
    share[-1] = 1
    bits = 16 - np.arange(tiers)
    lengths = np.array([512, 1024, 4096])
    kept = np.minimum(lengths[:, None], lengths[:, None] * share * rng.uniform(0.8, 1.2, spans)).astype(int)
    costs = (kept[:, None, :] * bits[None, :, None]).reshape(3, -1)
    pace, coarse = rng.uniform(1, 12, (heads, 1, 1)), rng.uniform(0.3, 1.2, (heads, 1, 1))
    lost = np.exp(-pace * share) * (1 - share) + np.exp(-coarse * bits[:, None])
    losses = rng.lognormal(size=(heads, 1)) * (lost * rng.lognormal(sigma=0.1, size=lost.shape)).reshape(heads, -1)
    return Problem(losses, costs, np.array([n * heads * 2 for n in lengths]))


def test_spans_times_bits_are_solved_to_their_gap_in_a_moment():
    problem = in_bytes()
    assert problem.losses.shape[1] > MANY_RULES
    assert problem.losses.size > LARGE_PAIRS
    began = time.thread_time()
    solution = solve_exact(problem)
    assert time.thread_time() - began < 5  # over 7 s where all pairs of options are compared, for each head
    assert problem.is_feasible(solution.choice)
    assert 0 < solution.bound <= solution.objective
    assert solution.gap <= MANY_GAP
    closer = solve_exact(problem, gap=1e-4)
    assert solution.bound <= closer.objective
    assert closer.bound <= solution.objective


def test_a_limit_of_rules_per_layer_may_need_what_others_beat():
    """Two heads that may share one rule only: the best shared one is beaten for each of them."""
    losses = np.array([[0.0, 1.0, 9.0], [9.0, 1.0, 0.0]])
    problem = Problem(losses, np.array([[1, 1, 1]]), np.array([1]), heads_per_layer=2)
    assert undominated(problem).tolist() == [[True, False, False], [False, False, True]]
    limited = dataclasses.replace(problem, rules_per_layer=1, limits=np.array([2]))
    assert solve_exact(limited).choice.tolist() == [1, 1]
