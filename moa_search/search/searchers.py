"""From a profile and budgets to plans: the exact search and the uniform baseline behind one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import numpy.typing as npt

from moa_search.errors import ConfigError
from moa_search.formats.files import nearest
from moa_search.formats.plan import Budget, LengthMetrics, Plan, Provenance
from moa_search.formats.profile import Profile
from moa_search.search.exact import solve_exact
from moa_search.search.front import FrontPoint, trade_off
from moa_search.search.losses import RuleLosses, rule_losses
from moa_search.search.problem import Problem, Solution, make_budgets
from moa_search.search.rules import rule_grid
from moa_search.spans import DENSE, SpanRule, attention_density
from moa_search.version import __version__

__all__ = ["SEARCHERS", "Front", "search_profile"]

SEARCHERS = ("exact", "uniform")
"""``exact`` chooses a rule per KV head; ``uniform`` gives every head the same one (as StreamingLLM does).

Neither touches heads of native layers, which keep the model's own sliding window."""

FRONT_STEPS = 6


@dataclass(frozen=True)
class Front:
    """Plans under one set of budgets.

    Attributes:
        plans: The first is the chosen one: equal weight on every profiled length.
        budgets: The upper bounds they keep.
    """

    plans: list[Plan]
    budgets: list[Budget]

    @property
    def chosen(self) -> Plan:
        """The plan to use unless there is a reason to prefer another."""
        return self.plans[0]


def search_profile(
    profile: Profile,
    densities: Sequence[float],
    *,
    budget_lengths: Sequence[int] | None = None,
    criterion: str,
    searcher: str = "exact",
    time_limit_s: float = 60.0,
    front_steps: int = FRONT_STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> Front:
    """Search the front of plans that keep the budgets.

    Args:
        profile: Influence statistics.
        densities: Largest share of the KV cache to keep, native layers aside: one for all lengths, or one for each.
        budget_lengths: Lengths in tokens that the densities hold at. If None, the profiled ones, and the last
            density also at the model's full context, so that no plan explodes beyond what was profiled.
        criterion: One of `moa_search.search.losses.CRITERIA`.
        searcher: One of `SEARCHERS`.
        time_limit_s: Seconds for each solve.
        front_steps: Steps of the weight lattice over lengths.
        progress: Told the solves done and in all.

    Raises:
        ConfigError: An unknown criterion or searcher, or a density out of range.
        BudgetInfeasibleError: A budget that no plan keeps.
        SolverError: No plan found in time.
    """
    if searcher not in SEARCHERS:
        raise ConfigError(f"searcher {searcher!r} is unknown{nearest(searcher, SEARCHERS)}; choose from exact, uniform")
    header = profile.header
    lengths = list(budget_lengths or profile.lengths)
    budgets = make_budgets(densities, lengths)
    context = header.model.config.get("max_position_embeddings")
    if not budget_lengths and isinstance(context, int) and context > max(lengths):
        budgets.append(Budget(length=context, density=budgets[-1].density))
    rules = rule_grid([*profile.lengths, *lengths], sink=header.sink, block=header.block)
    losses = rule_losses(profile, rules, criterion)
    problem = Problem.build(losses[0].mean, rules, budgets, min_span=header.sink + header.block)
    if searcher == "uniform":
        choice = _uniform_choice(problem, rules, budgets, header.sink + header.block)
        values = tuple(loss.of_choice(choice)[0] for loss in losses)
        points = [FrontPoint(tuple([1 / len(losses)] * len(losses)), values, Solution(choice, 0.0, 0.0))]
    else:
        points = trade_off(
            [loss.mean for loss in losses],
            problem,
            lambda p: solve_exact(p, time_limit_s=time_limit_s),
            steps=front_steps,
            progress=progress,
        )
    plans = [_plan(profile, rules, losses, budgets, criterion, searcher, point) for point in points]
    return Front(plans, budgets)


def _uniform_choice(
    problem: Problem, rules: Sequence[SpanRule], budgets: Sequence[Budget], min_span: int
) -> npt.NDArray[np.int64]:
    """The one rule for all heads that keeps most under the budgets; of equals, the one that computes most."""
    heads = len(problem.losses)
    feasible = [r for r in range(len(rules)) if (problem.costs[:, r] * heads <= problem.limits).all()]
    longest = max(budget.length for budget in budgets)
    best = max(
        feasible,
        key=lambda r: (
            sum(problem.costs[b, r] / budget.length for b, budget in enumerate(budgets)),
            attention_density([rules[r]], longest, min_span),
        ),
    )
    return np.full(heads, best, dtype=np.int64)


def _plan(
    profile: Profile,
    rules: Sequence[SpanRule],
    losses: Sequence[RuleLosses],
    budgets: Sequence[Budget],
    criterion: str,
    searcher: str,
    point: FrontPoint,
) -> Plan:
    model, header = profile.header.model, profile.header
    per_layer = model.num_key_value_heads
    by_layer = [[DENSE] * per_layer for _ in range(model.num_hidden_layers)]
    for layer, choice in zip(header.searchable_layers, point.solution.choice.reshape(-1, per_layer), strict=True):
        by_layer[layer] = [rules[index] for index in choice]
    plan = Plan.from_rules(
        by_layer,
        model,
        native_layers=header.native_layers,
        sink=header.sink,
        block=header.block,
    )
    exact = searcher == "exact"
    metrics = []
    for loss in losses:
        value, error = loss.of_choice(point.solution.choice)
        metrics.append(
            LengthMetrics(
                length=loss.length,
                density=plan.density(loss.length),
                attention_density=plan.attention_density(loss.length),
                loss=value,
                loss_error=error,
            )
        )
    provenance = Provenance(
        searcher=searcher,
        profile=profile.checksum,
        criterion=criterion if exact else None,
        budgets=tuple(budgets),
        length_weights={str(loss.length): w for loss, w in zip(losses, point.weights, strict=True)} if exact else {},
        objective=point.solution.objective if exact else None,
        dual_bound=point.solution.bound if exact else None,
        gap=point.solution.gap if exact else None,
        versions={"moa-search": __version__, "highspy": version("highspy")} if exact else {"moa-search": __version__},
    )
    return plan.model_copy(update={"provenance": provenance, "predicted": tuple(metrics)})
