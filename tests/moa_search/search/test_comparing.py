"""Searchers side by side."""

import pytest

from moa_search.errors import BudgetInfeasibleError, ConfigError
from moa_search.search import SEARCHERS, SearchOptions, search_profile
from moa_search.search.comparing import compare_searchers, default_searchers, predicted_losses
from moa_search.search.searchers import BIT_SEARCHERS
from tests.moa_search.formats.test_tiers import tiered


def test_all_are_judged_by_one_criterion(tiny_profile, bars):
    options = SearchOptions(density=[0.4], criterion="squared", front_steps=1)
    candidates = compare_searchers(tiny_profile, options, list(SEARCHERS))
    assert [candidate.searcher for candidate in candidates] == list(SEARCHERS)
    assert (len(SEARCHERS), len(SEARCHERS)) in bars["Searching"]
    by_name = {candidate.searcher: candidate for candidate in candidates}
    # Where a searcher decides by that criterion, its own prediction is the comparison's.
    for name in ("exact", "duo", "per-layer"):
        own = {m.length: (m.loss, m.loss_error) for m in by_name[name].plan.predicted}
        for length, (loss, error) in by_name[name].losses.items():
            assert (loss, error) == pytest.approx(own[length])
    assert by_name["moa"].losses[512] != by_name["moa"].plan.predicted[0].loss


def test_predicts_any_plan_of_the_model(tiny_profile, tiny_plan):
    losses = predicted_losses(tiny_profile, tiny_plan.model_copy(update={"block": 64}), "signed")
    assert sorted(losses) == [512, 1024]
    assert all(loss > 0 and error > 0 for loss, error in losses.values())


def test_native_layers_are_left_out(native_profile):
    plan = search_profile(native_profile, SearchOptions(density=[0.3], front_steps=0)).chosen
    assert predicted_losses(native_profile, plan, "signed")[512][0] == pytest.approx(plan.predicted[0].loss)


def test_an_unknown_searcher_is_named_before_the_work(tiny_profile):
    with pytest.raises(ConfigError, match="'moar' is unknown"):
        compare_searchers(tiny_profile, SearchOptions(density=[0.4]), ["exact", "moar"])


class TestInBytes:
    @pytest.fixture
    def profile(self, tiny_profile):
        return tiered(tiny_profile)

    def test_bits_are_compared_only_where_there_are_any(self, profile, tiny_profile):
        in_bytes, in_tokens = SearchOptions(kv_share=[0.6]), SearchOptions(density=[0.4])
        assert default_searchers(profile, in_bytes) == [*SEARCHERS, *BIT_SEARCHERS]
        for other in ((profile, in_tokens), (tiny_profile, in_bytes), (profile, in_bytes.replace(tiers=[16]))):
            assert default_searchers(*other) == list(SEARCHERS)

    def test_one_that_cannot_keep_the_budget_says_why_beside_the_others(self, profile):
        options = SearchOptions(kv_share=[0.1], front_steps=0)
        exact, dense = compare_searchers(profile, options, ["exact", "dense-bits"])
        assert exact.plan.share(1024) <= 0.1
        assert dense.plan is None
        assert not dense.losses
        assert "dense attention in the fewest bits already takes 0." in dense.note

    def test_a_budget_that_none_keeps_is_an_error(self, profile):
        with pytest.raises(BudgetInfeasibleError, match="can't be met"):
            compare_searchers(profile, SearchOptions(kv_share=[0.01]), ["exact", "dense-bits"])
