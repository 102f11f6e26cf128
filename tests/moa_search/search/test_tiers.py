"""A search that chooses bits beside rules, under budgets in bytes."""

import itertools

import numpy as np
import pytest

from moa_search.errors import BudgetInfeasibleError, ConfigError
from moa_search.formats import Plan
from moa_search.formats.criteria import statistic_of
from moa_search.formats.tiers import PLAIN
from moa_search.options import SearchOptions
from moa_search.search.front import Front
from moa_search.search.losses import plan_losses, rule_losses
from moa_search.search.searchers import find_searcher
from moa_search.search.searching import candidate_tiers, make_space, search_profile, search_several
from moa_search.spans import DENSE, SpanRule
from tests.moa_search.formats.test_tiers import tiered
from tests.moa_search.search.test_losses import looked_up

RULES = [SpanRule(40, 0), SpanRule(20, 96), DENSE]
TIERS = [(16, 16), (16, 4), (8, 2), (2, 8)]


@pytest.fixture
def profile(tiny_profile):
    return tiered(tiny_profile)


@pytest.mark.parametrize("criterion", ["signed", "squared", "root_squared"])
@pytest.mark.parametrize("anchor", ["position", "prompt"])
def test_losses_are_the_windows_and_the_square_that_rounding_adds(profile, criterion, anchor):
    name = statistic_of(criterion)
    found = rule_losses(profile, RULES, criterion, anchor=anchor, tiers=TIERS)
    for losses in found:
        entry, coded = profile.by_length[losses.length], profile.tiers.by_length[losses.length]
        header = profile.header
        heads = list(itertools.product(header.searchable_layers, range(header.model.num_key_value_heads)))
        for head, sample in itertools.product((0, len(heads) - 1), (0, entry.header.samples - 1)):
            place = (sample, *heads[head])
            for t, (key_bits, value_bits) in enumerate(TIERS):
                for r, rule in enumerate(RULES):
                    window = looked_up_in(profile, entry, entry.per_sample[name][place], rule, anchor)
                    changes = [
                        side[bits]["squared"][place][:, -1].astype(float).sum()
                        for side, bits in ((coded.keys, key_bits), (coded.values, value_bits))
                        if bits < 16
                    ]
                    noise, kept = max(sum(changes), 0), max(window, 0)
                    want = {
                        "signed": abs(window) + coded.answer_tokens[sample] * noise,
                        "squared": kept + noise,
                        "root_squared": (kept + noise) ** 0.5,
                    }
                    assert losses.per_sample[sample, head, t * len(RULES) + r] == pytest.approx(
                        want[criterion], rel=1e-6
                    )


def looked_up_in(profile, entry, values, rule, anchor):
    import tests.moa_search.search.test_losses as reference

    before = reference.SINK, reference.BLOCK
    reference.SINK, reference.BLOCK = profile.header.sink, profile.header.block
    try:
        return looked_up(entry, values, rule, anchor)
    finally:
        reference.SINK, reference.BLOCK = before


def test_a_plan_for_each_share_of_bytes_and_more_never_loses_more(profile):
    front = search_several(profile, SearchOptions(), [0.5, 0.2, 0.35], "kv_share")
    assert front.asked == (0.2, 0.35, 0.5)
    for plan, share in zip(front.plans, front.asked, strict=True):
        assert all(plan.share(length) <= share for length in profile.lengths)
        assert not plan.is_plain, "bits are chosen along with spans"
    totals = [sum(metrics.loss for metrics in plan.predicted) for plan in front.plans]
    assert totals == sorted(totals, reverse=True)


def test_sixteen_bits_alone_find_the_plans_of_spans_byte_for_byte(profile, tiny_profile):
    spans = search_profile(tiny_profile, SearchOptions(density=[0.5])).chosen
    asked = search_profile(profile, SearchOptions(density=[0.5], tiers=[16])).chosen
    by_default = search_profile(profile, SearchOptions(density=[0.5])).chosen
    for plan in (asked, by_default):
        assert plan.patterns == spans.patterns
        assert plan.dumps().replace(plan.provenance.profile, "").replace(plan.checksum, "") == spans.dumps().replace(
            spans.provenance.profile, ""
        ).replace(spans.checksum, "")


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_share_of_bytes_is_kept_at_every_length_and_nothing_feasible_is_better(profile, share):
    options = SearchOptions(kv_share=[share], front_steps=0)
    front = search_profile(profile, options)
    plan = front.chosen
    lengths = [budget.length for budget in plan.provenance.budgets]
    assert all(budget.share == share and budget.density is None for budget in plan.provenance.budgets)
    assert set(profile.lengths) <= set(lengths)
    for length in lengths:
        assert plan.share(length) <= share
    assert plan.schema_ == "moa-plan/2"
    assert [metrics.share for metrics in plan.predicted] == [plan.share(m.length) for m in plan.predicted]
    space = make_space(profile, options, find_searcher("exact"))
    total = sum(w * loss for w, loss in zip(space.weights.values(), space.objectives, strict=True))
    rng, tried = np.random.default_rng(0), 0
    for _ in range(4000):
        choice = rng.integers(total.shape[1], size=total.shape[0])
        if space.problem.is_feasible(choice):
            tried += 1
            assert total[np.arange(len(choice)), choice].sum() >= plan.provenance.dual_bound - 1e-9
    assert tried > 50


def test_rows_count_what_plans_count(profile):
    options = SearchOptions(kv_share=[0.4], budget=["kv=1MiB@512x3"], front_steps=0)
    space = make_space(profile, options, find_searcher("exact"))
    plan = search_profile(profile, options).chosen
    mine = [
        head
        for layer in profile.header.searchable_layers
        for head in zip(plan.rules[layer], plan.tiers[layer], strict=True)
    ]
    choice = [space.tiers.index(tier) * len(space.rules) + space.rules.index(rule) for rule, tier in mine]
    model, heads = profile.header.model, len(mine)
    for row in space.rows:
        kept, length = int(row.costs[choice].sum()), row.spec.length
        if row.spec.kind == "share":
            assert kept / (4 * model.head_dim * heads * length) == plan.share(length)
        else:
            assert row.fixed + row.step * kept == plan.kv_bytes(length, batch=3)


def test_losses_of_a_plan_count_its_bits(profile):
    plan = search_profile(profile, SearchOptions(kv_share=[0.3], front_steps=0)).chosen
    losses, choice = plan_losses(profile, plan, "signed")
    for metrics in plan.predicted:
        if not metrics.extrapolated:
            found = next(loss for loss in losses if loss.length == metrics.length)
            assert found.of_choice(choice)[0] == pytest.approx(metrics.loss)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"density": [0.5]}, {16}),
        ({"kv_share": [0.5]}, {16, 8, 4, 2}),
        ({"budget": ["kv=1MiB@512"]}, {16, 8, 4, 2}),
        ({"density": [0.5], "tiers": [4, 16]}, {16, 4}),
        ({"kv_share": [0.5], "tiers": [8]}, {8}),
    ],
)
def test_which_bits_are_chosen_from(profile, options, bits):
    tiers = candidate_tiers(profile, SearchOptions(**options))
    assert tiers == sorted(itertools.product(bits, bits), reverse=True)


def test_spans_profiles_keep_shares_with_sixteen_bits(tiny_profile):
    plan = search_profile(tiny_profile, SearchOptions(kv_share=[0.5], front_steps=0)).chosen
    assert plan.is_plain
    assert plan.density(tiny_profile.lengths[-1]) <= 0.5


@pytest.mark.parametrize("searcher", ["uniform", "duo", "recall"])
def test_baselines_without_tiers_store_sixteen_bits(profile, searcher):
    plan = search_profile(profile, SearchOptions(kv_share=[0.6], searcher=searcher)).chosen
    assert {tier for layer in plan.tiers for tier in layer} == {PLAIN}
    assert plan.share(profile.lengths[-1]) <= 0.6


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (
            {"tiers": [16, 3]},
            ConfigError,
            "the profile knows 16, 8, 4, 2 bits, not 3; measure them with moa-profile --tiers 16 3",
        ),
        ({"tiers": []}, ConfigError, "tiers names no bits"),
        ({"kv_share": [1.5]}, ConfigError, "kv_share: 1.5 is out of range"),
        ({"kv_share": [0.5], "criterion": "absolute"}, ConfigError, "criterion absolute isn't measured for fewer bits"),
        (
            {"kv_share": [0.001]},
            BudgetInfeasibleError,
            "can't be met: the smallest spans in the fewest bits already take 0.0",
        ),
        ({"budget": ["share=0.5@512x2"]}, ConfigError, "doesn't depend on the batch"),
        (
            {"budget": ["decode=12ms@512"], "tiers": [16, 4], "weights_bytes": 1},
            ConfigError,
            "needs the speeds|16 bits only",
        ),
    ],
)
def test_what_cannot_be_is_one_line(profile, options, error, says):
    with pytest.raises(error, match=says) as raised:
        search_profile(profile, SearchOptions(**{"density": [0.9], **options}))
    assert "\n" not in str(raised.value)


def test_profiles_of_spans_say_how_to_measure_tiers(tiny_profile):
    with pytest.raises(ConfigError, match="measure them with moa-profile --tiers 16 4"):
        search_profile(tiny_profile, SearchOptions(density=[0.5], tiers=[16, 4]))


def test_a_front_is_saved_with_the_transforms_of_its_plans(profile, tmp_path):
    front = search_profile(profile, SearchOptions(kv_share=[0.4]))
    front.save(tmp_path)
    assert Front.load(tmp_path).plans == front.plans
    assert Plan.load(tmp_path / "plan.json") == front.chosen
