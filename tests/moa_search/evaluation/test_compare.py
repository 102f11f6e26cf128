"""Variants of one model on the same items."""

import numpy as np
import pandas as pd
import pytest
import torch

from moa_search.errors import ConfigError
from moa_search.evaluation import compare as compare_module
from moa_search.evaluation import compare_variants, make_variants
from moa_search.evaluation.compare import Variant, uniform_like
from moa_search.formats import ModelSignature, Plan
from moa_search.spans import DENSE, SpanRule
from moa_search.tasks import TASKS
from tests.moa_search.runtime.explicit import key_transforms

LENGTHS = [300, 500]


@pytest.fixture
def signature(tiny_model):
    return ModelSignature.of(tiny_model[0].config)


@pytest.fixture
def short(signature):
    """Keeps few tokens, each head differently."""
    return Plan.from_rules([[SpanRule(60, 0), SpanRule(0, 64)], [SpanRule(90, 0), SpanRule(48, 0)]], signature)


def names(compared):
    return [variant.name for variant in compared.variants]


class TestVariants:
    def test_baselines_stand_before_their_plans(self, short, signature):
        longer = Plan.uniform(SpanRule(200, 0), signature)
        compared = make_variants([{"a": short}, {"b": longer}], ["uniform", "dense"])
        assert names(compared) == ["dense", "uniform like a", "a", "uniform like b", "b"]
        assert compared.variants[0].plan_at(300) is None
        assert compared.variants[2].plan_at(300) is short
        assert compared.variants[4].plan_at(500) is longer
        assert compared.uniform == {"a": "uniform like a", "b": "uniform like b"}
        assert compared.pairs == [("a", "uniform like a"), ("b", "uniform like b")]

    def test_plans_for_one_budget_share_a_baseline(self, short, signature):
        longer = Plan.uniform(SpanRule(200, 0), signature)
        compared = make_variants([{"a": short, "b": longer}], ["uniform"])
        assert names(compared) == ["uniform like a", "a", "b"]
        assert compared.uniform == {"a": "uniform like a", "b": "uniform like a"}
        assert compared.pairs == [("a", "uniform like a"), ("a", "b")]

    def test_a_plan_anchored_at_the_prompt_runs_with_its_spans_for_the_length(self, signature):
        prompt = Plan.uniform(SpanRule(0, 128), signature, anchor="prompt")
        (variant,) = make_variants([{"a": prompt}], []).variants
        assert variant.plan_at(300).spans(100) == [[100] * 2] * 2
        assert variant.plan_at(300).spans(299) == variant.plan_at(300).spans(300) == [[150] * 2] * 2
        assert variant.plan_at(500).anchor == "position"

    def test_a_baseline_has_the_memory_of_its_plan(self, short):
        _, uniform, _ = make_variants([{"a": short}], ["dense", "uniform"]).variants
        assert uniform.plan_at(300) == uniform_like(short, 300)
        assert uniform.plan_at(500) == uniform_like(short, 500)

    def test_a_name_says_the_same_whatever_else_is_compared(self, short, signature):
        """So that tables of different runs can be joined by it."""
        plans = {"a": short, "b": Plan.from_rules([layer[::-1] for layer in short.rules], signature)}
        alone = [make_variants([{name: plan}], ["dense", "uniform"]) for name, plan in plans.items()]
        together = make_variants([{name: plan} for name, plan in plans.items()], ["uniform"])
        at = {variant.name: variant.plan_at(300) for compared in alone for variant in compared.variants}
        assert {variant.name: variant.plan_at(300) for variant in together.variants}.items() <= at.items()

    def test_nothing_asked_for(self):
        with pytest.raises(ConfigError, match="nothing to evaluate"):
            make_variants([], [])

    def test_unknown_baseline_suggests_the_nearest(self, short):
        with pytest.raises(ConfigError, match=r"'dens' is unknown \(did you mean 'dense'\?\)"):
            make_variants([{"a": short}], ["dens"])

    def test_uniform_needs_a_plan_to_match(self):
        with pytest.raises(ConfigError, match="give --plan"):
            make_variants([], ["dense", "uniform"])


@pytest.mark.parametrize("length", [1, 50, 300, 500, 2000])
def test_uniform_keeps_what_the_plan_keeps_to_a_token_per_head(short, length):
    uniform = uniform_like(short, length)
    kept = [sum(map(sum, plan.spans(length))) for plan in (short, uniform)]
    assert abs(kept[0] - kept[1]) <= 4 * 0.5
    assert len({rule for layer in uniform.rules for rule in layer}) == 1
    assert (uniform.sink, uniform.block, uniform.model) == (short.sink, short.block, short.model)


def test_uniform_leaves_native_layers_native(native_plan):
    uniform = uniform_like(native_plan, 500)
    assert uniform.native_layers == native_plan.native_layers
    assert len({rule for layer in (0, 2) for rule in uniform.rules[layer]}) == 1
    assert uniform.density(500) == pytest.approx(native_plan.density(500), abs=0.5 / 500)


def compare(tiny_model, variants, **changes):
    model, tokenizer = tiny_model
    options = {"tasks": ["passkey", "copy"], "lengths": [300], "count": 2, "seed": 0, **changes}
    return compare_variants(model, tokenizer, variants, **options)


DENSE_MODEL = Variant("dense", lambda length: None)


def always(name, plan):
    return Variant(name, lambda length: plan)


def test_dense_scores_are_those_of_a_plain_forward_pass(tiny_model):
    model, tokenizer = tiny_model
    rows = compare(tiny_model, [DENSE_MODEL])
    assert len(rows) == 4
    for task in ("passkey", "copy"):
        samples = TASKS[task].held_out(tokenizer, length=300, count=2, seed=0)
        mine = rows[rows["task"] == task]
        assert mine["depth"].tolist() == [sample.depth for sample in samples]
        for sample, (_, row) in zip(samples, mine.iterrows(), strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(sample.ids)[None]).logits[0]
            wanted = torch.from_numpy(sample.answer)
            predicted = logits[-len(wanted) - 1 : -1]
            assert row["nll"] == pytest.approx(torch.nn.functional.cross_entropy(predicted, wanted).item(), rel=1e-5)
            hits = (predicted.argmax(-1) == wanted).numpy()
            assert row["score"] == (float(hits.all()) if task == "passkey" else hits.mean())


def test_a_plan_that_keeps_everything_scores_as_dense(tiny_model, signature):
    rows = compare(tiny_model, [DENSE_MODEL, always("all", Plan.uniform(DENSE, signature))])
    dense, everything = (rows[rows["variant"] == name] for name in ("dense", "all"))
    np.testing.assert_allclose(everything["nll"].to_numpy(), dense["nll"].to_numpy(), rtol=1e-5)
    assert everything["score"].tolist() == dense["score"].tolist()


def test_a_plan_takes_effect_on_its_own_rows_only(tiny_model, short):
    rows = compare(tiny_model, [DENSE_MODEL, always("short", short)])
    nll = {name: rows[rows["variant"] == name]["nll"].to_numpy() for name in ("dense", "short")}
    assert (compare(tiny_model, [DENSE_MODEL])["nll"] == nll["dense"]).all(), "the model is dense again"
    assert (abs(nll["short"] - nll["dense"]) > 1e-5).all()


def test_what_acts_the_same_is_measured_once(tiny_model, short, monkeypatch, bars):
    """Uniform spans like two plans of one memory are the same plan."""
    runs, original = [], compare_module.measure
    monkeypatch.setattr(compare_module, "measure", lambda *a, **b: runs.append(a) or original(*a, **b))
    variants = [always("short", short), always("same", short.model_copy(update={"predicted": ()})), DENSE_MODEL]
    rows = compare(tiny_model, variants, tasks=["passkey"])
    assert len(runs) == 2
    assert bars["Evaluating"][-1] == (1800, 1800)
    mine, other = (rows[rows["variant"] == name].drop(columns="variant") for name in ("short", "same"))
    pd.testing.assert_frame_equal(mine.reset_index(drop=True), other.reset_index(drop=True))


def test_rows_say_what_was_run(tiny_model, short):
    rows = compare(tiny_model, [DENSE_MODEL, always("short", short)], lengths=[300, 500], count=1)
    assert rows[["length", "task", "variant"]].to_numpy().tolist() == [
        [length, task, variant]
        for length in (300, 500)
        for task in ("passkey", "copy")
        for variant in ("dense", "short")
    ]
    for _, row in rows.iterrows():
        of_plan = row["variant"] == "short"
        assert row["density"] == (short.density(row["length"]) if of_plan else 1)
        assert row["attention_density"] == (short.attention_density(row["length"]) if of_plan else 1)
        share = short.share(row["length"]) if of_plan else 1
        assert (row["kv_share"], row["kv_peak"]) == (share, share + (1 - share) / 2), "one of two layers is whole"
        assert row["metric"] == TASKS[row["task"]].metric
        assert row["item"] == 0


def test_items_count_once_though_named_twice(tiny_model):
    rows = compare(tiny_model, [DENSE_MODEL], tasks=["copy", "copy"], lengths=[300, 300])
    assert rows["item"].tolist() == [0, 1]


def test_progress_counts_tokens(tiny_model, short, bars):
    compare(
        tiny_model,
        [DENSE_MODEL, always("short", short)],
        tasks=["copy"],
        lengths=[300, 500],
        count=1,
    )
    assert bars["Evaluating"][:4] == [(300, 1600), (600, 1600), (1100, 1600), (1600, 1600)]


def test_unknown_task_is_found_before_any_work(tiny_model):
    with pytest.raises(ConfigError, match="'paskey' is unknown"):
        compare(tiny_model, [Variant("never", lambda length: 1 / 0)], tasks=["copy", "paskey"])


def test_the_model_is_dense_again_even_after_an_error(tiny_model, short, monkeypatch):
    model, _ = tiny_model
    ids = torch.arange(200)[None]
    with torch.no_grad():
        before, attention = model(input_ids=ids).logits, model.config._attn_implementation

    def fail(model, sample):
        assert model.config._attn_implementation != attention
        raise RuntimeError("out of memory")

    monkeypatch.setattr("moa_search.evaluation.scoring.score_answer", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        compare(tiny_model, [always("short", short)])
    assert model.config._attn_implementation == attention
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("bits", [8, 4])
def test_uniform_takes_the_bytes_of_a_plan_in_few_bits(short, bits):
    tiers = [[(bits, bits)] * len(heads) for heads in short.patterns]
    coded = Plan.from_rules(
        [[SpanRule(400, 0)] * len(heads) for heads in short.patterns],
        short.model,
        tiers=tiers,
        transforms=key_transforms(short.model),
        sink=short.sink,
        block=short.block,
    )
    uniform = uniform_like(coded, 500)
    assert uniform.is_plain
    assert uniform.share(500) == pytest.approx(coded.share(500), abs=1 / 500)
    assert uniform.density(500) < coded.density(500)
