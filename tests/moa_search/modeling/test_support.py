import pytest
from transformers import (
    AutoConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from moa_search.errors import ConfigError, ModelUnsupportedError
from moa_search.modeling.support import native_windows, require_causal, require_context, require_own_keys


@pytest.mark.parametrize(("kind", "reason"), [("bert", "not a causal"), ("t5", "encoder-decoder")])
def test_models_without_a_causal_cache(kind, reason):
    with pytest.raises(ModelUnsupportedError, match=reason):
        require_causal(AutoConfig.for_model(kind))


@pytest.mark.parametrize(
    ("kind", "reason"), [("deepseek_v3", "latent"), ("gemma3n_text", "share"), ("llama4_text", "chunked")]
)
def test_models_whose_layers_have_no_plain_keys_of_their_own(kind, reason):
    with pytest.raises(ModelUnsupportedError, match=reason):
        require_own_keys(AutoConfig.for_model(kind))


def test_causal_models_pass():
    for config in (LlamaConfig(), Qwen2Config(), GPTNeoXConfig(), AutoConfig.for_model("bert", is_decoder=True)):
        require_causal(config)
        require_own_keys(config)


def test_context():
    require_context(LlamaConfig(max_position_embeddings=100), 100)
    with pytest.raises(ConfigError, match="101 is over the model's context of 100"):
        require_context(LlamaConfig(max_position_embeddings=100), 101)


def test_native_windows():
    small = {"num_hidden_layers": 4, "max_position_embeddings": 512}
    assert native_windows(LlamaConfig(**small)) == [None] * 4
    assert native_windows(Gemma2Config(**small, sliding_window=64)) == [64, None, 64, None]
    assert native_windows(MistralConfig(**small, sliding_window=64)) == [64] * 4
    assert native_windows(MistralConfig(**small, sliding_window=512)) == [None] * 4, "it cuts nothing"
    masked = Qwen2MoeConfig(
        **small, use_sliding_window=True, sliding_window=64, layer_types=["full_attention", "sliding_attention"] * 2
    )
    assert native_windows(masked) == [None, 64, None, 64], "never passed to its attention function"
