"""Budgets in whole tokens."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_search.errors import BudgetInfeasibleError, ConfigError
from moa_search.formats.plan import Budget
from moa_search.search.problem import Problem, Solution, make_budgets
from moa_search.spans import DENSE, SpanRule

RULES = [SpanRule(48, 0), SpanRule(0, 128), DENSE]


def build(budgets, heads=2):
    return Problem.build(np.zeros((heads, len(RULES))), RULES, budgets, min_span=48)


def test_costs_are_spans_at_each_budgets_length():
    problem = build([Budget(length=100, density=1), Budget(length=1000, density=0.5)])
    assert problem.costs.tolist() == [[48, 50, 100], [48, 500, 1000]]
    assert problem.limits.tolist() == [200, 1000]


@given(st.integers(1, 999), st.integers(48, 10**5), st.integers(1, 2000))
def test_limits_are_exact_whatever_the_decimals(thousandths, length, heads):
    """0.29 * 100 is 28.999999999999996 in floating point, but 29 tokens may stay."""
    density = thousandths / 1000
    allowed = int(Fraction(thousandths, 1000) * length * heads)
    if allowed < 48 * heads:
        with pytest.raises(BudgetInfeasibleError):
            build([Budget(length=length, density=density)], heads)
    else:
        assert build([Budget(length=length, density=density)], heads).limits.tolist() == [allowed]


def test_the_budget_that_cannot_be_met_is_named():
    with pytest.raises(BudgetInfeasibleError, match=r"density of 0\.04 at 1000 tokens.*48 tokens.*0\.048"):
        build([Budget(length=2000, density=0.5), Budget(length=1000, density=0.04)])


def test_feasible_to_the_last_token():
    problem = Problem(np.zeros((2, 2)), np.array([[3, 4]]), np.array([7]))
    assert problem.is_feasible(np.array([0, 1]))
    assert not problem.is_feasible(np.array([1, 1]))


class TestBudgets:
    def test_one_density_holds_at_every_length(self):
        assert make_budgets([0.5], [512, 1024]) == [Budget(length=512, density=0.5), Budget(length=1024, density=0.5)]

    def test_one_density_per_length(self):
        assert make_budgets([0.5, 0.25], [512, 1024])[1] == Budget(length=1024, density=0.25)

    @pytest.mark.parametrize("density", [0, -0.5, 1.01, float("nan"), float("inf")])
    def test_density_out_of_range(self, density):
        with pytest.raises(ConfigError, match="out of range"):
            make_budgets([density], [512])

    @pytest.mark.parametrize("densities", [[], [0.5, 0.5], [0.5] * 4])
    def test_numbers_that_fit_neither(self, densities):
        with pytest.raises(ConfigError, match=f"{len(densities)} densities for 3 lengths"):
            make_budgets(densities, [1, 2, 3])


@pytest.mark.parametrize(
    ("objective", "bound", "gap"),
    [(2.0, 1.0, 0.5), (0.0, 0.0, 0.0), (0.3, 0.1 + 0.2, 0.0), (0.1 + 0.2, 0.3, 0.0)],
)
def test_gap_is_relative_and_ignores_rounding(objective, bound, gap):
    assert Solution(np.array([0]), objective, bound).gap == gap
