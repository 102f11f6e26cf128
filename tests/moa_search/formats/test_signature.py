from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError
from transformers import (
    AutoConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    SmolLM3Config,
)

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
        "plan.json was made for another model: num_hidden_layers: 3 != 4; hidden_size: 32 != 64; "
        "sliding_window: None != 8"
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


def differences(mine: PreTrainedConfig, theirs: PreTrainedConfig) -> list[str]:
    forth = ModelSignature.of(mine).differences(ModelSignature.of(theirs))
    back = ModelSignature.of(theirs).differences(ModelSignature.of(mine))
    assert len(forth) == len(back)
    return forth


def like(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    return type(config)(**{**config.to_dict(), **changes})


PHI3 = Phi3Config(num_hidden_layers=2, max_position_embeddings=4096, original_max_position_embeddings=4096)
GEMMA2 = Gemma2Config(num_hidden_layers=4, sliding_window=64, max_position_embeddings=512)
QWEN2 = Qwen2Config(num_hidden_layers=2)
MISTRAL = MistralConfig(num_hidden_layers=2, sliding_window=64, max_position_embeddings=512)
GRANITE = GraniteConfig(num_hidden_layers=2)
COHERE = CohereConfig(num_hidden_layers=2)
SMOLLM3 = SmolLM3Config(num_hidden_layers=4)
OLMO = OlmoConfig(num_hidden_layers=2)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e4}
LLAMA3 = {**YARN, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

UNSEEN = {
    "tokens were added": (LLAMA, {"vocab_size": 32064}),
    "embeddings are tied": (LLAMA, {"tie_word_embeddings": True}),
    "another type": (LLAMA, {"dtype": "bfloat16"}),
    "quantised weights": (LLAMA, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    "another place": (LLAMA, {"_name_or_path": "elsewhere/finetuned"}),
    "other special tokens": (LLAMA, {"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": 0}),
    "no cache by default": (LLAMA, {"use_cache": False}),
    "other feed-forward layers": (LLAMA, {"intermediate_size": 99, "hidden_act": "gelu", "mlp_bias": True}),
    "fewer experts": (MixtralConfig(num_hidden_layers=2), {"num_local_experts": 4, "num_experts_per_tok": 1}),
    "the head's width spelled out": (LLAMA, {"head_dim": 64}),
    "a longer context, positions not scaled": (LLAMA, {"max_position_embeddings": 65536}),
    "other dropout and initial weights": (LLAMA, {"attention_dropout": 0.1, "initializer_range": 1.0}),
    "a soft cap on the vocabulary's logits": (GEMMA2, {"final_logit_softcapping": None}),
    "default rotary embeddings spelled out": (
        LLAMA,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 1.0, "factor": None}},
    ),
    "a linear scale of one": (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e5}}),
    "every layer called full": (QWEN2, {"layer_types": ["full_attention"] * 2}),
    "a window that no layer has": (QWEN2, {"sliding_window": 128, "use_sliding_window": False}),
    "a window as long as the context": (
        like(MISTRAL, sliding_window=512),
        {"sliding_window": None},
    ),
    "yarn's defaults spelled out": (
        like(LLAMA, rope_parameters=YARN),
        {"rope_parameters": {**YARN, "beta_fast": 32, "beta_slow": 1, "truncate": True}},
    ),
}


@pytest.mark.parametrize("change", UNSEEN)
def test_what_attention_never_sees_makes_no_difference(change: str) -> None:
    config, changes = UNSEEN[change]
    assert differences(config, like(config, **changes)) == []


SEEN = {
    "the base of rotary embeddings": (LLAMA, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope"),
    "a linear scale": (
        LLAMA,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}},
        "rope",
    ),
    "yarn": (LLAMA, {"rope_parameters": YARN | {"rope_theta": 1e5}}, "rope"),
    "yarn's factor": (like(LLAMA, rope_parameters=YARN), {"rope_parameters": {**YARN, "factor": 8.0}}, "rope"),
    "yarn's ramp": (like(LLAMA, rope_parameters=YARN), {"rope_parameters": {**YARN, "beta_fast": 16}}, "rope"),
    "Llama 3's frequencies": (
        like(LLAMA, rope_parameters=LLAMA3),
        {"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}},
        "rope",
    ),
    "a scale up to the context": (
        like(LLAMA, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        {"max_position_embeddings": 4096},
        "max_position_embeddings",
    ),
    "learned positions": (
        GPT2Config(n_layer=2, n_head=4, n_embd=32),
        {"n_positions": 2048},
        "max_position_embeddings",
    ),
    "how much of a head is rotated": (
        GPTNeoXConfig(num_hidden_layers=2),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rope",
    ),
    "a window": (MISTRAL, {"sliding_window": 128}, "sliding_window"),
    "a window or none": (MISTRAL, {"sliding_window": None}, "sliding_window"),
    "which layers have it": (
        GEMMA2,
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "layer_types",
    ),
    "a soft cap": (GEMMA2, {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    "Gemma's scale": (GEMMA2, {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar"),
    "Granite's scale": (GRANITE, {"attention_multiplier": 0.5}, "attention_multiplier"),
    "norms of queries and keys": (COHERE, {"use_qk_norm": True}, "use_qk_norm"),
    "bounds of queries and keys": (OLMO, {"clip_qkv": 8.0}, "clip_qkv"),
    "biases of queries and keys": (LLAMA, {"attention_bias": True}, "attention_bias"),
    "layers without positions": (SMOLLM3, {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers"),
    "the width of a head": (LLAMA, {"head_dim": 32}, "head_dim"),
    "the number of KV heads": (LLAMA, {"num_key_value_heads": 9}, "num_key_value_heads"),
}


@pytest.mark.parametrize("change", SEEN)
def test_what_decides_attention_is_named(change: str) -> None:
    config, changes, name = SEEN[change]
    found = differences(config, like(config, **changes))
    assert any(text.startswith(f"{name}: ") for text in found), found


def test_both_scales_of_long_rope_are_told_apart() -> None:
    half = PHI3.hidden_size // PHI3.num_attention_heads // 2
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096}
    rope |= {"short_factor": [1.0] * half, "long_factor": [2.0] * half}
    long = like(PHI3, max_position_embeddings=32768, rope_parameters=rope)
    assert differences(long, like(long, rope_parameters={**rope, "long_factor": [3.0] * half}))
    assert differences(long, like(long, max_position_embeddings=65536)), "its scale is their ratio"


def test_rotary_embeddings_of_each_kind_of_layer() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = Gemma3TextConfig(
        num_hidden_layers=6, rope_parameters={"full_attention": {**rope, "rope_theta": 1e6}, "sliding_attention": rope}
    )
    swapped = {"full_attention": rope, "sliding_attention": {**rope, "rope_theta": 1e6}}
    assert differences(config, like(config, rope_parameters=swapped))
    assert not differences(config, like(config, vocab_size=99))


GOLDEN = Path(__file__).parents[2] / "golden" / "signatures"


@pytest.mark.parametrize("file", sorted(path.name for path in GOLDEN.glob("*.json")))
def test_signatures_made_under_other_versions_of_transformers_fit(file: str) -> None:
    """Of forty architectures' default configurations, as this and earlier versions of moa-search recorded them."""
    recorded = json.loads((GOLDEN / file).read_text())
    assert len(recorded) >= 35
    differing = {}
    for kind, content in recorded.items():
        before, now = ModelSignature.model_validate(content), ModelSignature.of(AutoConfig.for_model(kind))
        if before.differences(now) or now.differences(before):
            differing[kind] = before.differences(now)
    assert differing == {}


class TestFilesOfEarlierVersions:
    """They hold the vocabulary and feed-forward widths, and drop what is None."""

    OLD: ClassVar = {
        "architecture": "llama",
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rope": {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}},
        "config": {
            "hidden_size": 576,
            "intermediate_size": 11008,
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
        },
    }

    def old(self, **changes: Any) -> ModelSignature:
        return ModelSignature.model_validate({**self.OLD, **changes})

    def test_they_fit_the_model_they_were_made_for(self) -> None:
        self.old().require(ModelSignature.of(LLAMA), "plan")
        ModelSignature.of(LLAMA).require(self.old(), "profile")

    def test_they_fit_it_with_added_tokens(self) -> None:
        self.old().require(ModelSignature.of(like(LLAMA, vocab_size=32064)), "plan")

    def test_another_model_is_still_refused(self) -> None:
        rope = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
        assert self.old(rope=rope).differences(ModelSignature.of(LLAMA))
        windows = {**self.OLD["config"], "sliding_window": 256}
        assert self.old(config=windows).differences(ModelSignature.of(LLAMA))
        assert self.old(config={**self.OLD["config"], "hidden_size": 512}).differences(ModelSignature.of(LLAMA))

    def test_a_window_that_it_had_not_is_noticed(self) -> None:
        old = self.old(architecture="mistral", config={"hidden_size": 576, "max_position_embeddings": 512})
        sizes = {"num_hidden_layers": 3, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
        rope = self.OLD["rope"]["rope_parameters"]
        changed = MistralConfig(**sizes, sliding_window=64, max_position_embeddings=512, rope_parameters=rope)
        assert old.differences(ModelSignature.of(changed)) == ["sliding_window: None != 64"]

    @pytest.mark.parametrize("kind", ["phi", "stablelm", "persimmon", "glm", "nemotron", "gpt_neox"])
    def test_older_versions_of_transformers_say_how_much_is_rotated_twice(self, kind: str) -> None:
        """transformers 5.4 to 5.17 hold ``partial_rotary_factor`` beside ``rope_parameters``, later ones within."""
        now = ModelSignature.of(AutoConfig.for_model(kind))
        parameters = dict(now.rope["rope_parameters"])
        share = parameters.pop("partial_rotary_factor")
        beside = {"partial_rotary_factor": share}
        for spelled in ({"rope_parameters": parameters, **beside}, {**now.rope, **beside}):
            before = now.model_copy(update={"rope": spelled})
            assert not before.differences(now)
            assert not now.differences(before)
        assert now.model_copy(update={"rope": {"rope_parameters": parameters}}).differences(now)

    def test_kinds_of_layers_that_a_version_does_not_name(self) -> None:
        """transformers 5.4 names no ``layer_types`` for Jamba."""
        now = ModelSignature.of(AutoConfig.for_model("jamba"))
        assert "layer_types" in now.config
        before = now.model_copy(
            update={"config": {key: value for key, value in now.config.items() if key != "layer_types"}}
        )
        assert not before.differences(now)
        assert not now.differences(before)
