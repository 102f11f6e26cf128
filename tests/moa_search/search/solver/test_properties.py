"""What every solution of a search problem keeps to, on small random problems and beside exhaustive search."""

import dataclasses
import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from benchmarks.search_instances import make_problem
from moa_search.errors import MoAError
from moa_search.search.solver.exact import solve_exact
from moa_search.search.solver.problem import Problem

GAP = 1e-7
"""Asked for in these tests: two plans of such small problems are hardly ever closer."""

RULE_LIMITS = (None, 1, 2)

LOSSES = {
    "continuous": lambda rng, shape: rng.lognormal(0, 1.5, shape),
    "tied": lambda rng, shape: rng.integers(0, 4, shape).astype(float),
    "mostly zero": lambda rng, shape: rng.lognormal(size=shape) * (rng.random(shape) < 0.3),
    "of every size": lambda rng, shape: 10.0 ** rng.uniform(-9, 6, shape),
}

COSTS = {
    "tokens": lambda rng, shape: rng.integers(1, 50, shape),
    "picoseconds": lambda rng, shape: (10.0 ** rng.uniform(9, 12, shape)).astype(np.int64),
}


@st.composite
def problems(draw, losses=tuple(LOSSES), rule_limits=RULE_LIMITS):
    """One to six heads, two to five rules; at least one choice keeps everything, often with nothing to spare."""
    layers, heads_per_layer = draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (2, 3), (3, 1), (3, 2), (5, 1)]))
    rules, budgets = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    limit = draw(st.sampled_from(rule_limits))
    kind, unit = draw(st.sampled_from(losses)), draw(st.sampled_from(sorted(COSTS)))
    masked, by_head = draw(st.booleans()), draw(st.booleans())
    slack = draw(st.sampled_from([0.0, 0.1, 0.5]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    heads = layers * heads_per_layer
    sets = np.argsort(rng.random((layers, rules)), axis=1)[:, : limit or rules]
    some = np.concatenate([rng.choice(rules_in, heads_per_layer) for rules_in in sets])
    allowed = (rng.random((heads, rules)) < 0.6) | (some[:, None] == np.arange(rules)) if masked else None
    head_costs = COSTS[unit](rng, (2, heads, rules)) if by_head else None
    problem = Problem(
        LOSSES[kind](rng, (heads, rules)),
        COSTS[unit](rng, (budgets, rules)),
        np.zeros(budgets, dtype=np.int64),
        heads_per_layer=heads_per_layer,
        rules_per_layer=limit,
        allowed=allowed,
        head_costs=head_costs,
        head_limits=np.zeros(2, dtype=np.int64) if by_head else None,
    )
    return with_limits(problem, (problem.used(some) * (1 + slack)).astype(np.int64))


def with_limits(problem, limits):
    """``problem`` with limits ``[budget]``, of the shared budgets and then of the heads' own."""
    shared = len(problem.limits)
    own = None if problem.head_limits is None else limits[shared:]
    return dataclasses.replace(problem, limits=limits[:shared], head_limits=own)


def all_choices(problem):
    """Every choice that keeps everything and its loss, from the best on; in whole numbers, without the solver."""
    heads, rules = problem.losses.shape
    choices = np.stack(np.meshgrid(*[np.arange(rules)] * heads, indexing="ij"), -1).reshape(-1, heads)
    keeps = (problem.costs[:, choices].sum(2) <= problem.limits[:, None]).all(0)
    if problem.head_costs is not None:
        used = problem.head_costs[:, np.arange(heads), choices].sum(2)
        keeps &= (used <= problem.head_limits[:, None]).all(0)
    if problem.allowed is not None:
        keeps &= problem.allowed[np.arange(heads), choices].all(1)
    if problem.rules_per_layer is not None:
        by_layer = np.sort(choices.reshape(len(choices), -1, problem.heads_per_layer), axis=2)
        different = 1 + (np.diff(by_layer, axis=2) != 0).sum(2)
        keeps &= (different <= problem.rules_per_layer).all(1)
    choices = choices[keeps]
    losses = problem.losses[np.arange(heads), choices].sum(1)
    order = np.argsort(losses, kind="stable")
    return choices[order], losses[order]


def assert_keeps_everything(problem, choice):
    """Every budget in Python's integers, which never overflow, and what a layer and a head may have."""
    for costs, limit in zip(problem.costs.tolist(), problem.limits.tolist(), strict=True):
        assert sum(costs[rule] for rule in choice.tolist()) <= limit
    if problem.head_costs is not None:
        for costs, limit in zip(problem.head_costs.tolist(), problem.head_limits.tolist(), strict=True):
            assert sum(costs[head][rule] for head, rule in enumerate(choice.tolist())) <= limit
    if problem.rules_per_layer is not None:
        for rules in choice.reshape(-1, problem.heads_per_layer).tolist():
            assert len(set(rules)) <= problem.rules_per_layer
    if problem.allowed is not None:
        assert problem.allowed[np.arange(len(choice)), choice].all()


def no_worse(value, other):
    """Whether ``value`` is at most ``other``, but for the gap that was asked for."""
    return value <= other * (1 + GAP) + 1e-15


@settings(max_examples=300)
@given(problems())
def test_exhaustive_search_finds_nothing_better(problem):
    _, losses = all_choices(problem)
    solution = solve_exact(problem, gap=GAP)
    assert_keeps_everything(problem, solution.choice)
    assert solution.objective == problem.losses[np.arange(len(solution.choice)), solution.choice].sum()
    assert solution.bound <= losses[0] * (1 + 1e-12)
    assert solution.bound <= solution.objective
    assert no_worse(solution.objective, losses[0])


@settings(max_examples=60)
@given(problems(), st.integers(-12, 12))
def test_the_unit_of_the_losses_changes_no_plan(problem, exponent):
    scaled = dataclasses.replace(problem, losses=problem.losses * 10.0**exponent)
    assert solve_exact(scaled).choice.tolist() == solve_exact(problem).choice.tolist()


@pytest.mark.parametrize("limit", RULE_LIMITS)
def test_the_unit_of_the_losses_changes_no_plan_of_a_model(limit):
    problem = dataclasses.replace(make_problem(3, 4, 20), rules_per_layer=limit)
    plan = solve_exact(problem).choice.tolist()
    for factor in (1e-12, 3.0, 1e12):
        assert solve_exact(dataclasses.replace(problem, losses=problem.losses * factor)).choice.tolist() == plan


@settings(max_examples=60)
@given(problems(losses=("continuous",)), st.randoms(use_true_random=False))
def test_the_order_of_the_heads_is_only_an_order(problem, random):
    """Whole layers change places, and heads within each."""
    heads = np.arange(len(problem.losses)).reshape(-1, problem.heads_per_layer)
    layers = [random.sample(layer, len(layer)) for layer in random.sample(heads.tolist(), len(heads))]
    order = np.concatenate(layers)
    permuted = dataclasses.replace(
        problem,
        losses=problem.losses[order],
        allowed=None if problem.allowed is None else problem.allowed[order],
        head_costs=None if problem.head_costs is None else problem.head_costs[:, order],
    )
    _, losses = all_choices(problem)
    first, second = solve_exact(problem, gap=GAP), solve_exact(permuted, gap=GAP)
    if len(losses) == 1 or losses[1] > losses[0] * (1 + 10 * GAP):
        assert second.choice.tolist() == first.choice[order].tolist()
    else:
        assert second.objective == pytest.approx(first.objective, rel=GAP)


@settings(max_examples=60)
@given(problems(), st.lists(st.integers(0, 60), min_size=6, max_size=6))
def test_a_looser_budget_is_never_worse(problem, percent):
    limits = problem.all_limits
    looser = with_limits(problem, limits + limits * np.array(percent[: len(limits)]) // 100)
    assert no_worse(solve_exact(looser, gap=GAP).objective, solve_exact(problem, gap=GAP).objective)


@settings(max_examples=60)
@given(problems(rule_limits=(1,)))
def test_more_rules_in_a_layer_are_never_worse(problem):
    limited = [dataclasses.replace(problem, rules_per_layer=limit) for limit in (None, 2, 1)]
    objectives = [solve_exact(each, gap=GAP).objective for each in limited]
    assert all(no_worse(more, fewer) for more, fewer in itertools.pairwise(objectives))


@settings(max_examples=60)
@given(problems())
def test_budgets_that_nothing_keeps_together_are_an_error(problem):
    tight = with_limits(problem, problem.all_limits * 9 // 10)
    if len(all_choices(tight)[1]):
        assert_keeps_everything(tight, solve_exact(tight).choice)
    else:
        with pytest.raises(MoAError):
            solve_exact(tight)


@pytest.mark.parametrize("limit", RULE_LIMITS)
def test_no_time_gives_a_choice_with_its_gap(limit):
    problem = dataclasses.replace(make_problem(5, 4, 30), rules_per_layer=limit)
    hasty, patient = solve_exact(problem, time_limit_s=1e-9), solve_exact(problem, time_limit_s=20)
    assert_keeps_everything(problem, hasty.choice)
    assert hasty.bound <= patient.objective <= hasty.objective * (1 + 1e-12)
    assert hasty.gap == pytest.approx(1 - hasty.bound / hasty.objective)
    assert hasty.gap > 1e-3


@settings(max_examples=60)
@given(problems())
def test_no_time_gives_a_choice_or_an_error_but_nothing_broken(problem):
    _, losses = all_choices(problem)
    try:
        solution = solve_exact(problem, time_limit_s=0)
    except MoAError:
        return
    assert_keeps_everything(problem, solution.choice)
    assert solution.bound <= losses[0] * (1 + 1e-12)
