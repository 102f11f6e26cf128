"""Trading the losses at several lengths against each other."""

import itertools

import numpy as np
import pytest

from moa_search.errors import ConfigError, SolverError
from moa_search.search.solver.exact import solve_exact
from moa_search.search.solver.problem import Problem, Solution
from moa_search.search.trade_off import EXTREME, default_steps, epsilon_cells, knee, lattice, trade_off


class TestLattice:
    def test_equal_weights_first_and_once(self):
        assert lattice(2, 2) == [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0)]
        assert lattice(3, 3)[0] == (1 / 3, 1 / 3, 1 / 3)
        assert len(set(lattice(3, 3))) == len(lattice(3, 3)) == 10

    @pytest.mark.parametrize(("lengths", "steps"), [(1, 6), (2, 1), (2, 6), (3, 4), (4, 6)])
    def test_extremes_are_in_and_weights_add_up(self, lengths, steps):
        points = lattice(lengths, steps)
        for extreme in np.eye(lengths):
            assert tuple(extreme) in points
        assert all(sum(point) == pytest.approx(1) for point in points)

    def test_default_steps_are_no_more_solves_than_anyone_would_validate(self):
        counts = [len(lattice(lengths, default_steps(lengths))) for lengths in range(1, 9)]
        assert counts[1:5] == [7, 16, 11, 16], "and equal weights, where the lattice hasn't got them"
        assert max(counts) <= 16

    def test_one_length_has_one_point(self):
        assert lattice(1, 6) == [(1.0,)]

    def test_more_points_than_anyone_would_solve_for_are_refused(self):
        assert len(lattice(8, 5)) == 793
        for lengths, steps in ((2, 10_000), (8, 20)):
            with pytest.raises(ConfigError, match=f"{steps} steps over {lengths} lengths"):
                lattice(lengths, steps)


@pytest.fixture
def conflict():
    """Losses at two lengths that want different rules, and a budget that can't please both."""
    rng = np.random.default_rng(0)
    share = np.linspace(0.1, 1, 12)
    short, long = (rng.lognormal(size=(20, 1)) * (1 - share) ** rng.uniform(0.5, 4, (20, 1)) for _ in range(2))
    costs = np.array([(100 * share).astype(int)])
    return [short, 1e-6 * long], Problem(short, costs, np.array([700]))


def dominated(points):
    return [
        (a, b)
        for a, b in itertools.permutations(points, 2)
        if all(x <= y for x, y in zip(a.losses, b.losses, strict=True))
    ]


def test_first_weighs_lengths_equally_and_last_ones_are_extreme(conflict):
    losses, problem = conflict
    points = trade_off(losses, problem, solve_exact, steps=6)
    assert len(points) > 3
    units = [loss.max(1).sum() for loss in losses]
    equal = [w * unit for w, unit in zip(points[0].weights, units, strict=True)]
    assert equal[0] == pytest.approx(equal[1])
    for index, loss in enumerate(losses):
        best = solve_exact(Problem(loss, problem.costs, problem.limits)).objective
        assert min(point.losses[index] for point in points) == pytest.approx(best, rel=20 * EXTREME)
        assert points[0].losses[index] > best


def test_every_plan_keeps_the_budget_and_none_is_needless(conflict):
    losses, problem = conflict
    points = trade_off(losses, problem, solve_exact, steps=8)
    assert all(problem.is_feasible(point.solution.choice) for point in points)
    assert dominated(points) == []


def test_objective_is_the_weighted_sum_of_the_losses(conflict):
    losses, problem = conflict
    heads = np.arange(20)
    for point in trade_off(losses, problem, solve_exact, steps=4):
        assert sum(point.weights) == pytest.approx(1)
        values = [loss[heads, point.solution.choice].sum() for loss in losses]
        assert point.losses == pytest.approx(values)
        assert point.solution.objective == pytest.approx(np.dot(point.weights, values))
        assert point.solution.bound <= point.solution.objective
        assert point.solution.gap < 1e-5


def test_a_better_plan_of_another_weighting_is_used(conflict):
    """A solver that stops early for equal weights must not leave the chosen plan beaten by its neighbours."""
    losses, problem = conflict
    calls = itertools.count()

    def lazy_at_first(asked):
        if next(calls) == 0:
            return Solution(np.zeros(20, dtype=np.int64), asked.loss(np.zeros(20, dtype=np.int64)), 0.0)
        return solve_exact(asked)

    points = trade_off(losses, problem, lazy_at_first, steps=3)
    equal = trade_off(losses, problem, solve_exact, steps=3)[0]
    assert points[0].weights == equal.weights
    assert points[0].solution.bound == 0  # what was proven for these weights, no more
    assert np.dot(equal.weights, points[0].losses) < 1.1 * equal.solution.objective
    assert dominated(points) == []


def test_one_length_gives_one_plan_in_the_losses_own_unit(conflict):
    losses, problem = conflict
    (point,) = trade_off(losses[:1], problem, solve_exact, steps=6)
    assert point.weights == (1.0,)
    assert point.solution.objective == pytest.approx(solve_exact(problem).objective)


def test_a_length_without_any_loss_leaves_the_others_alone(conflict):
    losses, problem = conflict
    alone = solve_exact(problem).objective
    for order in ([losses[0], 0 * losses[0]], [0 * losses[0], losses[0]]):
        points = trade_off(order, problem, solve_exact, steps=3)
        assert max(points[0].losses) == pytest.approx(alone)
        assert len(points) == 1


def test_nothing_lost_anywhere(conflict):
    losses, problem = conflict
    (point,) = trade_off([0 * loss for loss in losses], problem, solve_exact, steps=3)
    assert point.losses == (0, 0)
    assert point.solution.gap == 0


def test_progress_counts_every_solve(conflict, bars):
    losses, problem = conflict
    trade_off(losses, problem, solve_exact, steps=3)
    assert bars["Searching"][-1] == (5, 5)


class TestKnee:
    def test_farthest_below_the_line_between_the_ends(self):
        assert knee([0.1, 0.2, 0.5, 1.0], [10.0, 3.0, 2.0, 0.0]) == 1

    @pytest.mark.parametrize(
        ("costs", "losses"),
        [([1, 2], [3, 1]), ([1, 2, 3], [3, 2, 1]), ([1, 2, 3], [1, 1, 1]), ([1, 2, 3], [3, 2.9, 0])],
    )
    def test_there_may_be_none(self, costs, losses):
        assert knee(costs, losses) is None


def solve_roughly(problem):
    return solve_exact(problem, gap=1e-4)


class TestEpsilonCells:
    def test_finds_trade_offs_that_keep_their_bounds(self, conflict):
        losses, problem = conflict
        points = epsilon_cells(losses, problem, solve_roughly, cells=4)
        assert len(points) > 3
        assert dominated(points) == []
        assert all(problem.is_feasible(point.solution.choice) for point in points)
        for index, loss in enumerate(losses):
            best = solve_exact(Problem(loss, problem.costs, problem.limits)).objective
            assert min(point.losses[index] for point in points) == pytest.approx(best, rel=1e-3)

    def test_first_has_the_smallest_sum_in_units_of_the_worst(self, conflict):
        losses, problem = conflict
        units = [loss.max(1).sum() for loss in losses]
        points = epsilon_cells(losses, problem, solve_roughly, cells=4)
        totals = [sum(value / unit for value, unit in zip(point.losses, units, strict=True)) for point in points]
        assert totals[0] == min(totals)
        weighted = epsilon_cells(losses, problem, solve_roughly, cells=4, weights=(1.0, 0.0))
        assert weighted[0].losses[0] == min(point.losses[0] for point in points)

    def test_says_when_nothing_is_found_at_all(self, conflict):
        def out_of_time(problem):
            raise SolverError("no time")

        losses, problem = conflict
        with pytest.raises(SolverError, match="no time"):
            epsilon_cells(losses, problem, out_of_time, cells=4)

    def test_reports_every_cell_also_those_without_a_choice(self, conflict, bars):
        def unbounded_only(problem):
            if problem.head_costs is not None:
                raise SolverError("none")
            return solve_roughly(problem)

        losses, problem = conflict
        epsilon_cells(losses, problem, unbounded_only, cells=4)
        assert bars["Searching"][:8] == [(done, 8) for done in range(1, 9)]

    def test_one_length_has_one_point(self, conflict):
        losses, problem = conflict
        (point,) = epsilon_cells(losses[:1], problem, solve_exact, cells=4)
        assert point.solution.objective == pytest.approx(solve_exact(problem).objective)
