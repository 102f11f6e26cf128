"""What the searchers of precision promise, under budgets in bytes."""

import itertools

import numpy as np
import pytest

from moa_search.errors import BudgetInfeasibleError
from moa_search.search import SearchOptions, search_profile
from moa_search.search.searchers import BIT_SEARCHERS, find_searcher
from moa_search.search.searching import make_space
from moa_search.search.trade_off import weigh
from tests.moa_search.formats.test_tiers import tiered


@pytest.fixture(scope="module", params=sorted(BIT_SEARCHERS))
def name(request):
    return request.param


@pytest.fixture
def profile(tiny_profile):
    return tiered(tiny_profile)


def search(profile, name, share=0.6, **options):
    asked = {"predict_lengths": (), "front_steps": 0, **options}
    return search_profile(profile, SearchOptions(kv_share=[share], searcher=name, **asked))


def chosen(plan):
    """``(rule, tier)`` of every head, by layer."""
    return [list(zip(*layer, strict=True)) for layer in zip(plan.rules, plan.tiers, strict=True)]


def test_keeps_every_budget_and_says_who_chose(profile, name):
    plan = search(profile, name, budget=["kv=1MiB@700"]).chosen
    assert all(plan.share(length) <= 0.6 for length in profile.lengths)
    assert plan.kv_bytes(700) <= 2**20
    assert plan.provenance.searcher == name
    proves = find_searcher(name).proves
    assert (plan.provenance.gap is not None) == proves
    if proves:
        assert 0 <= plan.provenance.dual_bound <= plan.provenance.objective
    assert search(profile, name, budget=["kv=1MiB@700"]).chosen.dumps() == plan.dumps()


def test_less_than_it_can_keep_names_the_least(profile, name):
    with pytest.raises(BudgetInfeasibleError, match=r"share=0\.02@\d+ can't be met: .* takes? 0\.\d+"):
        search(profile, name, 0.02)


def test_keeps_floors(profile, name):
    plan = search(profile, name, 0.8, min_span=120).chosen
    assert min(min(layer) for layer in plan.spans(512)) >= 120


def test_what_each_may_choose(profile):
    one = {(rule, tier) for layer in chosen(search(profile, "uniform-bits").chosen) for rule, tier in layer}
    assert len(one) == 1
    dense = search(profile, "dense-bits").chosen
    assert {rule.is_dense for layer in dense.rules for rule in layer} == {True}
    assert len({tier for layer in dense.tiers for tier in layer}) == 1
    layers = search(profile, "layer-bits").chosen
    assert {rule.is_dense for layer in layers.rules for rule in layer} == {True}
    assert all(len(set(tiers)) == 1 for tiers in layers.tiers)
    assert len({tier for layer in search(profile, "one-bits").chosen.tiers for tier in layer}) == 1
    assert search(profile, "spans").chosen.is_plain


def test_dense_bits_are_the_largest_that_fit(profile):
    plan = search(profile, "dense-bits", 0.6).chosen
    (tier,) = {tier for layer in plan.tiers for tier in layer}
    space = make_space(profile, SearchOptions(kv_share=[0.6]), find_searcher("dense-bits"))
    dense = next(index for index, rule in enumerate(space.rules) if rule.is_dense)
    sizes = {t: space.problem.costs[:, i * len(space.rules) + dense] for i, t in enumerate(space.tiers)}
    heads = len(space.problem.losses)
    fitting = {t: size.sum() for t, size in sizes.items() if (size * heads <= space.problem.limits).all()}
    assert fitting[tier] == max(fitting.values())
    assert len(fitting) < len(sizes)


def test_bits_per_layer_are_the_best_there_are(profile):
    options = SearchOptions(kv_share=[0.5], predict_lengths=())
    space = make_space(profile, options, find_searcher("layer-bits"))
    dense = next(index for index, rule in enumerate(space.rules) if rule.is_dense)
    places = [tier * len(space.rules) + dense for tier in range(len(space.tiers))]
    _, losses = weigh(space.objectives, space.problem, list(space.weights.values()))
    layers, size = space.problem.layers, space.heads_per_layer
    by_layer = losses.reshape(layers, size, -1).sum(1)[:, places]
    costs = size * space.problem.costs[:, places]
    best = min(
        sum(by_layer[layer, tier] for layer, tier in enumerate(tiers))
        for tiers in itertools.product(range(len(places)), repeat=layers)
        if (costs[:, list(tiers)].sum(1) <= space.problem.limits).all()
    )
    found = search(profile, "layer-bits", 0.5).chosen.provenance
    assert found.objective == pytest.approx(best, rel=1e-6)
    assert found.dual_bound <= best * (1 + 1e-9)


def test_none_is_predicted_to_lose_less_than_spans_and_bits_together(profile):
    best = search(profile, "exact").chosen.provenance
    for name in BIT_SEARCHERS:
        plan = search(profile, name).chosen
        lost = sum(best.length_weights[str(metrics.length)] * metrics.loss for metrics in plan.predicted)
        assert lost >= best.dual_bound * (1 - 1e-9)


def test_one_precision_is_the_best_of_all(profile):
    """Each precision alone, by the exact search, loses no less."""
    plan = search(profile, "one-bits").chosen
    (tier,) = {tier for layer in plan.tiers for tier in layer}
    space = make_space(profile, SearchOptions(kv_share=[0.6], predict_lengths=()), find_searcher("one-bits"))
    _, losses = weigh(space.objectives, space.problem, list(space.weights.values()))
    rng, heads, rules = np.random.default_rng(0), len(losses), len(space.rules)
    tried = 0
    for _ in range(3000):
        choice = rng.integers(rules, size=heads) + rng.integers(len(space.tiers)) * rules
        if space.problem.is_feasible(choice):
            tried += 1
            assert losses[np.arange(heads), choice].sum() >= plan.provenance.dual_bound * (1 - 1e-9)
    assert tried > 50
    assert tier in space.tiers
