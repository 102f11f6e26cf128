"""What of a model's configuration decides its attention, in one spelling whatever version of transformers wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import JsonValue

Settings = dict[str, Any]

ROPE_KEYS: Final = ("rope_parameters", "partial_rotary_factor")
"""``rope_scaling`` and ``rope_theta`` are older names for parts of ``rope_parameters``, not in every version."""

WINDOW_KEYS: Final = ("sliding_window", "layer_types")

SCORE_KEYS: Final = (
    "hidden_size",
    # Scale and bounds of scores.
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "key_multiplier",
    "attention_value_scale",
    "attn_scale",
    "floor_scale",
    "attn_temperature_tuning",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    # Norms, bounds and biases of queries and keys.
    "use_qk_norm",
    "qk_norm",
    "qk_layernorm",
    "clip_qkv",
    "attn_config",
    "attention_bias",
    "qkv_bias",
    "use_qkv_bias",
    # Positions.
    "no_rope_layers",
    "rope_interleave",
    "rotary_dim",
    "alibi",
    "position_embedding_type",
    "attention_layers",
    "window_size",
)
"""As the attention of transformers' causal language models reads them from its configuration."""

NESTED_KEYS: Final = ("alibi", "alibi_bias_max", "clip_qkv", "kv_n_heads", "qk_ln", "rope_theta", "softmax_scale")
"""Fields of ``attn_config``, which MPT and DBRX have."""

RECORDED: Final = (*SCORE_KEYS[:1], "max_position_embeddings", *WINDOW_KEYS, *SCORE_KEYS[1:])
"""Fields of a configuration that a signature holds beside `ROPE_KEYS`."""

SOFTCAP: Final = "attn_logit_softcapping"

SCALING_KEYS: Final = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "proportional": {"factor"},
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "original_max_position_embeddings",
    },
    "longrope": {
        "factor",
        "attention_factor",
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
    },
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "default": set(),
}
"""What each kind of rotary embedding reads of the keys that scale one."""

ROPE_DEFAULTS: Final = {"partial_rotary_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def attention_settings(rope: Mapping[str, JsonValue], config: Mapping[str, JsonValue], layers: int) -> Settings:
    """The settings to compare, by name.

    Args:
        rope: Of `ROPE_KEYS`, what a configuration says.
        config: Of `RECORDED`, what it says, and perhaps more.
        layers: Decoder layers.

    Returns:
        ``rope`` in one spelling, ``sliding_window`` for each layer where they differ, and fields as they are.
        What is unknown is absent; two models differ where both know a setting and it isn't the same.
    """
    settings: Settings = {key: config[key] for key in SCORE_KEYS if key in config}
    settings[SOFTCAP] = config.get(SOFTCAP)  # even old signatures hold it where there is one
    named = config.get("layer_types")
    types = [str(kind) for kind in named] if isinstance(named, list) else None
    if types is not None:
        settings["layer_types"] = types
    settings["sliding_window"] = _windows(config, types or ["sliding"] * layers)
    settings["rope"] = _rope(rope, types)
    if _context_decides(settings["rope"]):
        settings["max_position_embeddings"] = config.get("max_position_embeddings")
    return settings


def _windows(config: Mapping[str, JsonValue], types: Sequence[str]) -> int | list[int | None] | None:
    """The window of all layers, or of each; None where none has one, and as long as the context it cuts nothing."""
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    if not isinstance(window, int) or (isinstance(context, int) and window >= context):
        return None
    each = [window if "sliding" in kind else None for kind in types]
    return each[0] if len(set(each)) == 1 else each


def _rope(rope: Mapping[str, JsonValue], types: Sequence[str] | None) -> Settings | None:
    """Rotary embeddings in one spelling; by kind of layer where kinds have different ones."""
    parameters, partial = rope.get("rope_parameters"), rope.get("partial_rotary_factor")
    if not isinstance(parameters, Mapping):
        return None
    nested = {kind: part for kind, part in parameters.items() if isinstance(part, Mapping) or part is None}
    if not nested or "rope_theta" in parameters:
        return _plain_rope(parameters, partial)
    by_kind = {
        kind: _plain_rope(part, partial) if isinstance(part, Mapping) else None
        for kind, part in nested.items()
        if types is None or kind in types
    }
    each = list(by_kind.values())
    return each[0] if each and all(other == each[0] for other in each) else by_kind


def _plain_rope(parameters: Mapping[str, JsonValue], partial: JsonValue) -> Settings:
    named = {key: value for key, value in parameters.items() if value is not None}
    kind = str(named.pop("rope_type", None) or named.get("type") or "default")
    named.pop("type", None)
    if kind == "mrope" or (kind == "linear" and named.get("factor") == 1):
        kind = "default"  # "mrope" is told by its sections
    if partial is not None:
        named.setdefault("partial_rotary_factor", partial)
    unread = set().union(*SCALING_KEYS.values()) - SCALING_KEYS[kind] if kind in SCALING_KEYS else set()
    return {
        "rope_type": kind,
        **{
            key: value
            for key, value in sorted(named.items())
            if key not in unread and value != ROPE_DEFAULTS.get(key) and key != "max_position_embeddings"
        },
    }


def _context_decides(rope: Settings | None) -> bool:
    """Whether positions are encoded by how long the context is: learned, or scaled up to it."""
    if rope is None:
        return True
    kind = rope.get("rope_type")
    if kind is None:  # by kind of layer
        return any(_context_decides(part) for part in rope.values() if part is not None)
    return kind not in SCALING_KEYS or kind == "dynamic" or (kind in ("yarn", "longrope") and "factor" not in rope)
