"""What every searcher promises, whichever it is: each test runs for all of them."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from moa_search.errors import BudgetInfeasibleError
from moa_search.formats import Plan
from moa_search.search import SEARCHERS, SearchOptions, search_profile
from moa_search.search.searchers import find_searcher
from moa_search.search.searching import make_space


@pytest.fixture(params=sorted(SEARCHERS))
def name(request):
    return request.param


def search(profile, name, density=(0.4,), **options):
    asked = {"predict_lengths": (), "front_steps": 2, **options}
    return search_profile(profile, SearchOptions(density=density, searcher=name, **asked))


def kept(plan, length):
    return sum(itertools.chain.from_iterable(plan.spans(length)))


def test_keeps_every_budget_to_the_token_and_says_which(name, tiny_profile):
    front = search(tiny_profile, name, [0.5, 0.31], budget=["tokens=200@700"])
    for plan in front.plans:
        assert kept(plan, 512) <= Fraction("0.5") * 512 * 6
        assert kept(plan, 1024) <= Fraction("0.31") * 1024 * 6
        assert kept(plan, 700) <= 200 * 6
        assert plan.provenance.budgets == tuple(front.budgets)
    assert [use.asked.text for use in front.usage] == ["density=0.5@512", "density=0.31@1024", "tokens=200@700"]


def test_says_who_chose_and_by_what(name, tiny_profile):
    searcher = find_searcher(name)
    front = search(tiny_profile, name, criterion="squared")
    for plan in front.plans:
        origin = plan.provenance
        assert (origin.searcher, origin.profile) == (name, tiny_profile.checksum)
        assert origin.criterion == ((searcher.criterion or "squared") if searcher.uses_losses else None)
        assert (origin.gap is not None) == searcher.proves
        if searcher.proves:
            assert 0 <= origin.dual_bound <= origin.objective


def test_predicts_its_loss_and_density_at_every_profiled_length(name, tiny_profile):
    for plan in search(tiny_profile, name).plans:
        assert [metrics.length for metrics in plan.predicted] == [512, 1024]
        for metrics in plan.predicted:
            assert metrics.density == plan.density(metrics.length)
            assert metrics.loss >= 0


def test_equal_arguments_give_equal_plans(name, tiny_profile):
    first, second = (search(tiny_profile, name).chosen.dumps() for _ in range(2))
    assert first == second
    assert Plan.loads(first).dumps() == first


def test_leaves_native_layers_alone(name, native_profile):
    for plan in search(native_profile, name, [0.3]).plans:
        assert plan.native_layers == (1,)
        assert kept(plan, 1024) <= 0.3 * 1024 * 4 + 2 * 128


def test_the_smallest_spans_are_within_reach_and_less_is_not(name, tiny_profile):
    """68 of 512 tokens is the smallest span of a profile with sink 4 and block 64."""
    front = search(tiny_profile, name, [0.1329], budget_lengths=[512])
    assert {span for layer in front.chosen.spans(512) for span in layer} == {68}
    with pytest.raises(BudgetInfeasibleError, match=r"density=0\.13@512 can't be met"):
        search(tiny_profile, name, [0.13], budget_lengths=[512])


def test_room_for_everything_loses_nothing_that_matters(name, tiny_profile):
    plan = search(tiny_profile, name, [1.0]).chosen
    assert [metrics.loss for metrics in plan.predicted] == pytest.approx([0, 0], abs=1e-3)


def test_keeps_floors(name, tiny_profile):
    plan = search(tiny_profile, name, [0.7], min_span=120, layer_floor={2: 0.5}).chosen
    for length in (512, 1024):
        spans = np.array(plan.spans(length))
        assert spans.min() >= 120
        assert (spans[2] >= 0.5 * length).all()
        assert kept(plan, length) <= 0.7 * length * 6


def test_floors_over_the_budget_are_refused(name, tiny_profile):
    with pytest.raises(BudgetInfeasibleError):
        search(tiny_profile, name, [0.3], layer_floor={0: 0.5, 1: 0.5})


def test_progress_ends_at_the_total(name, tiny_profile, bars):
    space = make_space(tiny_profile, SearchOptions(density=[0.4], front_steps=2), find_searcher(name))
    find_searcher(name).choose(space)
    seen = bars.get("Searching", [])
    assert all(0 < done <= total for done, total in seen)
    assert not seen or seen[-1][0] == seen[-1][1]


class TestDifferences:
    """What sets each baseline apart."""

    def test_per_layer_has_one_rule_a_layer(self, tiny_profile):
        assert all(len(set(rules)) == 1 for rules in search(tiny_profile, "per-layer").chosen.rules)

    def test_duo_is_dense_or_one_constant_span(self, tiny_profile):
        rules = {rule for layer in search(tiny_profile, "duo", [0.5]).chosen.rules for rule in layer}
        assert sum(not rule.is_dense for rule in rules) == 1
        assert all(rule.is_dense or rule.beta_256 == 0 for rule in rules)

    def test_moa_takes_eighths_and_steps_of_a_part_of_the_longest_length(self, tiny_profile):
        for plan in search(tiny_profile, "moa").plans:
            assert plan.provenance.criterion == "elementwise"
            for rules in plan.rules:
                assert len(set(rules)) <= 2
                assert all(rule.beta_256 % 32 == 0 and rule.alpha % 128 == 0 for rule in rules)

    def test_moa_steps_by_1024_tokens_at_its_own_lengths(self):
        rules = find_searcher("moa").rules([2048, 4096, 8192], sink=16, block=32)
        assert {rule.alpha % 1024 for rule in rules} == {0}
        assert len(rules) > 30

    def test_none_predicts_less_than_exact_by_its_criterion(self, tiny_profile):
        best = search(tiny_profile, "exact").chosen.provenance
        for name in ("duo", "per-layer", "uniform"):
            plan = search(tiny_profile, name).chosen
            lost = sum(best.length_weights[str(metrics.length)] * metrics.loss for metrics in plan.predicted)
            assert lost >= best.objective * (1 - 1e-9)
