"""Up to where a model's rotary embedding is one and the same."""

from __future__ import annotations

from typing import Any

from moa_search.modeling.text import text_config

CONSTANT_ROPES = ("default", "linear", "llama3", "mrope", "proportional", "yarn")
"""Types of rotary tables that are the same in every forward pass."""


def constant_rope_tokens(config: Any) -> int | None:
    """Up to which context length a model's rotary table is the same in every forward pass.

    ``longrope`` and ``dynamic`` choose a table by the longest position of the pass; beyond this length a prompt in
    chunks gives other logits than in one pass, with or without a plan.

    Returns:
        Tokens; 0 for a type of table that isn't known, None if the table never changes.
    """
    text = text_config(config)
    found = getattr(text, "rope_parameters", None) or vars(text).get("rope_scaling") or {}
    per_layer_type = [entry for entry in found.values() if isinstance(entry, dict)]
    limits = [_constant_tokens(text, rope) for rope in per_layer_type or [found]]
    return min((limit for limit in limits if limit is not None), default=None)


def _constant_tokens(text: Any, rope: dict[str, Any]) -> int | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    # PhiMoE scales by one of two factors, whatever the type.
    if kind in CONSTANT_ROPES and (kind == "default" or "long_mscale" not in rope):
        return None
    if "dynamic" not in kind and kind != "longrope" and kind not in CONSTANT_ROPES:
        return 0
    named = [
        rope.get("original_max_position_embeddings"),
        getattr(text, "original_max_position_embeddings", None),
        getattr(text, "max_position_embeddings", None),
    ]
    return min((tokens for tokens in named if tokens), default=0)
