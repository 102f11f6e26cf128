"""What a plan or profile remembers of the model it was made for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from moa_search.errors import ConfigError, ModelMismatchError, ModelUnsupportedError
from moa_search.formats.attention_settings import NESTED_KEYS, RECORDED, ROPE_KEYS, attention_settings

UNKNOWN_CONTEXT = 4096
"""Tokens assumed where a configuration names no context."""


class ModelSignature(BaseModel):
    """What of a model's configuration decides its attention, and so whether a plan fits it.

    Vocabulary, feed-forward layers, types and names don't: a plan stays good when tokens are added. Weights don't
    either: what was fine-tuned on keeps its plan, though a profile of its own may give a better one.

    Attributes:
        architecture: ``model_type`` of the transformers configuration.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads per layer.
        num_key_value_heads: KV heads per layer; consecutive query heads share one.
        head_dim: Width of one head.
        rope: Rotary embedding settings, as in the configuration.
        config: Further fields that attention depends on, as in the configuration, None where that says so; files of
            earlier versions hold others and less, and what they don't hold isn't compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    rope: dict[str, JsonValue] = Field(default_factory=dict)
    config: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _heads_share_evenly(self) -> ModelSignature:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads can't share {kv_heads} KV heads evenly")
        return self

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def context_length(self) -> int | None:
        """The longest context in tokens that the model was made for, where its configuration says so."""
        context = self.config.get("max_position_embeddings")
        return context if isinstance(context, int) else None

    @property
    def usual_lengths(self) -> list[int]:
        """A quarter, half and all of the model's context in tokens, increasing; where to look if nobody says."""
        longest = self.context_length or UNKNOWN_CONTEXT
        return sorted({max(1, longest // 4), max(1, longest // 2), longest})

    @classmethod
    def of(cls, config: Any) -> ModelSignature:
        """The signature of a transformers configuration (its text decoder, where it nests several).

        Raises:
            ModelUnsupportedError: The configuration names no layers or attention heads, heads that can't share KV
                heads evenly, or settings that differ from layer to layer.
        """
        text = config.get_text_config(decoder=True)
        if getattr(text, "is_heterogeneous", False):
            settings = ", ".join(sorted(text.per_layer_attributes))
            raise ModelUnsupportedError(
                f"{text.model_type}: settings differ from layer to layer ({settings}); a plan knows one value for all"
            )
        heads = getattr(text, "num_attention_heads", None)
        layers = getattr(text, "num_hidden_layers", None)
        if not isinstance(heads, int) or not isinstance(layers, int):
            kind = getattr(config, "model_type", type(config).__name__)
            raise ModelUnsupportedError(f"{kind}: its configuration names no attention heads or layers")
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        if heads % kv_heads:
            raise ModelUnsupportedError(
                f"{text.model_type}: {heads} query heads can't share {kv_heads} KV heads evenly"
            )
        return cls(
            architecture=text.model_type,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            rope={key: _plain(getattr(text, key, None)) for key in ROPE_KEYS if getattr(text, key, None)},
            config={key: _plain(getattr(text, key)) for key in RECORDED if hasattr(text, key)},
        )

    def require_head(self, layer: int, kv_head: int) -> None:
        """Check that the model has a head.

        Raises:
            ConfigError: It has no such layer or KV head; negative numbers don't count from the end.
        """
        counts = {"layer": (layer, self.num_hidden_layers), "KV head": (kv_head, self.num_key_value_heads)}
        for name, (value, count) in counts.items():
            if not 0 <= value < count:
                raise ConfigError(f"{name} {value} is out of range; the model has 0 to {count - 1}")

    def differences(self, other: ModelSignature) -> list[str]:
        """What decides attention and isn't the same in ``other``, each as ``name: mine != theirs``."""
        mine, theirs = self._settings(), other._settings()
        return [f"{key}: {mine[key]} != {theirs[key]}" for key in mine if key in theirs and mine[key] != theirs[key]]

    def require(self, model: ModelSignature, what: str) -> None:
        """Check that ``what``, which carries this signature, fits ``model``.

        Raises:
            ModelMismatchError: It doesn't; the message names the fields that differ.
        """
        differing = self.differences(model)
        if differing:
            raise ModelMismatchError(f"{what} was made for another model: {'; '.join(differing)}")

    def _settings(self) -> dict[str, Any]:
        shape = self.model_dump(mode="json", exclude={"rope", "config"})
        return shape | attention_settings(self.rope, self.config, self.num_hidden_layers)


def own_window(model: ModelSignature) -> int | None:
    """The sliding window in tokens that the model's configuration names, or None."""
    window = model.config.get("sliding_window")
    return window if type(window) is int and window > 0 else None


def check_native_layers(model: ModelSignature, layers: Sequence[int]) -> None:
    """Check that a model can have these native layers.

    Args:
        model: The model.
        layers: Those that keep its sliding window, each once.

    Raises:
        ValueError: They are all that it has, or its configuration names no window.
    """
    if len(layers) == model.num_hidden_layers:
        raise ValueError("every layer is native, so there is no head that a plan could shorten")
    if layers and own_window(model) is None:
        raise ValueError(f"layer {layers[0]} is native, but model.config names no sliding_window")


def _plain(value: Any) -> JsonValue:
    if hasattr(value, "to_dict"):  # a configuration within a configuration, full of what every one has
        value = {key: getattr(value, key) for key in NESTED_KEYS if hasattr(value, key)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
