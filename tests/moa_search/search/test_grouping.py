"""Plans whose heads fall into equally large groups of one rule each."""

import itertools
from collections import Counter

import numpy as np
import pytest

from moa_search import search_plan
from moa_search.errors import ConfigError
from moa_search.head_groups import group_heads
from moa_search.search.grouping import balanced, equal_groups, solve_in_groups
from moa_search.search.solver import Problem, solve_exact


def random_problem(seed, heads, rules, budget):
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.integers(1, 100, (2, rules)), axis=1)
    losses = np.sort(rng.random((heads, rules)) * rng.random((heads, 1)), axis=1)[:, ::-1]
    limits = (costs.min(1) + budget * (costs.max(1) - costs.min(1)) * rng.uniform(0.8, 1, 2)).astype(np.int64) * heads
    return Problem(losses=losses.copy(), costs=costs, limits=limits)


def best_by_hand(problem, count):
    heads, rules = problem.losses.shape
    size = heads // count
    choices = (np.array(choice) for choice in itertools.product(range(rules), repeat=heads))
    return min(
        problem.loss(choice)
        for choice in choices
        if all(times % size == 0 for times in Counter(choice.tolist()).values()) and problem.is_feasible(choice)
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_groups_keep_budgets_and_are_the_best_there_are(seed, count):
    problem = random_problem(seed, 6, 4, 0.4)
    found = solve_in_groups(problem, count)
    assert problem.is_feasible(found.choice)
    assert all(times % (6 // count) == 0 for times in Counter(found.choice.tolist()).values())
    assert found.objective == pytest.approx(problem.loss(found.choice))
    assert found.bound <= found.objective
    assert found.objective <= best_by_hand(problem, count) * 1.02


def test_as_many_groups_as_heads_is_the_free_choice():
    problem = random_problem(1, 8, 10, 0.5)
    assert solve_in_groups(problem, 8).objective == pytest.approx(solve_exact(problem).objective, rel=1e-6)


def test_more_groups_lose_less():
    problem = random_problem(2, 60, 20, 0.3)
    losses = [solve_in_groups(problem, count).objective for count in (1, 2, 4, 12)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 1.02 * losses[-1]


@pytest.mark.parametrize("seed", range(10))
def test_cycles_find_the_best_assignment(seed):
    rng = np.random.default_rng(seed)
    losses, labels = rng.random((6, 3)), np.arange(6) % 3
    if seed % 2:
        losses[rng.random((6, 3)) < 0.2] = np.inf
        losses[np.arange(6), labels] = rng.random(6)
    every = (losses[np.arange(6), list(some)].sum() for some in set(itertools.permutations(labels.tolist())))
    found = balanced(losses, labels)
    assert sorted(found) == sorted(labels)
    assert losses[np.arange(6), found].sum() == pytest.approx(min(every))


@pytest.mark.parametrize(("heads", "most", "count"), [(90, 9, 9), (90, 8, 6), (256, 9, 8), (7, 3, 1), (4, 99, 4)])
def test_groups_divide_the_heads(heads, most, count):
    assert equal_groups(heads, most) == count


def test_heads_that_may_not_have_a_rule_are_never_given_it():
    problem = random_problem(3, 6, 4, 0.9)
    allowed = np.ones((6, 4), dtype=bool)
    allowed[0, :3] = allowed[1, 1:] = False
    problem = Problem(problem.losses, problem.costs, problem.limits, allowed=allowed)
    assert problem.is_feasible(solve_in_groups(problem, 3).choice)


def test_a_plan_in_groups_holds_what_it_keeps(tiny_profile):
    profile = tiny_profile
    plan = search_plan(profile, density=0.4, groups=2)
    counts = Counter(rule for layer in plan.rules for rule in layer)
    assert all(2 * times % counts.total() == 0 for times in counts.values())
    longest = max(profile.lengths)
    groups = group_heads(plan.rules, min_span=plan.min_span, longest=longest)
    assert groups.held(longest) == pytest.approx(plan.density(longest))
    assert plan.density(longest) <= 0.4


@pytest.mark.parametrize(
    "options", [{"searcher": "uniform"}, {"searcher": "per-layer"}, {"rules_per_layer": 2}, {"front_steps": 3}]
)
def test_what_groups_exclude(tiny_profile, options):
    with pytest.raises(ConfigError, match="groups"):
        search_plan(tiny_profile, density=0.4, groups=2, **options)
