"""From a profile to plans."""

import dataclasses
import itertools
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from moa_search.errors import BudgetInfeasibleError, ConfigError
from moa_search.formats import Plan, Profile
from moa_search.search import CRITERIA, SEARCHERS, SearchOptions
from moa_search.search import search_profile as search
from moa_search.search.losses import rule_losses
from moa_search.search.rules import rule_grid
from moa_search.spans import span


def search_profile(profile, density, **options):
    """By the profiled lengths alone; ``test_space.py`` has what looking ahead adds."""
    return search(profile, SearchOptions(**{"density": density, "predict_lengths": (), **options}))


def kept_tokens(plan, length):
    return sum(itertools.chain.from_iterable(plan.spans(length)))


def allowed_tokens(plan, length, density):
    heads = plan.model.num_hidden_layers * plan.model.num_key_value_heads
    return int(Fraction(str(density)) * length * heads)


@pytest.mark.parametrize("searcher", SEARCHERS)
@pytest.mark.parametrize(("densities", "lengths"), [([0.3], None), ([0.5, 0.29], None), ([0.4, 0.2], [700, 3000])])
def test_every_plan_keeps_every_budget_to_the_token(tiny_profile, searcher, densities, lengths):
    front = search_profile(tiny_profile, densities, budget_lengths=lengths, criterion="squared", searcher=searcher)
    asked = lengths or [512, 1024]
    assert [budget.length for budget in front.budgets] == asked
    each = densities * (len(asked) // len(densities))
    for plan, (length, density) in itertools.product(front.plans, zip(asked, each, strict=True)):
        assert kept_tokens(plan, length) <= allowed_tokens(plan, length, density)
        assert plan.provenance.budgets == tuple(front.budgets)


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_by_default_the_last_budget_holds_at_the_full_context_too(with_context, searcher):
    profile = with_context(4096)
    front = search_profile(profile, [0.5, 0.3], criterion="squared", searcher=searcher)
    assert [(b.length, b.density) for b in front.budgets] == [(512, 0.5), (1024, 0.3), (4096, 0.3)]
    for plan in front.plans:
        assert kept_tokens(plan, 4096) <= allowed_tokens(plan, 4096, 0.3)


def test_lengths_that_are_named_are_the_only_ones(with_context):
    front = search_profile(with_context(4096), [0.3], budget_lengths=[1024], criterion="squared")
    assert [budget.length for budget in front.budgets] == [1024]


def test_a_context_no_longer_than_the_profile_adds_nothing(with_context):
    assert len(search_profile(with_context(1024), [0.3], criterion="squared").budgets) == 2


@pytest.mark.parametrize("criterion", CRITERIA)
def test_exact_never_loses_to_uniform(tiny_profile, criterion):
    exact = search_profile(tiny_profile, [0.4], criterion=criterion)
    uniform = search_profile(tiny_profile, [0.4], criterion=criterion, searcher="uniform")
    weights = exact.chosen.provenance.length_weights
    ours, theirs = (
        sum(weights[str(metrics.length)] * metrics.loss for metrics in front.chosen.predicted)
        for front in (exact, uniform)
    )
    assert ours <= theirs * (1 + 1e-6)


def test_more_memory_never_loses_more(tiny_profile):
    losses = []
    for density in (0.2, 0.4, 0.6, 0.8, 1.0):
        plan = search_profile(tiny_profile, [density], budget_lengths=[1024], criterion="squared").chosen
        losses.append(plan.provenance.objective)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


def test_predictions_are_those_of_the_plans_rules(tiny_profile):
    front = search_profile(tiny_profile, [0.4], criterion="signed")
    rules = rule_grid([512, 1024], sink=4, block=64)
    losses = rule_losses(tiny_profile, rules, "signed")
    for plan in front.plans:
        choice = np.array([rules.index(rule) for layer in plan.rules for rule in layer])
        for metrics, entry in zip(plan.predicted, losses, strict=True):
            assert metrics.length == entry.length
            assert (metrics.loss, metrics.loss_error) == entry.of_choice(choice)
            assert metrics.density == plan.density(metrics.length)
            assert metrics.attention_density == plan.attention_density(metrics.length)


def test_a_plan_says_how_it_came_about(tiny_profile):
    front = search_profile(tiny_profile, [0.4], criterion="squared")
    for plan in front.plans:
        origin = plan.provenance
        assert (origin.searcher, origin.criterion, origin.profile) == ("exact", "squared", tiny_profile.checksum)
        total = sum(origin.length_weights[str(metrics.length)] * metrics.loss for metrics in plan.predicted)
        assert origin.objective == pytest.approx(total)
        assert 0 < origin.dual_bound <= origin.objective
        assert origin.gap < 1e-5
        assert plan.model == tiny_profile.header.model
        assert (plan.sink, plan.block, plan.anchor) == (4, 64, "position")


def test_front_holds_no_plan_twice_and_none_that_another_beats(tiny_profile):
    front = search_profile(tiny_profile, [0.4], criterion="squared")
    losses = [tuple(metrics.loss for metrics in plan.predicted) for plan in front.plans]
    assert len(losses) > 2
    assert front.chosen is front.plans[0]
    for a, b in itertools.permutations(losses, 2):
        assert any(x > y for x, y in zip(a, b, strict=True))


class TestUniform:
    def test_one_rule_everywhere(self, tiny_profile):
        front = search_profile(tiny_profile, [0.4], criterion="squared", searcher="uniform")
        (plan,) = front.plans
        assert len({rule for layer in plan.rules for rule in layer}) == 1
        assert (plan.provenance.searcher, plan.provenance.gap, plan.provenance.criterion) == ("uniform", None, None)

    @pytest.mark.parametrize("density", [0.15, 0.4, 0.77, 1.0])
    def test_uses_as_much_of_the_budgets_as_any_one_rule_can(self, with_context, density):
        plan = search_profile(with_context(4096), [density], criterion="squared", searcher="uniform").chosen

        def used(rule):
            shares = [span(n, rule, 68) / n for n in (512, 1024, 4096)]
            return sum(shares) if max(shares) <= density else 0

        best = max(used(rule) for rule in rule_grid([512, 1024], sink=4, block=64))
        assert used(plan.rules[0][0]) == pytest.approx(best)


def without_layer_1(profile):
    """The same statistics as if of a model that lacks the middle layer."""
    header = profile.header
    model = header.model.model_copy(update={"num_hidden_layers": 2})
    by_length = {
        length: dataclasses.replace(
            entry,
            **{
                group: {name: np.delete(values, 1, -4) for name, values in getattr(entry, group).items()}
                for group in ("per_sample", "mean", "error")
            },
        )
        for length, entry in profile.by_length.items()
    }
    return Profile(header.model_copy(update={"model": model, "native_layers": ()}), by_length)


class TestNativeLayers:
    @pytest.mark.parametrize("searcher", SEARCHERS)
    @pytest.mark.parametrize("criterion", ["signed", "recall"])
    def test_they_change_nothing_for_the_others(self, native_profile, searcher, criterion):
        found = search_profile(native_profile, [0.3], criterion=criterion, searcher=searcher)
        smaller = search_profile(without_layer_1(native_profile), [0.3], criterion=criterion, searcher=searcher)
        assert len(found.plans) == len(smaller.plans)
        for plan, other in zip(found.plans, smaller.plans, strict=True):
            assert [plan.patterns[0], plan.patterns[2]] == list(other.patterns)
            assert plan.predicted == other.predicted
            assert plan.provenance.objective == other.provenance.objective

    @pytest.mark.parametrize("searcher", SEARCHERS)
    def test_every_plan_leaves_them_native(self, native_profile, searcher):
        for plan in search_profile(native_profile, [0.3], criterion="signed", searcher=searcher).plans:
            assert plan.native_layers == (1,)
            assert plan.native_window == 128
            assert Plan.loads(plan.dumps()) == plan

    def test_budgets_are_of_the_other_heads(self, native_profile):
        tightest = 68 / 512  # the smallest span in each of the four heads
        search_profile(native_profile, [tightest], budget_lengths=[512], criterion="signed")
        with pytest.raises(BudgetInfeasibleError):
            search_profile(native_profile, [tightest * 0.99], budget_lengths=[512], criterion="signed")


SCRIPT = """
import sys
from moa_search.formats import Profile
from moa_search.search import SearchOptions, search_profile
for plan in search_profile(Profile.load(sys.argv[1]), SearchOptions(density=[0.4], criterion="squared")).plans:
    sys.stdout.write(plan.dumps())
"""


def test_equal_arguments_give_equal_bytes_also_in_another_process(tiny_profile, tmp_path):
    path = tmp_path / "profile.safetensors"
    tiny_profile.save(path)
    profile = Profile.load(path)
    one, two = (
        "".join(plan.dumps() for plan in search(profile, SearchOptions(density=[0.4], criterion="squared")).plans)
        for _ in range(2)
    )
    assert one == two
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    fresh = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert fresh.stdout == one
    assert fresh.stderr == ""


def test_infeasible_budget_is_named(tiny_profile):
    words = r"density=0\.1@512 can't be met: the smallest spans already take 0\.1329"
    with pytest.raises(BudgetInfeasibleError, match=words):
        search_profile(tiny_profile, [0.1], criterion="squared")


def test_unknown_searcher_suggests_the_nearest(tiny_profile):
    with pytest.raises(ConfigError, match=r"'unifrom' is unknown \(did you mean 'uniform'\?\)"):
        search_profile(tiny_profile, [0.4], criterion="squared", searcher="unifrom")


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_unknown_criterion(tiny_profile, searcher):
    with pytest.raises(ConfigError, match="criterion: 'loss' is unknown"):
        search_profile(tiny_profile, [0.4], criterion="loss", searcher=searcher)
