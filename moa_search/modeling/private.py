"""Every private name of transformers that this package uses, and what for; an upgrade of transformers begins here.

Nothing outside this module names one (a test looks). Where a name changes, change it here, for all versions that are
supported.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

CHECKPOINTING_FUNCTION = "_gradient_checkpointing_func"
"""Attribute of a decoder layer: what recomputes it in the backward pass. `profiling.checkpointing` sets it."""

PREPARE_CACHE = "_prepare_cache_for_generation"
"""Method of a model: makes the cache before `generate` starts. The runtime wraps it."""

CANDIDATES = "_get_candidate_generator"
"""Method of a model: makes what drafts tokens for assisted decoding. The runtime wraps it."""

PREFILL = "_prefill"
"""Method of a model: runs the prompt, in chunks if asked. The runtime wraps it."""


CACHE_NAMES = ("cache", "past_key_values")
"""What a forward pass calls its cache: the first from transformers 5.24 on, the second before and in older models."""


@functools.cache
def cache_name() -> str:
    """What `generate` and models of the installed transformers call the cache."""
    from transformers import GenerationMixin

    taken = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_NAMES if name in taken)


def attention_of(config: Any) -> str | None:
    """The attention implementation that a model of this configuration uses; the public API only sets it."""
    name: str | None = config._attn_implementation
    return name


def calls_attention_interface(model: Any) -> bool:
    """Whether a model's attention can be replaced; `set_attn_implementation` itself only warns."""
    return bool(model._can_set_attn_implementation())


def tensor_parallel_ranks(model: Any) -> int:
    """Over how many processes a model's KV heads are split."""
    return getattr(model, "_tp_size", None) or 1


def generates_with_dynamic_cache(model: Any) -> bool:
    """Whether `generate` makes an ordinary cache for a model, which a plan's can take the place of."""
    return bool(model._supports_default_dynamic_cache())


def mask_length_of(generation_config: Any) -> int | None:
    """Tokens of a mask without padding that `generate` has dropped; None or -1 if it never had one."""
    length: int | None = getattr(generation_config, "_mask_length", None)
    return length


def optional_file(name: str, file: str, **options: Any) -> str | None:
    """Path of a file in a model's folder or repository, None where it has no such file."""
    from transformers.utils import cached_file

    path: str | None = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
    return path


def compile_everywhere(config: Any) -> None:
    """Let `generate` compile on a CPU, too, with this ``CompileConfig``."""
    config._compile_all_devices = True


def forget_compiled(model: Any) -> bool:
    """Drop what `generate` has compiled for a model, of which it keeps the newest; whether there was anything."""
    if vars(model).pop("_compiled_call", None) is None:
        return False
    vars(model).pop("_last_compile_config", None)
    return True


def language_model_kinds() -> tuple[set[str], set[str]]:
    """Each ``model_type`` with a class for causal language modeling, and each with one for masked."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def is_causal_mask(mask_function: Any) -> bool:
    """Whether a mask function is causal, perhaps with a sliding window, and nothing else.

    transformers combines mask functions by closures, which tell nothing but their names.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is causal_mask_function:
        return True
    parts = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    if getattr(mask_function, "__qualname__", "").startswith("and_masks.") and len(parts) == 1:
        return causal_mask_function in parts[0] and all(
            part is causal_mask_function or part.__qualname__.startswith("sliding_window_overlay.") for part in parts[0]
        )
    return False
