from __future__ import annotations

import pytest
import torch

from moa_search.errors import ConfigError, ModelMismatchError, ModelUnsupportedError
from moa_search.masks import span_mask
from moa_search.runtime.rules import LayerRules, layer_rules

from .explicit import RULES, tiny_model, tiny_plan


@pytest.mark.parametrize("sliding_window", [None, 1, 17])
def test_windows_are_those_of_the_masks(sliding_window):
    rules = LayerRules(RULES, sink=4, block=8, sliding_window=sliding_window)
    i, j = torch.arange(150)[:, None], torch.arange(150)
    for rule, oldest in zip(RULES, rules.head_spans.oldest_key(i), strict=True):
        mask = torch.from_numpy(span_mask(rule, 150, sink=4, min_span=12))
        if sliding_window is not None:
            mask = mask & (i - j < sliding_window)
        beyond_sink = (j >= 4) & (j >= oldest) & (j <= i)
        assert torch.equal(beyond_sink, mask & (j >= 4))


def test_capacities_hold_what_the_plan_counts_and_never_more_than_the_length():
    rules = LayerRules(RULES, sink=4, block=8)
    model = tiny_model(num_attention_heads=6, num_key_value_heads=6, num_hidden_layers=1)
    plan = tiny_plan(model)
    assert rules.capacities(80) == plan.spans(80)[0]
    assert rules.capacities(80, slack=16) == [min(span + 16, 80) for span in plan.spans(80)[0]]
    assert max(LayerRules(RULES, 4, 8, sliding_window=10).capacities(80)) == 14


def test_heads_with_one_rule_are_found_together():
    rules = LayerRules((RULES[0], RULES[1], RULES[0]), sink=4, block=8)
    assert rules.heads_by_rule == {RULES[0]: (0, 2), RULES[1]: (1,)}


def test_a_prompt_anchored_plan_is_refused_with_the_way_out():
    model = tiny_model()
    plan = tiny_plan(model).model_copy(update={"anchor": "prompt"})
    with pytest.raises(ConfigError, match=r"anchored_at\(length\)"):
        layer_rules(plan, model.config)
    layer_rules(plan.anchored_at(100), model.config)


def test_a_plan_for_another_model_names_what_differs():
    plan = tiny_plan(tiny_model())
    with pytest.raises(ModelMismatchError, match="num_key_value_heads: 2 != 3"):
        layer_rules(plan, tiny_model(num_key_value_heads=3).config)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("is_encoder_decoder", True, "encoder-decoder"),
        ("is_causal", False, "causal"),
        ("kv_lora_rank", 16, "MLA"),
        ("num_kv_shared_layers", 1, "share"),
        ("attention_chunk_size", 32, "chunked"),
    ],
)
def test_architectures_that_cannot_follow_a_plan_are_refused_with_the_reason(attribute, value, reason):
    model = tiny_model()
    plan = tiny_plan(model)
    setattr(model.config, attribute, value)
    with pytest.raises(ModelUnsupportedError, match=reason):
        layer_rules(plan, model.config)
