"""The exact solver against exhaustive search, and what it does when time runs out."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from moa_search.errors import SolverError
from moa_search.search.solver.assignment import Found
from moa_search.search.solver.exact import RELATIVE_GAP, solve_exact
from moa_search.search.solver.problem import Problem

SCALES = {
    "ordinary": lambda rng, shape: rng.lognormal(size=shape),
    "tied": lambda rng, shape: rng.integers(0, 3, shape).astype(float),
    "lossless": lambda rng, shape: np.zeros(shape),
    "tiny": lambda rng, shape: rng.lognormal(size=shape) * 1e-9,
    "huge": lambda rng, shape: rng.lognormal(size=shape) * 1e6,
    "of every size": lambda rng, shape: 10.0 ** rng.uniform(-9, 6, shape),
    "mostly zero": lambda rng, shape: rng.lognormal(size=shape) * (rng.random(shape) < 0.3),
}
CASES = 60


def random_problem(rng, losses):
    """Two to five heads, three to five rules, one to three budgets; feasible, from tight to slack."""
    heads, rules, budgets = rng.integers(2, 6), rng.integers(3, 6), rng.integers(1, 4)
    costs = rng.integers(1, 50, (budgets, rules))
    some_choice = costs[:, rng.integers(0, rules, heads)].sum(1)
    limits = some_choice + rng.integers(0, 2, budgets) * rng.integers(0, 60, budgets)
    return Problem(losses(rng, (heads, rules)), costs, limits)


def best_by_exhaustion(problem):
    heads, rules = problem.losses.shape
    choices = (np.array(choice) for choice in itertools.product(range(rules), repeat=heads))
    return min(problem.loss(choice) for choice in choices if problem.is_feasible(choice))


@pytest.mark.parametrize("scale", SCALES)
def test_finds_the_optimum_and_a_true_bound(scale):
    rng = np.random.default_rng(list(SCALES).index(scale))
    for _ in range(CASES):
        problem = random_problem(rng, SCALES[scale])
        optimum, solution = best_by_exhaustion(problem), solve_exact(problem)
        assert (problem.costs[:, solution.choice].sum(1) <= problem.limits).all()
        assert solution.objective == problem.loss(solution.choice)
        assert solution.objective <= optimum * (1 + RELATIVE_GAP)
        assert solution.bound <= optimum * (1 + 1e-12)
        assert 0 <= solution.gap <= RELATIVE_GAP


def test_takes_the_cheapest_of_lossless_rules():
    problem = Problem(np.zeros((2, 3)), np.array([[5, 3, 4]]), np.array([100]))
    solution = solve_exact(problem)
    assert solution.choice.tolist() == [1, 1]
    assert (solution.objective, solution.bound, solution.gap) == (0, 0, 0)


def lopsided():
    """Losses of millionths beside losses of a billion."""
    losses = np.array([[1e9, 3e-6, 1e-6], [1e9, 2e-6, 1e-6], [1e9, 7e-6, 2e-6]])
    return Problem(losses, np.array([[1, 2, 3]]), np.array([8]))


def test_an_optimum_far_below_the_largest_losses():
    """One rule that nobody would choose must not drown the others in the solver's tolerances."""
    solution = solve_exact(lopsided())
    assert solution.choice.tolist() == [2, 1, 2]
    assert solution.bound == pytest.approx(5e-6, rel=1e-6)


def model_sized(heads=90, rules=120):
    """Losses that fall with the span, each head at its own pace, under three budgets."""
    rng = np.random.default_rng(1)
    share = np.sort(rng.uniform(0.05, 1, rules))
    share[-1] = 1
    pace = rng.uniform(1, 12, (heads, 1))
    falling = rng.lognormal(size=(heads, 1)) * np.exp(-pace * share) * (1 - share)
    costs = np.array([np.minimum(n, n * share * rng.uniform(0.8, 1.2, rules)).astype(int) for n in (512, 1024, 4096)])
    limits = np.array([n * heads // 4 for n in (512, 1024, 4096)])
    return Problem(falling * rng.lognormal(sigma=0.1, size=(heads, rules)), costs, limits)


def test_a_model_of_ninety_heads_is_solved_to_the_gap():
    problem = model_sized()
    solution = solve_exact(problem, time_limit_s=60)
    assert problem.is_feasible(solution.choice)
    assert 0 < solution.bound <= solution.objective
    assert solution.gap <= RELATIVE_GAP


def test_no_time_gives_a_plan_with_its_gap():
    problem = model_sized()
    hasty, patient = solve_exact(problem, time_limit_s=1e-6), solve_exact(problem)
    assert problem.is_feasible(hasty.choice)
    assert hasty.bound <= patient.bound <= patient.objective <= hasty.objective
    assert RELATIVE_GAP < hasty.gap < 0.5


def test_nothing_feasible_is_an_error():
    problem = Problem(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[2, 3], [3, 2]]), np.array([4, 4]))
    with pytest.raises(SolverError, match=r"no plan that keeps all budgets was found within 60 s"):
        solve_exact(problem)


def test_out_of_time_in_a_later_round_keeps_the_plan_with_its_gap(monkeypatch):
    """The first round's plan is returned although the round that would refine it never runs."""
    from moa_search.search.solver import exact

    rounds = []

    def first_round_only(problem, losses, gap, deadline):
        rounds.append(deadline)
        if len(rounds) == 1:
            return solve(problem, losses, gap, deadline)
        return Found(None, np.inf, 0.0, np.zeros(len(problem.limits)))

    solve = exact._solve
    monkeypatch.setattr(exact, "_solve", first_round_only)
    problem = lopsided()
    solution = solve_exact(problem)
    assert len(rounds) == 2
    assert problem.is_feasible(solution.choice)
    assert solution.bound <= best_by_exhaustion(problem) <= solution.objective


def test_costs_that_differ_in_their_last_digits():
    """Below HiGHS's tolerance of a millionth of a row, unless what all rules cost is taken off first."""
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        losses, few = rng.lognormal(size=(6, 4)), rng.integers(0, 20, (3, 4))
        per_head = rng.integers(0, 20, (1, 6, 4))
        some = rng.integers(0, 4, 6)
        problem = Problem(
            losses,
            10**9 + few,
            6 * 10**9 + few[:, some].sum(1),
            head_costs=10**9 + per_head,
            head_limits=6 * 10**9 + per_head[:, np.arange(6), some].sum(1),
        )
        optimum, solution = best_by_exhaustion(problem), solve_exact(problem)
        assert problem.is_feasible(solution.choice)
        assert optimum * (1 - 1e-12) <= solution.objective <= optimum * (1 + RELATIVE_GAP)
        assert solution.bound <= optimum * (1 + 1e-12)


def test_rules_that_break_a_budget_alone_don_t_hide_the_others():
    """Costs of 10^12 beside a limit of 100: a row in shares of its largest cost would be all tolerance."""
    rng = np.random.default_rng(1)
    for _ in range(CASES):
        losses, costs = rng.lognormal(size=(6, 4)), rng.integers(0, 30, (2, 4))
        costs[:, 3], losses[:, 3] = 10**12, 0.0
        problem = Problem(losses, costs, costs[:, rng.integers(0, 3, 6)].sum(1))
        optimum, solution = best_by_exhaustion(problem), solve_exact(problem)
        assert solution.objective <= optimum * (1 + RELATIVE_GAP)
        assert solution.bound <= optimum * (1 + 1e-12)


@pytest.mark.parametrize("most", [1, 2])
def test_heads_of_a_layer_that_so_few_rules_cannot_serve_are_told(most):
    """Each head may have one rule alone, another than all others."""
    heads = most + 1
    problem = Problem(
        np.ones((heads, heads + 1)),
        np.arange(heads + 1)[None],
        np.array([99]),
        heads,
        most,
        np.eye(heads, heads + 1) > 0,
    )
    with pytest.raises(SolverError, match="no plan"):
        solve_exact(problem)


def test_a_head_without_an_affordable_rule_is_told():
    problem = Problem(np.ones((2, 1)), np.array([[1]]), np.array([5]), head_costs=np.array([[[7], [1]]]))
    short = Problem(**{**vars(problem), "head_limits": np.array([7])})
    with pytest.raises(SolverError, match="no plan"):
        solve_exact(short)


SOLVE_AND_PRINT = """
import numpy as np
from moa_search.search.solver.exact import solve_exact
from moa_search.search.solver.problem import Problem
problem = Problem(np.array([[2.0, 1.0], [5.0, 1.0]]), np.array([[1, 2]]), np.array([3]))
print("before")
print(solve_exact(problem).choice.tolist())
"""


def test_the_solver_prints_nothing():
    """In a process of its own, since HiGHS greets once per process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SOLVE_AND_PRINT], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("before\n[0, 1]\n", "")


def test_equal_problems_get_equal_answers():
    first, second = solve_exact(model_sized(40, 30)), solve_exact(model_sized(40, 30))
    assert first.choice.tolist() == second.choice.tolist()
    assert first.bound == second.bound
