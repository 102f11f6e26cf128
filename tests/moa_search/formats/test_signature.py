from __future__ import annotations

from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from transformers import GPT2Config, LlamaConfig

from moa_search.errors import ModelMismatchError, ModelUnsupportedError
from moa_search.formats import ModelSignature

LLAMA = LlamaConfig(num_hidden_layers=3, num_attention_heads=9, num_key_value_heads=3, hidden_size=576, rope_theta=1e5)


def test_of_a_transformers_configuration() -> None:
    signature = ModelSignature.of(LLAMA)
    assert signature.architecture == "llama"
    assert signature.num_hidden_layers == 3
    assert signature.num_attention_heads == 9
    assert signature.num_key_value_heads == 3
    assert signature.head_dim == 64
    assert signature.group == 3
    assert signature.config["hidden_size"] == 576
    assert "100000" in str(signature.rope)


def test_without_grouped_heads() -> None:
    signature = ModelSignature.of(GPT2Config(n_layer=2, n_head=4, n_embd=32))
    assert (signature.num_key_value_heads, signature.group, signature.head_dim) == (4, 1, 8)


def test_survives_json() -> None:
    signature = ModelSignature.of(LLAMA)
    assert ModelSignature.model_validate_json(signature.model_dump_json()) == signature


def test_infinities_in_a_configuration_survive_json() -> None:
    text = SimpleNamespace(
        model_type="odd",
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=8,
        rope_parameters={"limits": (0.0, float("inf"))},
    )
    config = SimpleNamespace(model_type="odd", get_text_config=lambda decoder: text)
    signature = ModelSignature.of(config)
    assert signature.rope == {"rope_parameters": {"limits": [0.0, "inf"]}}
    assert ModelSignature.model_validate_json(signature.model_dump_json()) == signature


def test_a_fitting_model_passes() -> None:
    ModelSignature.of(LLAMA).require(ModelSignature.of(LLAMA), "plan.json")


def test_another_model_is_refused_by_the_fields_that_differ(tiny_signature: ModelSignature) -> None:
    other = tiny_signature.model_copy(
        update={"num_hidden_layers": 4, "config": {"hidden_size": 64, "sliding_window": 8}}
    )
    with pytest.raises(ModelMismatchError) as caught:
        tiny_signature.require(other, "plan.json")
    assert str(caught.value) == (
        "plan.json was made for another model: num_hidden_layers: 3 != 4; config.hidden_size: 32 != 64; "
        "config.vocab_size: 100 != None; config.sliding_window: None != 8"
    )


def test_a_configuration_without_heads_is_refused() -> None:
    text = SimpleNamespace(model_type="mamba", num_hidden_layers=2)
    config = SimpleNamespace(model_type="mamba", get_text_config=lambda decoder: text)
    with pytest.raises(ModelUnsupportedError, match="mamba: its configuration names no attention heads"):
        ModelSignature.of(config)


def test_heads_must_share_evenly(tiny_signature: ModelSignature) -> None:
    with pytest.raises(ValidationError, match="4 query heads can't share 3 KV heads evenly"):
        ModelSignature.model_validate({**tiny_signature.model_dump(), "num_key_value_heads": 3})
    uneven = LlamaConfig(num_attention_heads=4, num_key_value_heads=3, hidden_size=32)
    with pytest.raises(ModelUnsupportedError, match="4 query heads can't share 3 KV heads evenly"):
        ModelSignature.of(uneven)
