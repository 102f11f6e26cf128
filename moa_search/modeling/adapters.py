"""Models that PEFT adapts: LoRA and the like are at work in the model itself, virtual tokens are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from moa_search.errors import ConfigError, ModelNotFoundError, ModelUnsupportedError
from moa_search.modeling.private import optional_file

__all__ = ["ADAPTER_FILE", "adapted_model", "load_adapter", "read_adapter"]

ADAPTER_FILE = "adapter_config.json"


def adapted_model(model: Any) -> Any:
    """The transformers model within a ``peft.PeftModel``, its adapters at work; any other model as it is.

    Raises:
        ModelUnsupportedError: Its adapter adds virtual tokens, which aren't in the model itself.
    """
    peft = sys.modules.get("peft")  # where nobody has imported it, the model isn't its
    if peft is None or not isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        return model
    for name, config in model.peft_config.items():
        _require_no_prompt(config, f"adapter {name!r}")
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model.base_model.model


def read_adapter(folder: str, **options: Any) -> str | None:
    """The base model that an adapter's folder or repository names; None where there is no adapter.

    Raises:
        ModelNotFoundError: It names none, or its file is damaged.
    """
    file = optional_file(folder, ADAPTER_FILE, **options)
    if file is None:
        return None
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        base = content["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ModelNotFoundError(f"model {folder!r}: its {ADAPTER_FILE} names no base_model_name_or_path")
    return base


def load_adapter(model: Any, folder: str, tokens: int | None) -> Any:
    """Put an adapter to work in its base model.

    Args:
        model: The base model.
        folder: Of the adapter, or its hub id.
        tokens: Of the tokenizer that was saved with the adapter: where they were added, the embeddings grow.

    Raises:
        ConfigError: PEFT isn't installed.
        ModelUnsupportedError: The adapter adds virtual tokens.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        if error.name != "peft":
            raise
        raise ConfigError(f"model {folder!r} is an adapter, which needs peft; pip install peft") from None
    _require_no_prompt(PeftConfig.from_pretrained(folder), f"model {folder!r}")
    if tokens is not None and tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokens)
    return PeftModel.from_pretrained(model, folder).get_base_model()


def _require_no_prompt(config: Any, what: str) -> None:
    if config.is_prompt_learning or config.is_adaption_prompt:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ModelUnsupportedError(
            f"{what}: {kind} puts virtual tokens or a prompt's states before the text, which belong to no position of "
            "it; only adapters of weights, such as LoRA, can be used"
        )
