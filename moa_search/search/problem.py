"""The choice of one rule per KV head under upper bounds on kept tokens, in exact integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moa_search.errors import BudgetInfeasibleError, ConfigError
from moa_search.formats.plan import Budget
from moa_search.spans import SpanRule, span

__all__ = ["Problem", "Solution", "make_budgets"]


@dataclass(frozen=True)
class Problem:
    """Minimise ``sum_h losses[h, r_h]`` subject to ``sum_h costs[b, r_h] <= limits[b]`` for every budget.

    Attributes:
        losses: ``[head, rule]``, non-negative; heads of native layers are no choices and not among them.
        costs: Tokens kept by a rule at each budget's length, ``[budget, rule]``, integers.
        limits: Tokens that all heads together may keep, ``[budget]``, integers.
    """

    losses: npt.NDArray[np.float64]
    costs: npt.NDArray[np.int64]
    limits: npt.NDArray[np.int64]

    @classmethod
    def build(
        cls,
        losses: npt.NDArray[np.float64],
        rules: Sequence[SpanRule],
        budgets: Sequence[Budget],
        *,
        min_span: int,
    ) -> Problem:
        """The problem of choosing among ``rules`` under ``budgets``.

        Raises:
            BudgetInfeasibleError: Even the smallest span breaks a budget; the message names it.
        """
        heads = len(losses)
        costs = np.array([[span(b.length, rule, min_span) for rule in rules] for b in budgets], dtype=np.int64)
        limits = np.array([int((b.density or 0) * b.length * heads + 1e-9) for b in budgets], dtype=np.int64)
        for budget, row, limit in zip(budgets, costs, limits, strict=True):
            if int(row.min()) * heads > limit:
                raise BudgetInfeasibleError(
                    f"a density of {budget.density:g} at {budget.length} tokens can't be met: the smallest span, "
                    f"{row.min()} tokens, already keeps {row.min() / budget.length:.3g}"
                )
        return cls(losses, costs, limits)

    def loss(self, choice: npt.NDArray[np.int64]) -> float:
        """Total loss of giving head h the rule ``choice[h]``."""
        return float(self.losses[np.arange(len(choice)), choice].sum())

    def is_feasible(self, choice: npt.NDArray[np.int64]) -> bool:
        """Whether ``choice`` keeps every budget, in exact integers."""
        return bool((self.costs[:, choice].sum(axis=1) <= self.limits).all())


@dataclass(frozen=True)
class Solution:
    """A feasible choice with proof of its quality.

    Attributes:
        choice: Rule index per head, ``[head]``.
        objective: Total loss.
        bound: Proven lower bound of the total loss.
    """

    choice: npt.NDArray[np.int64]
    objective: float
    bound: float

    @property
    def gap(self) -> float:
        """``(objective - bound) / objective``; 0 for a lossless plan and below the rounding of a sum of floats."""
        gap = (self.objective - self.bound) / self.objective if self.objective > 0 else 0.0
        return gap if gap > 1e-12 else 0.0


def make_budgets(densities: Sequence[float], lengths: Sequence[int]) -> list[Budget]:
    """Budgets from one density for all lengths, or one for each.

    Raises:
        ConfigError: A density isn't in (0, 1], or their number fits neither.
    """
    for density in densities:
        if not 0 < density <= 1:
            raise ConfigError(f"density {density:g} is out of range; it must be over 0 and at most 1")
    if len(densities) not in (1, len(lengths)):
        raise ConfigError(f"{len(densities)} densities for {len(lengths)} lengths; give one, or one per length")
    each = list(densities) * (len(lengths) if len(densities) == 1 else 1)
    return [Budget(length=length, density=density) for length, density in zip(lengths, each, strict=True)]
