"""Choices, what they cost, and how good they are proven to be."""

import numpy as np
import pytest

from moa_search.search.solver.problem import Problem, Solution


def test_feasible_to_the_last_token():
    problem = Problem(np.zeros((2, 2)), np.array([[3, 4]]), np.array([7]))
    assert problem.is_feasible(np.array([0, 1]))
    assert not problem.is_feasible(np.array([1, 1]))


class TestFeasibility:
    def test_rules_that_are_not_allowed(self):
        allowed = np.array([[True, False], [True, True]])
        problem = Problem(np.zeros((2, 2)), np.array([[3, 4]]), np.array([8]), allowed=allowed)
        assert problem.is_feasible(np.array([0, 1]))
        assert not problem.is_feasible(np.array([1, 0]))

    def test_too_many_rules_in_a_layer(self):
        problem = Problem(np.zeros((4, 3)), np.array([[1, 1, 1]]), np.array([9]), heads_per_layer=2, rules_per_layer=1)
        assert problem.is_feasible(np.array([0, 0, 2, 2]))
        assert not problem.is_feasible(np.array([0, 0, 2, 1]))

    def test_costs_of_heads_count_beside_those_of_rules(self):
        head_costs = np.array([[[1, 2], [5, 9]]])
        problem = Problem(
            np.zeros((2, 2)), np.array([[3, 4]]), np.array([8]), head_costs=head_costs, head_limits=np.array([7])
        )
        assert problem.used(np.array([1, 0])).tolist() == [7, 7]
        assert problem.is_feasible(np.array([1, 0]))
        assert not problem.is_feasible(np.array([0, 1]))
        priced = problem.priced(np.ones((2, 2)), np.array([10.0, 100.0]))
        assert priced.tolist() == [[131, 241], [531, 941]]


def test_a_limit_of_rules_that_limits_nothing():
    many = Problem(np.zeros((4, 3)), np.zeros((0, 3), int), np.zeros(0, int), heads_per_layer=2, rules_per_layer=2)
    assert many.rule_limit is None


@pytest.mark.parametrize(
    ("objective", "bound", "gap"),
    [(2.0, 1.0, 0.5), (0.0, 0.0, 0.0), (0.3, 0.1 + 0.2, 0.0), (0.1 + 0.2, 0.3, 0.0)],
)
def test_gap_is_relative_and_ignores_rounding(objective, bound, gap):
    assert Solution(np.array([0]), objective, bound).gap == gap
