"""What an architecture must be like for spans to make sense, and what it does about them itself."""

from __future__ import annotations

from typing import Any

from moa_search.errors import ConfigError, ModelUnsupportedError
from moa_search.modeling.private import calls_attention_interface, language_model_kinds
from moa_search.modeling.text import context_length, text_config, text_decoders
from moa_search.modeling.wrappers import way_in


def require_causal(config: Any) -> None:
    """Check that a configuration is that of a decoder-only language model.

    Raises:
        ModelUnsupportedError: It isn't; the message says why.
    """
    kind = config.model_type
    causal, masked = language_model_kinds()
    if config.is_encoder_decoder:
        raise ModelUnsupportedError(f"{kind} is an encoder-decoder; only decoder-only models have a causal KV cache")
    # BERT and its like can be decoders, and say so; GPT-NeoX says nothing.
    encoder = kind in masked and not getattr(config, "is_decoder", False)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not (kind in causal or own_code) or encoder or not getattr(config, "is_causal", True):
        raise ModelUnsupportedError(f"{kind} is not a causal language model")


def require_attention_interface(model: Any) -> None:
    """Check that each layer of a model calls its own attention through transformers' ``AttentionInterface``.

    Raises:
        ModelUnsupportedError: It doesn't, so its heads can be neither observed nor shortened.
    """
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        way = "get_base_model()" if hasattr(model, "get_base_model") else way_in(model)
        hint = "" if way is None else f"; give what it wraps, model.{way}"
        raise ModelUnsupportedError(f"{name}: not a transformers model{hint}")
    decoders = text_decoders(model)
    if not decoders:
        raise ModelUnsupportedError(f"{name}: no part of it runs on the configuration of its text decoder")
    if not all(calls_attention_interface(part) for part in (model, *decoders)):
        raise ModelUnsupportedError(f"{name}: it doesn't call its attention through transformers' AttentionInterface")
    attention = [part for decoder in decoders for part in decoder.modules() if "Attention" in type(part).__name__]
    # Zamba's attention is told by its caller where the keys belong.
    if any(getattr(part, "layer_idx", 0) in (None, -1) for part in attention):
        raise ModelUnsupportedError(f"{name}: its attention modules don't know which layer they belong to")


def require_context(config: Any, length: int) -> None:
    """Check that ``length`` tokens fit the model's context.

    Raises:
        ConfigError: They don't.
    """
    context = context_length(config)
    if context is not None and length > context:
        raise ConfigError(f"length {length} is over the model's context of {context} tokens")


def require_own_keys(config: Any) -> None:
    """Check that every attention layer is plainly causal over keys of its own.

    Raises:
        ModelUnsupportedError: It isn't; the message says why.
    """
    text = text_config(config)
    reason = _without_own_keys(config, text)
    if reason is not None:
        raise ModelUnsupportedError(f"{text.model_type}: {reason}; its heads can't be given spans")


def native_windows(config: Any) -> list[int | None]:
    """The sliding window in tokens that each layer has of its own, ``[layer]``; None where it has none.

    Read from the cache that transformers would make, since some models never pass it to their attention
    function. A window as long as the model's context cuts nothing and counts as none.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicSlidingWindowLayer

    context = context_length(config)
    found = [
        layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        for layer in DynamicCache(config=text_config(config)).layers
    ]
    return [None if window is None or (context is not None and window >= context) else window for window in found]


def _without_own_keys(config: Any, text: Any) -> str | None:
    """Why the architecture can't follow a plan, or None if it can."""
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False):
        return "its attention isn't causal"
    if getattr(text, "kv_lora_rank", None):
        return "multi-head latent attention (MLA) has no keys per head to drop"
    if getattr(text, "num_kv_shared_layers", None) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        return "several of its layers share one layer's keys and values"
    if getattr(text, "cross_attention_layers", None):
        return "some of its layers attend images through cross attention"
    if getattr(text, "attention_chunk_size", None):
        return "its attention is chunked"
    return None
