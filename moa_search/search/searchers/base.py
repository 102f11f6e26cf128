"""The one interface of all searchers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from moa_search.search.rules import rule_grid
from moa_search.search.space import SearchSpace
from moa_search.search.trade_off import FrontPoint
from moa_search.spans import SpanRule


class Searcher(ABC):
    """Chooses a rule for every KV head of a `SearchSpace`. Override `choose`.

    Attributes:
        name: On the command line and in plans.
        criterion: The criterion it always decides by; None for the one that the user chose.
        uses_losses: Whether losses decide at all.
        proves: Whether its solutions state a bound.
        looks_ahead: Whether twice the longest profiled length counts too, by extrapolated losses, unless the user
            names the lengths to predict. Baselines choose by what was measured, as their authors do.
        takes_tiers: Whether it chooses bits, too; others store 16.
        takes_groups: Whether it can give groups of heads one rule each.
    """

    name: ClassVar[str]
    criterion: ClassVar[str | None] = None
    uses_losses: ClassVar[bool] = True
    proves: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    takes_tiers: ClassVar[bool] = False
    takes_groups: ClassVar[bool] = False

    def rules(self, lengths: Sequence[int], *, sink: int, block: int) -> list[SpanRule]:
        """Candidate rules for these profiled and budgeted lengths in tokens; by default `rule_grid`."""
        return rule_grid(lengths, sink=sink, block=block)

    @abstractmethod
    def choose(self, space: SearchSpace) -> list[FrontPoint]:
        """Choices that keep every budget; the first is the one to use.

        Raises:
            BudgetInfeasibleError: Nothing that this searcher can choose keeps the budgets.
        """
