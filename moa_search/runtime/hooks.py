"""Methods of a model that act differently under a plan."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import DynamicCache
from transformers.generation import GenerationMode

from moa_search.errors import UnsupportedInputError
from moa_search.formats.checkpoint import PLAN_FILE
from moa_search.runtime.attention import NAME
from moa_search.runtime.cache import MoACache, MoACacheLayer

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from moa_kernels.backends import Impl
    from torch.utils.hooks import RemovableHandle

    from moa_search.formats import Plan

__all__ = ["HOOKS", "PREFILL_CHUNK_TOKENS", "STATE_ATTRIBUTE", "Applied", "give_cache"]

STATE_ATTRIBUTE = "_moa_applied"

PREFILL_CHUNK_TOKENS = 4096
"""Tokens per sample that `generate` prefills at once, unless its ``prefill_chunk_size`` says otherwise.

A forward pass frees each layer's keys and values once the layer's rings have taken theirs. What still grows with the
prompt is the activations of one layer, and chunks bound those."""


@dataclass
class Applied:
    """What a model under a plan remembers.

    Attributes:
        plan: The plan.
        impl: What attends, as in `apply_plan`.
        attention: The attention implementation before.
        overridden: Instance attributes before, by name; absent where the class's own method was in use.
        giving: What stops `give_cache`.
    """

    plan: Plan
    impl: Impl
    attention: str
    overridden: dict[str, Any]
    giving: RemovableHandle | None = None


def _original(model: Any, name: str) -> Any:
    """The method that a hook stands in for."""
    overridden: dict[str, Any] = getattr(model, STATE_ATTRIBUTE).overridden
    return overridden[name] if name in overridden else MethodType(getattr(type(model), name), model)


def _prepare_cache_for_generation(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Let transformers prepare a cache, then put a `MoACache` in the place of its default one."""
    original = _original(model, "_prepare_cache_for_generation")
    from_user = model_kwargs.get("past_key_values") is not None
    result = original(generation_config, model_kwargs, *args, **kwargs)
    cache = model_kwargs.get("past_key_values")
    text = model.config.get_text_config(decoder=True)
    if from_user or cache is None or text._attn_implementation != NAME:
        return result
    if type(cache) is not DynamicCache or cache.offloading:
        raise UnsupportedInputError(
            f'cache_implementation "{generation_config.cache_implementation}" can\'t keep a span per head; '
            "leave it unset under a plan"
        )
    plan, config = getattr(model, STATE_ATTRIBUTE).plan, model.config
    drafting = getattr(generation_config, "is_assistant", False)
    if drafting and text.num_hidden_layers < plan.model.num_hidden_layers:
        # For a model that drafts for itself with its first layers, transformers hides the others meanwhile.
        config = copy.copy(text)
        config.num_hidden_layers = plan.model.num_hidden_layers
    model_kwargs["past_key_values"] = MoACache(config, plan)
    if drafting or GenerationMode.ASSISTED_GENERATION in args:
        model_kwargs["past_key_values"].activate_past_recording()
    return result


def _prefill(
    model: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Prefill a long prompt in chunks."""
    if _wants_chunks(model, input_ids, generation_config, model_kwargs):
        generation_config = copy.copy(generation_config)
        generation_config.prefill_chunk_size = PREFILL_CHUNK_TOKENS
    return _original(model, "_prefill")(input_ids, generation_config, model_kwargs, *args, **kwargs)


def _wants_chunks(model: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether nobody has chosen the size of chunks, and chunks can't be told from the whole but by their memory."""
    cache = model_kwargs.get("past_key_values")
    if generation_config.prefill_chunk_size is not None or not isinstance(cache, MoACache):
        return False
    # Not every linear-attention layer goes on from its state when it gets several tokens.
    if any(not isinstance(layer, MoACacheLayer) or hasattr(layer, "update_conv_state") for layer in cache.layers):
        return False
    # Up to some version, transformers starts over where a cache holds tokens already.
    if input_ids.shape[1] <= PREFILL_CHUNK_TOKENS or cache.get_seq_length() > 0:
        return False
    # It splits these two; images or embeddings would be repeated with every chunk.
    inputs = {name for name, value in model_kwargs.items() if isinstance(value, torch.Tensor)}
    return inputs <= {"attention_mask", "position_ids"} and not generation_config.output_hidden_states


def give_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a forward pass that would make a cache of transformers' kind by itself, hand it a `MoACache`."""
    if kwargs.get("past_key_values") is None:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        text = model.config.get_text_config(decoder=True)
        use_cache = {**dict(zip(names, args, strict=False)), **kwargs}.get("use_cache")
        wanted = getattr(text, "use_cache", False) if use_cache is None else use_cache
        free = "past_key_values" in names[len(args) :]
        if wanted and free and text._attn_implementation == NAME:
            cache = MoACache(model.config, getattr(model, STATE_ATTRIBUTE).plan)
            return args, {**kwargs, "past_key_values": cache}
    return args, kwargs


def _init_continuous_batching(model: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse: transformers would switch to another attention and so drop the plan in silence."""
    raise UnsupportedInputError("continuous batching can't run under a plan; call remove_plan(model) first")


def _save_pretrained(
    model: Any, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
) -> Any:
    """Save the model as ever, and its plan beside it."""
    result = _original(model, "save_pretrained")(save_directory, is_main_process, *args, **kwargs)
    if is_main_process and Path(save_directory).is_dir():
        getattr(model, STATE_ATTRIBUTE).plan.save(Path(save_directory) / PLAN_FILE)
    return result


HOOKS: dict[str, Callable[..., Any]] = {
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "_prefill": _prefill,
    "init_continuous_batching": _init_continuous_batching,
    "save_pretrained": _save_pretrained,
}
