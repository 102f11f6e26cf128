"""Adapters that PEFT has saved, as models."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from moa_search.errors import ConfigError, ModelNotFoundError
from moa_search.modeling.private import optional_file
from moa_search.modeling.wrappers import require_no_prompt

ADAPTER_FILE = "adapter_config.json"


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


def adapter_tokens(folder: str, **options: Any) -> int | None:
    """Tokens of the tokenizer that was saved with an adapter; None where none was."""
    from transformers import AutoTokenizer

    if optional_file(folder, "tokenizer_config.json", **options) is None:
        return None
    return len(AutoTokenizer.from_pretrained(folder, **options))


def load_adapter(model: Any, folder: str, tokens: int | None, **options: Any) -> Any:
    """Put an adapter to work in its base model.

    Args:
        model: The base model.
        folder: Of the adapter, or its hub id.
        tokens: Of the tokenizer that was saved with the adapter: where they were added, the embeddings grow.
        **options: Of the hub, such as ``revision``.

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
    require_no_prompt(PeftConfig.from_pretrained(folder, **options), f"model {folder!r}")
    if tokens is not None and tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokens)
    with warnings.catch_warnings():
        # Nothing that a user could change: PEFT asks transformers by an old name.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return PeftModel.from_pretrained(model, folder, **options).get_base_model()
