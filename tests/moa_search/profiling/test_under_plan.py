"""Profiles of a model that runs under a plan, against autograd, explicit masks and the runtime."""

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from moa_search.calibration import Sample
from moa_search.errors import ConfigError, ModelMismatchError
from moa_search.evaluation.scoring import score_answer
from moa_search.formats import ModelSignature, Plan
from moa_search.masks import head_masks, span_mask
from moa_search.profiling import profile_samples
from moa_search.profiling.under_plan import planned_attention
from moa_search.runtime import applied
from moa_search.spans import DENSE, SpanRule
from tests.moa_search.architectures import make_model

LENGTH, SINK, BLOCK = 150, 3, 16
RULES = [[SpanRule(20, 64), SpanRule(-30, 200)], [SpanRule(40, 0), DENSE]]


def make_plan(model, **fields):
    native = [0] if getattr(model.config, "sliding_window", None) else []
    signature = ModelSignature.of(model.config)
    return Plan.from_rules(
        [list(heads) for heads in RULES], signature, native_layers=native, sink=2, block=12, **fields
    )


@pytest.fixture(scope="module")
def sample():
    return Sample(np.random.default_rng(0).integers(3, 64, LENGTH), 4, "passkey", 0.5, "random")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_statistics_are_derivatives_of_the_sparse_loss(architecture, sample):
    """Moving a head of the sparse model by what a window changes in full attention changes the loss by ``signed``."""
    model = make_model(architecture)
    plan = make_plan(model)
    profile = profile_samples(model, [sample], sink=SINK, block=BLOCK, row_buckets=4, under_plan=plan)
    entry = profile.by_length[LENGTH]
    mix = torch.zeros(2, 2, len(entry.header.windows), dtype=torch.float64, requires_grad=True)
    loss = mixed_loss(model, sample, plan, entry.header.windows, mix)
    loss.backward()
    mix.grad[list(plan.native_layers)] = 0
    assert entry.loss[0] == pytest.approx(loss.item(), rel=1e-6)
    assert (mix.grad[-1, :, :-1] != 0).all()
    signed = torch.from_numpy(entry.per_sample["signed"][0].sum(-2)).double()
    torch.testing.assert_close(signed, mix.grad, rtol=1e-4, atol=1e-5 * mix.grad.abs().max().item())


def mixed_loss(model, sample, plan, windows, mix):
    """The loss when head h of layer l gives ``o(plan) + sum_w mix[l, h, w] * (o(w) - o(full))``, by full matrices."""

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        group, layer = query.shape[1] // key.shape[1], module.layer_idx
        keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ keys.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + attention_mask
        sinks = [] if s_aux is None else [s_aux[None, :, None, None].expand(*scores.shape[:3], 1)]

        def output(kept):
            hidden = scores.masked_fill(~torch.as_tensor(kept), float("-inf"))
            return torch.cat([hidden, *sinks], -1).softmax(-1)[..., : keys.shape[2]] @ values

        dense = output(True)
        if layer in plan.native_layers:
            return dense.transpose(1, 2).contiguous(), None
        out = output(head_masks(plan.rules[layer], group, LENGTH, sink=plan.sink, min_span=plan.min_span))
        for number, window in enumerate(windows):
            rule = SpanRule(window + SINK, 0)
            under = output(span_mask(rule, LENGTH, sink=SINK, min_span=SINK + BLOCK))
            share = mix[layer, :, number].repeat_interleave(group)[None, :, None, None]
            out = out + share * (under - dense)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("mixed under a plan", attend)
    AttentionMaskInterface.register("mixed under a plan", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("mixed under a plan")
    try:
        logits = model(torch.from_numpy(sample.ids)[None], use_cache=False).logits[0, -sample.answer_tokens - 1 : -1]
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(sample.answer))
    finally:
        model.set_attn_implementation(before)


def test_attention_and_gradients_are_those_of_explicit_masks():
    torch.manual_seed(0)
    length = 300  # over two chunks of rows
    query, key, value, grad = (torch.randn(heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = planned_attention(*inputs, RULES[0], sink=SINK, min_span=SINK + BLOCK, scale=0.4)
    found = torch.autograd.grad(out, inputs, grad)
    masks = torch.from_numpy(head_masks(RULES[0], 2, length, sink=SINK, min_span=SINK + BLOCK))
    scores = (query @ key.repeat_interleave(2, 0).mT * 0.4).masked_fill(~masks, float("-inf"))
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 0)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, grad))


@pytest.mark.parametrize("anchor", ["position", "prompt"])
def test_loss_is_what_the_runtime_gives(sample, anchor):
    model = make_model("llama")
    plan = make_plan(model, anchor=anchor)
    profile = profile_samples(model, [sample], under_plan=plan)
    with applied(model, plan.anchored_at(LENGTH) if anchor == "prompt" else plan):
        expected = score_answer(model, sample).nll
    assert profile.by_length[LENGTH].loss[0] == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(score_answer(model, sample).nll, rel=1e-3)


def test_dense_plan_changes_nothing(sample):
    model = make_model("llama")
    plan = Plan.uniform(DENSE, ModelSignature.of(model.config))
    plain, under = (profile_samples(model, [sample], under_plan=given).by_length[LENGTH] for given in (None, plan))
    for name, values in plain.per_sample.items():
        np.testing.assert_allclose(under.per_sample[name], values, rtol=1e-5, atol=1e-9)


def test_checkpointing_changes_nothing(sample):
    model = make_model("llama")
    results = [
        profile_samples(model, [sample], under_plan=make_plan(model), checkpointing=flag).by_length[LENGTH]
        for flag in (False, True)
    ]
    assert results[0] == results[1]


def test_run_under_another_plan_is_not_continued(sample, tmp_path):
    model, partial = make_model("llama"), tmp_path / "partial"
    plan = make_plan(model)
    profile = profile_samples(model, [sample], under_plan=plan, partial=partial)
    assert profile.header.calibration["under_plan"] == plan.checksum
    assert profile_samples(model, [sample], under_plan=plan, partial=partial).run.resumed == 1
    other = Plan.uniform(SpanRule(60, 0), plan.model)
    for given in (None, other):
        with pytest.raises(ConfigError, match=r"calibration\.under_plan was sha256:"):
            profile_samples(model, [sample], under_plan=given, partial=partial)


def test_plans_that_do_not_fit_are_refused(sample):
    model = make_model("llama")
    stranger = make_plan(model).model_copy(update={"model": ModelSignature.of(make_model("gpt_oss").config)})
    with pytest.raises(ModelMismatchError, match="under_plan was made for another model"):
        profile_samples(model, [sample], under_plan=stranger)
    windowed = make_model("gemma2")
    plan = Plan.uniform(SpanRule(40, 0), ModelSignature.of(windowed.config))
    with pytest.raises(ModelMismatchError, match="layer 0 must be native"):
        profile_samples(windowed, [sample], under_plan=plan)
