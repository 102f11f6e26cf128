"""True sparse loss against a model with explicit masks, and what is measured when."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from moa_search.data import Sample, hash_samples
from moa_search.errors import ConfigError, MoAError, ModelMismatchError
from moa_search.evaluation import true_loss
from moa_search.evaluation.loss_cache import LossCache
from moa_search.evaluation.scoring import AnswerScore
from moa_search.evaluation.true_loss import TrueLoss
from moa_search.formats import ModelSignature, Plan
from moa_search.masks import head_masks
from moa_search.runtime import apply_plan
from moa_search.spans import DENSE, SpanRule


@pytest.fixture
def signature(tiny_model):
    return ModelSignature.of(tiny_model[0].config)


@pytest.fixture
def plan(signature):
    """Keeps few tokens, each head differently."""
    rules = [[SpanRule(60, 0), SpanRule(0, 64)], [SpanRule(-20, 128), SpanRule(48, 0)]]
    return Plan.from_rules(rules, signature, sink=4, block=16)


def sample(length, answer, task, seed, **fields):
    ids = np.random.default_rng(seed).integers(0, 256, length)
    return Sample(ids, answer, task, 0.5, "", **fields)


@pytest.fixture
def samples():
    """Two lengths, mixed; one sample is shorter than its length."""
    return [
        sample(200, 5, "passkey", 0),
        sample(300, 9, "copy", 1),
        sample(200, 9, "copy", 2),
        sample(290, 2, "passkey", 3, target_length=300),
        sample(200, 5, "passkey", 4),
    ]


@pytest.fixture
def scored(monkeypatch):
    """Lengths of the samples that are really run, as they are run."""
    seen, original = [], true_loss.score_answer

    def counting(model, one):
        seen.append(one.length)
        return original(model, one)

    monkeypatch.setattr(true_loss, "score_answer", counting)
    return seen


def explicit_loss(model, sample, plan):
    """Loss of one sample in a copy of the model whose attention is a softmax under whole masks."""

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        length, group = query.shape[2], query.shape[1] // key.shape[1]
        rules = plan.rules[module.layer_idx]
        mask = torch.from_numpy(head_masks(rules, group, length, sink=plan.sink, min_span=plan.min_span))
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    AttentionInterface.register("explicit_masks", attention)
    AttentionMaskInterface.register("explicit_masks", lambda *args, **kwargs: None)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("explicit_masks")
    ids = torch.from_numpy(sample.ids)[None]
    with torch.no_grad():
        log_probabilities = reference(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    at = range(sample.length - sample.answer_tokens, sample.length)
    return float(np.mean([-log_probabilities[i - 1, ids[0, i]].item() for i in at]))


class TestLoss:
    def test_is_that_of_explicit_masks(self, tiny_model, samples, plan):
        model, _ = tiny_model
        losses = TrueLoss(model, samples).loss(plan)
        np.testing.assert_allclose(losses, [explicit_loss(model, s, plan) for s in samples], rtol=1e-5)

    def test_without_a_plan_is_dense(self, tiny_model, signature, samples, plan):
        model, _ = tiny_model
        truth, all_kept = TrueLoss(model, samples), Plan.uniform(DENSE, signature)
        dense = truth.loss(None)
        np.testing.assert_allclose(dense, [explicit_loss(model, s, all_kept) for s in samples], rtol=1e-5)
        np.testing.assert_allclose(truth.loss(all_kept), dense, rtol=1e-5)
        assert (abs(truth.loss(plan) - dense) > 1e-5).all()

    def test_plans_of_the_prompt_run_with_their_spans_for_the_length(self, tiny_model, samples, plan):
        model, _ = tiny_model
        by_prompt = plan.model_copy(update={"anchor": "prompt"})
        expected = [explicit_loss(model, s, plan.anchored_at(s.target_length)) for s in samples]
        truth = TrueLoss(model, samples)
        np.testing.assert_allclose(truth.loss(by_prompt), expected, rtol=1e-5)
        assert (truth.loss(plan) != truth.loss(by_prompt)).any()

    def test_progress_counts_tokens_of_kept_results_too(self, tiny_model, samples, plan, bars):
        truth = TrueLoss(tiny_model[0], samples)
        truth.loss(plan)
        seen = bars.pop("Measuring losses")
        assert seen[:-1] == [(200, 1200), (400, 1200), (600, 1200), (900, 1200), (1200, 1200)]
        truth.loss(plan)
        assert bars["Measuring losses"][:-1] == [(600, 1200), (1200, 1200)]

    def test_of_another_model_is_refused(self, tiny_model, samples, tiny_plan):
        with pytest.raises(ModelMismatchError):
            TrueLoss(tiny_model[0], samples).loss(tiny_plan)

    def test_no_samples(self, tiny_model):
        with pytest.raises(ConfigError, match="no sample"):
            TrueLoss(tiny_model[0], [])


class TestMeasuredOnce:
    def test_in_one_process_and_in_the_next(self, tiny_model, samples, plan, scored, tmp_path):
        first = TrueLoss(tiny_model[0], samples, LossCache(tmp_path))
        losses = first.loss(plan)
        assert len(scored) == 5
        np.testing.assert_array_equal(first.loss(plan), losses)
        again = TrueLoss(tiny_model[0], samples, LossCache(tmp_path))
        np.testing.assert_array_equal(again.loss(plan), losses)
        assert again.evaluate(plan) == first.evaluate(plan)
        assert len(scored) == 5

    def test_under_whatever_name_and_prediction(self, tiny_model, samples, plan, scored):
        truth = TrueLoss(tiny_model[0], samples)
        truth.loss(plan)
        truth.loss(plan.model_copy(update={"library_version": "0", "provenance": None}))
        assert len(scored) == 5

    def test_but_other_plans_samples_weights_and_types_anew(self, tiny_model, samples, plan, scored, tmp_path):
        model, _ = tiny_model
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight *= 1.01
        losses = [
            TrueLoss(network, items, LossCache(tmp_path)).loss(one)
            for network, items, one in (
                (model, samples, plan),
                (model, samples, None),
                (model, samples, plan.model_copy(update={"sink": 5})),
                (model, [sample(200, 5, "passkey", 9), *samples[1:]], plan),
                (other, samples, plan),
                (copy.deepcopy(model).double(), samples, plan),
            )
        ]
        # The fourth shares its samples of 300 tokens with the first.
        assert len(scored) == 5 * 6 - 2
        assert len({tuple(each) for each in losses[:5]}) == 5  # the last differs in rounding at most

    def test_a_damaged_file_is_measured_again(self, tiny_model, samples, plan, scored, tmp_path):
        losses = TrueLoss(tiny_model[0], samples, LossCache(tmp_path)).loss(plan)
        broken = next(path for path in tmp_path.iterdir() if "-300-" in path.name)
        whole = broken.read_bytes()
        broken.write_bytes(whole[:-20])
        scored.clear()
        again = TrueLoss(tiny_model[0], samples, LossCache(tmp_path)).loss(plan)
        assert scored == [300, 290]
        np.testing.assert_array_equal(again, losses)
        assert broken.read_bytes() == whole

    def test_a_stopped_run_loses_one_length_at_most(self, tiny_model, samples, plan, tmp_path, monkeypatch):
        seen, original = [], true_loss.score_answer

        def stopping(model, one):
            if len(seen) == 4:
                raise KeyboardInterrupt
            seen.append(one.length)
            return original(model, one)

        monkeypatch.setattr(true_loss, "score_answer", stopping)
        with pytest.raises(KeyboardInterrupt):
            TrueLoss(tiny_model[0], samples, LossCache(tmp_path)).loss(plan)
        assert seen == [200, 200, 200, 300]
        assert len(list(tmp_path.iterdir())) == 1
        seen.clear()
        losses = TrueLoss(tiny_model[0], samples, LossCache(tmp_path)).loss(plan)
        assert seen == [300, 290]
        monkeypatch.setattr(true_loss, "score_answer", original)
        np.testing.assert_array_equal(losses, TrueLoss(tiny_model[0], samples).loss(plan))


class TestTheModelEndsDense:
    @pytest.fixture
    def check(self, tiny_model):
        """Fails if the model attends otherwise than before."""
        model, _ = tiny_model
        ids = torch.arange(200)[None]
        with torch.no_grad():
            before, attention = model(input_ids=ids).logits, model.config._attn_implementation
        yield
        assert model.config._attn_implementation == attention
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, before)

    @pytest.mark.usefixtures("check")
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_after_an_error(self, tiny_model, samples, plan, monkeypatch, error):
        def fail(model, one):
            assert hasattr(model.config, "moa_plan")
            raise error

        monkeypatch.setattr(true_loss, "score_answer", fail)
        with pytest.raises(error):
            TrueLoss(tiny_model[0], samples).loss(plan)

    @pytest.mark.usefixtures("check")
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_after_a_loss_that_is_none(self, tiny_model, samples, plan, monkeypatch, value):
        monkeypatch.setattr(true_loss, "score_answer", lambda *a: AnswerScore(np.full(1, value), np.zeros(1, bool)))
        with pytest.raises(MoAError, match=f"the loss of a passkey sample of 200 tokens is {value}; try --dtype"):
            TrueLoss(tiny_model[0], samples).loss(plan)

    @pytest.mark.usefixtures("check")
    def test_out_of_memory_is_said_in_one_line(self, tiny_model, samples, plan, monkeypatch):
        def fail(model, one):
            raise torch.OutOfMemoryError

        monkeypatch.setattr(true_loss, "score_answer", fail)
        with pytest.raises(MoAError, match="passkey sample of 200 tokens doesn't fit the GPU's memory"):
            TrueLoss(tiny_model[0], samples).loss(plan)

    @pytest.mark.usefixtures("check")
    def test_and_starts_dense_too(self, tiny_model, samples, plan):
        model, _ = tiny_model
        dense = TrueLoss(model, samples).loss(None)
        apply_plan(model, plan)
        np.testing.assert_array_equal(TrueLoss(model, samples).loss(None), dense)


class TestMean:
    def test_lengths_and_sources_count_the_same(self, tiny_model, samples):
        truth = TrueLoss(tiny_model[0], samples)
        values = np.array([1.0, 20, 10, 40, 3])
        assert truth.mean(values, 200).value == ((1 + 3) / 2 + 10) / 2
        assert truth.mean(values, 300).value == 30
        assert truth.mean(values).value == (6 + 30) / 2

    def test_tells_no_error_from_one_sample(self, tiny_model, samples):
        truth = TrueLoss(tiny_model[0], samples)
        assert truth.mean(np.zeros(5)).error is None
        assert truth.mean(np.zeros(5), 200).error is None

    def test_sources_of_one_task_are_told_apart(self, tiny_model):
        items = [sample(50, 3, "copy", seed, source="abb"[seed]) for seed in range(3)]
        assert TrueLoss(tiny_model[0], items).mean(np.array([1.0, 3, 5])).value == (1 + 4) / 2

    def test_error_is_that_of_repeated_draws(self, tiny_model):
        """Standard deviation of the mean over many draws, from four groups of other sizes and spreads."""
        groups = {(50, "a"): (2, 1.0), (50, "b"): (12, 5.0), (60, "a"): (30, 2.0), (60, "b"): (6, 0.5)}
        items = [
            sample(length, 3, "copy", 0, source=name)
            for (length, name), (count, _) in groups.items()
            for _ in range(count)
        ]
        spread = np.concatenate([[sigma] * count for count, sigma in groups.values()])
        truth, rng = TrueLoss(tiny_model[0], items), np.random.default_rng(0)
        drawn = [truth.mean(rng.normal(size=len(items)) * spread) for _ in range(4000)]
        squared = np.mean([estimate.error**2 for estimate in drawn])
        assert squared == pytest.approx(np.var([estimate.value for estimate in drawn]), rel=0.1)

    def test_difference_is_paired(self, tiny_model):
        """What all plans find hard alike doesn't blur it."""
        items = [sample(50, 3, "copy", 0) for _ in range(20)]
        truth, rng = TrueLoss(tiny_model[0], items), np.random.default_rng(0)
        hard, more = rng.normal(size=20) * 10, rng.normal(1, 0.1, size=20)
        difference = truth.mean((hard + more) - hard)
        assert difference.value == pytest.approx(more.mean())
        assert difference.error == pytest.approx(more.std(ddof=1) / np.sqrt(20))


def test_validations_are_those_of_each_length(tiny_model, samples, plan):
    truth = TrueLoss(tiny_model[0], samples)
    losses, dense = truth.loss(plan), truth.loss(None)
    short, long = truth.validations(plan)
    assert (short.length, short.samples, long.length, long.samples) == (200, 3, 300, 2)
    assert short.data == hash_samples([samples[0], samples[2], samples[4]]) == truth.data_hashes[200]
    assert short.loss == pytest.approx((losses[[0, 4]].mean() + losses[2]) / 2)
    assert short.dense_loss == pytest.approx((dense[[0, 4]].mean() + dense[2]) / 2)
    assert long.loss == pytest.approx(losses[[1, 3]].mean())
    assert truth.evaluate(plan) == pytest.approx((short.loss + long.loss) / 2)
    assert truth.data_hash == hash_samples(samples)
    assert (truth.lengths, truth.tokens) == ((200, 300), 1200)
    written = plan.model_copy(update={"validated": (short, long)})
    assert Plan.loads(written.dumps()).validated == (short, long)
