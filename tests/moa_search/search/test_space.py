"""Budgets, weights and floors as a user writes them."""

import numpy as np
import pytest

from moa_search.errors import ConfigError
from moa_search.search import SearchOptions, search_profile, search_several
from moa_search.search.searchers import find_searcher
from moa_search.search.searching import make_space
from moa_search.search.space import density_specs, parse_floors
from moa_search.search.trade_off import knee


def space(profile, **options):
    asked = {"density": [0.4], "predict_lengths": (), **options}
    return make_space(profile, SearchOptions(**asked), find_searcher("exact"))


class TestDensities:
    def specs(self, profile, *densities):
        return [spec.text for spec in density_specs(profile, SearchOptions(density=densities))]

    def test_one_density_holds_at_every_length(self, tiny_profile):
        assert self.specs(tiny_profile, 0.5) == ["density=0.5@512", "density=0.5@1024"]

    def test_one_density_per_length(self, tiny_profile):
        assert self.specs(tiny_profile, 0.5, 0.25) == ["density=0.5@512", "density=0.25@1024"]

    @pytest.mark.parametrize("density", [0, -0.5, 1.01, float("nan"), float("inf")])
    def test_density_out_of_range(self, tiny_profile, density):
        with pytest.raises(ConfigError, match="out of range"):
            self.specs(tiny_profile, density)

    def test_numbers_that_fit_neither(self, tiny_profile):
        with pytest.raises(ConfigError, match="3 densities for 2 lengths"):
            self.specs(tiny_profile, 0.5, 0.5, 0.5)

    def test_no_budget_at_all(self, tiny_profile):
        with pytest.raises(ConfigError, match="no budget is given"):
            space(tiny_profile, density=[])


class TestWeights:
    def test_all_lengths_weigh_the_same_by_default(self, tiny_profile):
        assert space(tiny_profile).weights == {512: 0.5, 1024: 0.5}
        assert space(tiny_profile, predict_lengths=[2048, 4096]).weights == dict.fromkeys([512, 1024, 2048, 4096], 0.25)

    def test_given_ones_add_up_to_one_and_zeros_are_gone(self, tiny_profile):
        found = space(tiny_profile, predict_lengths=[2048], length_weights={512: 1, 2048: 3})
        assert found.weights == {512: 0.25, 2048: 0.75}
        assert len(found.objectives) == 2

    @pytest.mark.parametrize(
        ("weights", "words"), [({700: 1}, "700 is none of"), ({512: -1}, "out of range"), ({512: 0}, "all are 0")]
    )
    def test_what_cannot_be(self, tiny_profile, weights, words):
        with pytest.raises(ConfigError, match=words):
            space(tiny_profile, length_weights=weights).weights  # noqa: B018

    def test_all_weight_on_a_length_gives_its_best_plan(self, tiny_profile):
        options = {"density": [0.4], "front_steps": 0}
        short = search_profile(tiny_profile, SearchOptions(**options, length_weights={512: 1})).chosen
        long = search_profile(tiny_profile, SearchOptions(**options, length_weights={1024: 1})).chosen
        assert short.predicted[0].loss < long.predicted[0].loss
        assert short.predicted[1].loss > long.predicted[1].loss

    def test_as_text(self):
        assert SearchOptions(length_weights=["512=1", " 1024=2.5"]).length_weights == {512: 1.0, 1024: 2.5}
        with pytest.raises(ConfigError, match="LENGTH=WEIGHT"):
            SearchOptions(length_weights=["512:1"])
        with pytest.raises(ConfigError, match="second time"):
            SearchOptions(length_weights=["512=1", "512=2"])


class TestLookingAhead:
    """By default the exact search counts twice the longest profiled length, by losses told from the profiled ones."""

    @pytest.fixture
    def found(self, tiny_profile):
        def find(searcher="exact", profile=tiny_profile, **options):
            made = make_space(profile, SearchOptions(**{"density": [0.4], **options}), find_searcher(searcher))
            return list(made.weights), [row.spec.text for row in made.rows]

        return find

    def test_the_length_has_a_loss_a_weight_and_a_budget(self, found):
        lengths, budgets = found(density=[0.5, 0.4])
        assert lengths == [512, 1024, 2048]
        assert budgets == ["density=0.5@512", "density=0.4@1024", "density=0.4@2048"]

    @pytest.mark.parametrize("searcher", ["moa", "duo", "per-layer", "recall", "uniform"])
    def test_baselines_choose_by_what_was_measured(self, found, searcher):
        assert found(searcher) == ([512, 1024], ["density=0.4@512", "density=0.4@1024"])

    def test_who_names_lengths_gets_these(self, found):
        assert found(predict_lengths=())[0] == [512, 1024]
        assert found(predict_lengths=[4096]) == ([512, 1024, 4096], [f"density=0.4@{n}" for n in (512, 1024, 4096)])

    def test_weights_that_are_given_stand(self, found):
        assert found(length_weights={512: 1})[0] == [512]

    @pytest.mark.parametrize(
        ("options", "ahead"),
        [
            ({"budget_lengths": [512, 1024]}, False),
            ({"budget_lengths": [4096]}, True),
            ({"density": [], "budget": ["tokens=300@1024"]}, False),
            ({"density": [], "budget": ["tokens=300@2048"]}, True),
        ],
    )
    def test_only_where_a_budget_holds(self, found, options, ahead):
        """Elsewhere spans that grow cost nothing, so every head would become dense there."""
        assert found(**options)[0] == [512, 1024, 2048][: 2 + ahead]

    def test_not_beyond_the_models_context(self, found, with_context):
        assert found(profile=with_context(1500)) == ([512, 1024], [f"density=0.4@{n}" for n in (512, 1024, 1500)])
        assert found(profile=with_context(2048))[0] == [512, 1024, 2048]

    def test_the_plan_is_better_there_by_what_is_known(self, tiny_profile):
        options = SearchOptions(density=[0.3], front_steps=0)
        ahead = search_profile(tiny_profile, options).chosen.predicted[2]
        blind = search_profile(
            tiny_profile,
            options.replace(predict_lengths=[2048], length_weights={512: 1, 1024: 1}),
        ).chosen.predicted[2]
        assert ahead.length == blind.length == 2048
        assert ahead.loss < blind.loss


class TestBudgetLengths:
    def test_without_a_density_they_are_refused(self, tiny_profile):
        with pytest.raises(ConfigError, match="give a density too"):
            space(tiny_profile, density=(), budget=["tokens=200@700"], budget_lengths=[700])

    def test_absurd_ones_are_refused_at_once(self, tiny_profile):
        with pytest.raises(ConfigError, match="is out of range"):
            search_profile(tiny_profile, SearchOptions(density=[0.4], budget_lengths=[10**12]))


class TestFloors:
    def test_as_text(self):
        assert parse_floors(["0=1.0", "1-2=.5"], 3) == {0: 1.0, 1: 0.5, 2: 0.5}
        assert parse_floors(["0=.75", "0-1=.5"], 3) == {0: 0.75, 1: 0.5}

    def test_layers_with_a_window_of_their_own_have_none(self):
        assert parse_floors(["0-2=.5"], 3, [0]) == {1: 0.5, 2: 0.5}
        with pytest.raises(ConfigError, match="names only layers with the model's own sliding window"):
            parse_floors(["0=.5"], 3, [0])

    def test_a_min_span_beyond_all_lengths_leaves_dense(self, tiny_profile):
        huge = search_profile(tiny_profile, SearchOptions(density=[1.0], min_span=10**30, front_steps=0)).chosen
        assert huge.density(512) == huge.density(1024) == 1

    @pytest.mark.parametrize(
        ("text", "words"),
        [("0:1", "LAYER=DENSITY"), ("3=0.5", "outside 0..2"), ("1-0=1", "outside"), ("0=2", "most 1")],
    )
    def test_what_cannot_be(self, text, words):
        with pytest.raises(ConfigError, match=words):
            parse_floors([text], 3)


def test_robust_steers_but_predictions_stay_plain(tiny_profile):
    plain, wary = space(tiny_profile), space(tiny_profile, robust=2.0)
    assert all((b >= a).all() and (b > a).any() for a, b in zip(plain.objectives, wary.objectives, strict=True))
    front = search_profile(tiny_profile, SearchOptions(density=[0.4], predict_lengths=(), robust=2.0, front_steps=0))
    for metrics, loss in zip(front.chosen.predicted, plain.losses, strict=True):
        choice = np.array([plain.rules.index(rule) for layer in front.chosen.rules for rule in layer])
        assert (metrics.loss, metrics.loss_error) == loss.of_choice(choice)


def test_extrapolated_losses_are_reported_beside_the_profiled_ones(tiny_profile):
    plan = search_profile(tiny_profile, SearchOptions(density=[0.4], predict_lengths=[2048, 512], front_steps=0)).chosen
    assert [metrics.length for metrics in plan.predicted] == [512, 1024, 2048]
    assert [metrics.extrapolated for metrics in plan.predicted] == [False, False, True]
    assert plan.predicted[2].loss > 0


def test_a_prompt_anchored_plan_is_judged_as_it_runs(tiny_profile):
    options = SearchOptions(density=[0.4], anchor="prompt", front_steps=0, length_weights={1024: 1})
    plan = search_profile(tiny_profile, options).chosen
    assert plan.anchor == "prompt"
    assert plan.predicted[1].attention_density == plan.anchored_at(1024).attention_density(1024)


class TestSeveralDensities:
    def test_one_plan_for_each_and_more_never_loses_more(self, tiny_profile):
        front = search_several(tiny_profile, SearchOptions(), [0.6, 0.2, 0.4, 0.8])
        assert front.asked == (0.2, 0.4, 0.6, 0.8)
        for plan, density in zip(front.plans, front.asked, strict=True):
            assert all(metrics.density <= density for metrics in plan.predicted)
        totals = [sum(metrics.loss for metrics in plan.predicted) for plan in front.plans]
        assert totals == sorted(totals, reverse=True)
        assert front.has_knee
        assert front.chosen in front.plans[1:-1]
        assert front.budgets == list(front.chosen.provenance.budgets)

    def test_without_a_knee_the_first_asked_for_is_chosen(self, tiny_profile):
        front = search_several(tiny_profile, SearchOptions(), [0.6, 0.2])
        assert not front.has_knee
        assert front.chosen is front.plans[1]

    @pytest.mark.parametrize("place", [0, 1])
    def test_the_knee_is_that_of_the_lengths_that_count(self, tiny_profile, place):
        length = tiny_profile.lengths[place]
        shares = [0.15, 0.2, 0.3, 0.4, 0.6, 0.8]
        front = search_several(tiny_profile, SearchOptions(length_weights={length: 1.0}), shares)
        losses = [next(m.loss for m in plan.predicted if m.length == length) for plan in front.plans]
        assert front.chosen_index == knee(shares, losses)
