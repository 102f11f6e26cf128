"""The generation settings of a folder that was saved under a plan, which refuse any reader that knows no plans."""

from __future__ import annotations

from typing import Any

from moa_search.formats.files import sha256_of
from moa_search.modeling.generation import settings_of
from moa_search.modeling.source import cache_dir

DIGITS = 16


def read_settings_as_saved(model: Any) -> None:
    """Let vLLM read the settings that the model had before it was saved under a plan, from a folder of their own.

    Args:
        model: A ``ModelConfig``, changed in place where its settings refuse to be read.
    """
    if model.generation_config not in ("auto", "vllm"):
        return  # a folder of the user's
    found = settings_of(str(model.hf_config_path or model.model), revision=model.revision)
    if not found:
        return
    settings = found["generation_config"]
    if model.generation_config == "vllm":  # no defaults for sampling, only what ends an answer
        kept = {name: value for name, value in settings.to_dict().items() if name.endswith("_token_id")}
        settings = type(settings).from_dict(kept)
    text = settings.to_json_string(use_diff=True)
    folder = cache_dir() / "generation" / sha256_of(text.encode()).removeprefix("sha256:")[:DIGITS]
    if not (folder / "generation_config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        settings.save_pretrained(folder)
    model.generation_config = str(folder)
