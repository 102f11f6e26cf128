"""Models that wrap a transformers model: PEFT's are taken, others are refused with the way."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from moa_search.errors import ModelUnsupportedError

__all__ = ["decoder_within", "require_no_prefix"]

KEYS_IN_FRONT = ("PREFIX_TUNING", "CARTRIDGE")
"""Types of PEFT adapters that are keys and values, handed over in a cache of their own."""


def decoder_within(model: Any) -> Any:
    """The transformers model inside a PEFT model; anything else as it is.

    Raises:
        ModelUnsupportedError: It is wrapped in something else, or PEFT puts keys of its own in front of the tokens'.
    """
    if isinstance(model, PreTrainedModel):
        return model
    if _is_peft(model):
        require_no_prefix(model)
        inner = model.base_model  # the decoder itself for learned prompts, else what puts adapters into it
        return inner if isinstance(inner, PreTrainedModel) else inner.model
    for attribute in ("module", "_orig_mod"):  # of parallel wrappers and of compiled models
        inner = getattr(model, attribute, None)
        if isinstance(inner, PreTrainedModel) or _is_peft(inner):
            raise ModelUnsupportedError(
                f"{type(model).__name__}: plans are applied to the model that it wraps, which may be wrapped already: "
                f"apply_plan(model.{attribute}, plan)"
            )
    return model


def require_no_prefix(model: Any) -> None:
    """Check that no adapter of a PEFT model is a prefix of keys and values; other models pass.

    Raises:
        ModelUnsupportedError: One is.
    """
    if not _is_peft(model):
        return
    for name, config in model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind in KEYS_IN_FRONT:
            raise ModelUnsupportedError(
                f"adapter {name!r} ({kind}) puts keys and values of its own into the cache, which a plan knows nothing "
                "of; use LoRA or another adapter of weights, or run without a plan"
            )


def _is_peft(model: Any) -> bool:
    return isinstance(getattr(model, "peft_config", None), dict) and hasattr(model, "base_model")
