"""The choice of one rule per KV head under integer upper bounds on what the rules cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Problem:
    """Minimise ``sum_h losses[h, r_h]`` subject to ``sum_h costs[b, r_h] <= limits[b]`` for every budget.

    Attributes:
        losses: ``[head, rule]``, non-negative, heads in layer-major order; those of native layers are no choices
            and not among them.
        costs: What a rule costs any head in each budget's unit, ``[budget, rule]``, integers.
        limits: What all heads together may cost, ``[budget]``, integers.
        heads_per_layer: Heads of one layer.
        rules_per_layer: Most different rules in one layer; None for any number.
        allowed: ``[head, rule]``, False where a head may not have a rule; None allows all.
        head_costs: Further budgets whose costs depend on the head, ``[budget, head, rule]``, integers.
        head_limits: Their limits, ``[budget]``.
    """

    losses: Doubles
    costs: Integers
    limits: Integers
    heads_per_layer: int = 1
    rules_per_layer: int | None = None
    allowed: Booleans | None = None
    head_costs: Integers | None = None
    head_limits: Integers | None = None

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.losses) // self.heads_per_layer

    @property
    def rule_limit(self) -> int | None:
        """``rules_per_layer`` where it limits anything."""
        most = self.rules_per_layer
        return None if most is None or most >= min(self.heads_per_layer, self.losses.shape[1]) else most

    @property
    def choices(self) -> Booleans:
        """``[head, rule]``: what may be chosen."""
        return np.ones(self.losses.shape, dtype=bool) if self.allowed is None else self.allowed

    @property
    def all_limits(self) -> Integers:
        """``limits``, then ``head_limits``."""
        return self.limits if self.head_limits is None else np.concatenate([self.limits, self.head_limits])

    def loss(self, choice: Integers) -> float:
        """Total loss of giving head h the rule ``choice[h]``."""
        return float(self.losses[np.arange(len(choice)), choice].sum())

    def cost(self, head: Integers, rule: Integers) -> Integers:
        """``[pair, budget]``: what giving ``head[i]`` the rule ``rule[i]`` costs in every budget."""
        shared = self.costs[:, rule].T
        return shared if self.head_costs is None else np.hstack([shared, self.head_costs[:, head, rule].T])

    def used(self, choice: Integers) -> Integers:
        """What ``choice`` costs in all, ``[budget]``."""
        return np.asarray(self.cost(np.arange(len(choice)), choice).sum(0))

    def priced(self, losses: Doubles, prices: Doubles) -> Doubles:
        """``losses`` plus costs at ``prices``, ``[head, rule]``."""
        shared = len(self.limits)
        total = losses + prices[:shared] @ self.costs
        for price, costs in zip(prices[shared:], () if self.head_costs is None else self.head_costs, strict=True):
            total += price * costs
        return np.asarray(total)

    def is_feasible(self, choice: Integers) -> bool:
        """Whether ``choice`` keeps every budget, in exact integers, and the layers' limit of rules."""
        if self.allowed is not None and not self.allowed[np.arange(len(choice)), choice].all():
            return False
        if self.rule_limit is not None:
            by_layer = choice.reshape(self.layers, -1)
            if max(len(set(rules)) for rules in by_layer.tolist()) > self.rule_limit:
                return False
        return bool((self.used(choice) <= self.all_limits).all())


@dataclass(frozen=True)
class Solution:
    """A feasible choice with proof of its quality.

    Attributes:
        choice: Rule index per head, ``[head]``.
        objective: Total loss.
        bound: Proven lower bound of the total loss.
    """

    choice: Integers
    objective: float
    bound: float

    @property
    def gap(self) -> float:
        """``(objective - bound) / objective``; 0 for a lossless plan and below the rounding of a sum of floats."""
        gap = (self.objective - self.bound) / self.objective if self.objective > 0 else 0.0
        return gap if gap > 1e-12 else 0.0
