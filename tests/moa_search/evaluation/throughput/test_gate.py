import copy

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from moa_search.errors import VerificationError
from moa_search.evaluation.throughput import Way, gate, made_up_plan
from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import apply_plan
from tests.moa_search.runtime.explicit import key_transforms

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
    "sliding_window": 40,
    "num_hidden_layers": 2,
}


def way_of(model, density, **options):
    return Way("half", "plan", made_up_plan(ModelSignature.of(model.config), density, **options))


def test_a_plan_at_work_is_as_exact_as_plain_attention(tiny_model):
    model = tiny_model[0]
    found = gate.verify(model, way_of(model, 0.25), seed=0)
    assert found.error <= 2 * found.yardstick < 1e-5
    assert found.dense > 100 * found.error, "else ignoring the plan would pass"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("config", "kind"), [(Gemma2Config, Gemma2ForCausalLM), (GptOssConfig, GptOssForCausalLM)], ids=["softcap", "sinks"]
)
def test_the_reference_knows_windows_soft_caps_and_sinks(config, kind):
    torch.manual_seed(0)
    model = kind(config(**SIZES)).eval()
    native = [i for i, name in enumerate(model.config.layer_types) if name == "sliding_attention"]
    found = gate.verify(model, way_of(model, 0.25, native_layers=native), seed=0)
    assert found.dense > 100 * found.error


TIERS = [[(2, 4), (16, 3)], [(8, 2), (4, 8)]]


def coded(model, seed):
    """A plan in few bits, whose transforms of keys depend on ``seed``."""
    signature = ModelSignature.of(model.config)
    plain = made_up_plan(signature, 0.25)
    transforms = key_transforms(signature, seed)
    return Way("bits", "plan", Plan.from_rules(plain.rules, signature, tiers=TIERS, transforms=transforms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_in_few_bits_is_compared_with_what_its_codes_give_back(tiny_model, dtype):
    model = copy.deepcopy(tiny_model[0]).to(dtype)
    for seed in range(3):
        found = gate.verify(model, coded(model, 0), seed)
        assert found.dense > 5 * found.error, "else ignoring the plan would pass"


@pytest.mark.parametrize("other", ["16 bits", "other transforms"])
def test_codes_that_are_not_the_plans_are_caught_on_every_draw(tiny_model, monkeypatch, other):
    model = tiny_model[0]
    wrong = way_of(model, 0.25).plan if other == "16 bits" else coded(model, 1).plan
    monkeypatch.setattr("moa_search.evaluation.throughput.ways.under", lambda model, plan: _Applied(model, wrong))
    monkeypatch.setattr("moa_search.evaluation.throughput.gate.MoACache", lambda config, plan: None)
    with pytest.raises(VerificationError, match="plan bits: its logits are off by"):
        gate.verify(model, coded(model, 0), seed=0)


def test_another_plan_than_the_one_stated_is_caught(tiny_model, monkeypatch):
    model = tiny_model[0]
    other = way_of(model, 0.3).plan
    monkeypatch.setattr("moa_search.evaluation.throughput.ways.under", lambda model, plan: _Applied(model, other))
    monkeypatch.setattr("moa_search.evaluation.throughput.gate.MoACache", lambda config, plan: None)
    with pytest.raises(VerificationError, match="plan half: its logits are off by"):
        gate.verify(model, way_of(model, 0.25), seed=0)


class _Applied:
    """Puts a model under a plan of its own choice."""

    def __init__(self, model, plan):
        self.model, self.plan = model, plan

    def __enter__(self):
        return apply_plan(self.model, self.plan)

    def __exit__(self, *error):
        from moa_search.runtime import remove_plan

        remove_plan(self.model)
