"""The exact solver: one rule per head under integer budgets, with proof. It knows nothing of profiles or plans."""

from moa_search.search.solver.exact import solve_exact
from moa_search.search.solver.problem import Problem, Solution

__all__ = ["Problem", "Solution", "solve_exact"]
