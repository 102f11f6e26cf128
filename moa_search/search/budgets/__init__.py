"""Budgets in the user's units, as exact integer rows over the rules."""

from moa_search.search.budgets.hardware import Hardware
from moa_search.search.budgets.rows import BudgetRow, budget_rows, used
from moa_search.search.budgets.specs import BudgetSpec

__all__ = ["BudgetRow", "BudgetSpec", "Hardware", "budget_rows", "used"]
