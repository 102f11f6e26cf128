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
from moa_search.modeling.private import PREFILL, PREPARE_CACHE, attention_of
from moa_search.modeling.text import text_config
from moa_search.runtime.attention import NAME
from moa_search.runtime.cache import MoACache
from moa_search.runtime.layer import MoACacheLayer

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from moa_kernels.backends import Impl
    from torch.utils.hooks import RemovableHandle

    from moa_search.formats import Plan

__all__ = ["HOOKS", "PREFILL_CHUNK_TOKENS", "STATE_ATTRIBUTE", "Applied", "give_cache"]

STATE_ATTRIBUTE = "_moa_applied"

CACHES = (None, "dynamic", "static")
"""What ``cache_implementation`` may be under a plan."""

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
        max_length: Of the largest cache of fixed size that `generate` has made.
    """

    plan: Plan
    impl: Impl
    attention: str | None
    overridden: dict[str, Any]
    giving: RemovableHandle | None = None
    max_length: int | None = None


def _original(model: Any, name: str) -> Any:
    """The method that a hook stands in for."""
    overridden: dict[str, Any] = getattr(model, STATE_ATTRIBUTE).overridden
    return overridden[name] if name in overridden else MethodType(getattr(type(model), name), model)


def _prepare_cache_for_generation(
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """Let transformers prepare a cache, then put a `MoACache` in the place of its default one."""
    original = _original(model, PREPARE_CACHE)
    state: Applied = getattr(model, STATE_ATTRIBUTE)
    under_plan = attention_of(text_config(model.config)) == NAME
    given = model_kwargs.get("past_key_values")
    if not under_plan or given is not None:
        if under_plan and isinstance(given, MoACache) and given.is_compileable:
            _check_room(given, max_cache_length)
        return original(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    kind = generation_config.cache_implementation
    if kind not in CACHES:
        raise UnsupportedInputError(f'cache_implementation "{kind}" can\'t run under a plan: {_why_not(kind)}')
    plain = copy.copy(generation_config)
    plain.cache_implementation = None
    result = original(plain, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache = model_kwargs.get("past_key_values")
    if cache is None:
        return result
    if type(cache) is not DynamicCache:
        raise UnsupportedInputError(f"{type(model).__name__} generates with a {type(cache).__name__}, not a plan's")
    config, text = model.config, text_config(model.config)
    drafting = getattr(generation_config, "is_assistant", False)
    if drafting and text.num_hidden_layers < state.plan.model.num_hidden_layers:
        # For a model that drafts for itself with its first layers, transformers hides the others meanwhile.
        config = copy.copy(text)
        config.num_hidden_layers = state.plan.model.num_hidden_layers
    length = None
    if kind == "static":
        # As large as any before: what was compiled for that stays good.
        asked = getattr(generation_config, "max_cache_len", None) or 0
        length = state.max_length = max(max_cache_length, asked, state.max_length or 0)
    model_kwargs["past_key_values"] = MoACache(config, state.plan, max_length=length)
    if drafting or generation_mode == GenerationMode.ASSISTED_GENERATION:
        model_kwargs["past_key_values"].activate_past_recording()
    return result


def _check_room(cache: MoACache, tokens: int) -> None:
    most = max(layer.get_max_length() for layer in cache.layers if isinstance(layer, MoACacheLayer))
    if tokens > most:
        raise UnsupportedInputError(
            f"{tokens} tokens, prompt and answer, don't fit a MoACache made for {most} (max_length); "
            "make a larger one, or lower max_new_tokens"
        )


def _why_not(kind: str) -> str:
    """What stands against a cache of transformers."""
    if "offloaded" in kind:
        return "layers are moved away before the plan's attention has read them; leave it unset, or spread device_map"
    if kind == "quantized":
        return "its layers store whole groups of tokens, which rings overwrite one by one; leave it unset"
    return 'leave it unset, or take "static"'


def _prefill(
    model: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Prefill a long prompt in chunks, and none of them compiled: prompts have too many lengths for that."""
    if isinstance(model_kwargs.get("past_key_values"), MoACache):
        chunked = _wants_chunks(model, input_ids, generation_config, model_kwargs)
        generation_config = copy.copy(generation_config)
        generation_config.disable_compile = True
        if chunked:
            generation_config.prefill_chunk_size = PREFILL_CHUNK_TOKENS
    return _original(model, PREFILL)(input_ids, generation_config, model_kwargs, *args, **kwargs)


def _wants_chunks(model: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether nobody has chosen the size of chunks, and chunks can't be told from the whole but by their memory."""
    cache = model_kwargs["past_key_values"]
    if generation_config.prefill_chunk_size is not None:
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
        text = text_config(model.config)
        use_cache = {**dict(zip(names, args, strict=False)), **kwargs}.get("use_cache")
        wanted = getattr(text, "use_cache", False) if use_cache is None else use_cache
        free = "past_key_values" in names[len(args) :]
        if wanted and free and attention_of(text) == NAME:
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
    PREPARE_CACHE: _prepare_cache_for_generation,
    PREFILL: _prefill,
    "init_continuous_batching": _init_continuous_batching,
    "save_pretrained": _save_pretrained,
}
