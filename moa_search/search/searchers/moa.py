"""The search that MoA itself does (arXiv 2406.14909, section 4 and appendix B), on an open solver."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moa_search.search.searchers.base import Searcher
from moa_search.search.solver import solve_exact
from moa_search.search.space import SearchSpace
from moa_search.search.trade_off import FrontPoint, epsilon_cells
from moa_search.spans import DENSE, SpanRule, span

ALPHA_STEP_TOKENS = 1024
LONGEST_PARTS = 8
BETA_STEP_256 = 32
CELLS = 5
RULES_PER_LAYER = 2


class MoASearcher(Searcher):
    """Elementwise influence, alpha in steps of 1024 tokens, beta in eighths, two rules per layer, ε-constraint cells.

    MoA's grid is made for profiles of 2k to 8k tokens. On shorter ones its step is an eighth of the longest
    profiled length, in its favour: otherwise hardly any rule would be left.
    """

    name = "moa"
    criterion = "elementwise"
    proves = True

    def rules(self, lengths: Sequence[int], *, sink: int, block: int) -> list[SpanRule]:
        """See `Searcher.rules`; rules that are the same at every length count once, and so do negative spans."""
        longest = max(lengths)
        step = min(ALPHA_STEP_TOKENS, max(block, longest // LONGEST_PARTS))
        alphas = range(-2 * step, longest + 1, step)
        distinct: dict[tuple[int, ...], SpanRule] = {}
        for rule in [DENSE, *(SpanRule(a, b) for b in range(0, 257, BETA_STEP_256) for a in alphas)]:
            distinct.setdefault(tuple(span(length, rule, sink + block) for length in sorted(set(lengths))), rule)
        return sorted(distinct.values())

    def choose(self, space: SearchSpace) -> list[FrontPoint]:
        """See `Searcher.choose`; the first plan has the smallest weighted sum of losses in units of the worst."""
        limit = min(space.options.rules_per_layer or RULES_PER_LAYER, RULES_PER_LAYER)
        return epsilon_cells(
            space.objectives,
            dataclasses.replace(space.problem, rules_per_layer=limit),
            lambda asked: solve_exact(asked, time_limit_s=space.options.time_limit_s),
            cells=CELLS,
            weights=tuple(space.weights.values()),
        )
