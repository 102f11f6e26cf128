"""Models that wrap a transformers model: PEFT's are taken, others are refused with the way."""

from __future__ import annotations

from typing import Any

from moa_search.errors import ModelUnsupportedError

KEYS_IN_FRONT = ("PREFIX_TUNING", "CARTRIDGE")
"""Types of PEFT adapters that are keys and values, handed over in a cache of their own."""


def decoder_within(model: Any) -> Any:
    """The transformers model inside a PEFT model; anything else as it is.

    Raises:
        ModelUnsupportedError: It is wrapped in something else, or PEFT puts keys of its own in front of the tokens'.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model
    if _is_peft(model):
        require_no_prefix(model)
        inner = model.base_model  # the decoder itself for learned prompts, else what puts adapters into it
        return inner if isinstance(inner, PreTrainedModel) else inner.model
    way = way_in(model)
    if way is not None:
        raise ModelUnsupportedError(
            f"{type(model).__name__}: not a transformers model, it wraps one; give model.{way} instead, which may be "
            "wrapped already"
        )
    return model


def adapted_model(model: Any) -> Any:
    """The model to measure inside a PEFT model, its adapters at work; anything else as it is.

    Raises:
        ModelUnsupportedError: It is wrapped in something else, or PEFT puts a prompt in front of the tokens.
    """
    if _is_peft(model):
        for name, config in model.peft_config.items():
            require_no_prompt(config, f"adapter {name!r}")
    return decoder_within(model)


def way_in(model: Any) -> str | None:
    """The attribute by which something that wraps a transformers model gives it: parallel wrappers, compiled models."""
    from transformers import PreTrainedModel

    for attribute in ("module", "_orig_mod", "pretrained_model"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, PreTrainedModel) or _is_peft(inner):
            return attribute
    return None


def require_no_prompt(config: Any, what: str) -> None:
    """Check that a PEFT adapter is one of weights.

    Raises:
        ModelUnsupportedError: It puts virtual tokens, or keys and values, before the text.
    """
    if config.is_prompt_learning or config.is_adaption_prompt:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ModelUnsupportedError(
            f"{what}: {kind} puts virtual tokens or a prompt's states before the text, which belong to no position of "
            "it; only adapters of weights, such as LoRA, can be used"
        )


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
