"""Methods of a model that act differently under a plan."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import transformers
from transformers import Cache, DynamicCache
from transformers.generation import GenerationMode

from moa_search.errors import UnsupportedInputError
from moa_search.formats.checkpoint import PLAN_FILE
from moa_search.modeling.generation import refuse_plain_reload
from moa_search.modeling.private import (
    CACHE_NAMES,
    CANDIDATES,
    PREFILL,
    PREPARE_CACHE,
    attention_of,
    cache_name,
    mask_length_of,
)
from moa_search.modeling.text import text_config
from moa_search.modeling.wrappers import require_no_prefix
from moa_search.runtime import chunks
from moa_search.runtime.attention import NAME, register
from moa_search.runtime.cache import MoACache
from moa_search.runtime.layer import ROLLBACK_TOKENS, MoACacheLayer

if TYPE_CHECKING:
    import os

    from moa_kernels.backends import Impl
    from torch.utils.hooks import RemovableHandle

    from moa_search.formats import Plan
    from moa_search.runtime.rules import LayerRules

logger = logging.getLogger(__name__)

STATE_ATTRIBUTE = "_moa_applied"

CACHES = (None, "dynamic", "static")
"""What ``cache_implementation`` may be under a plan."""


@dataclass
class Applied:
    """What a model under a plan remembers.

    Attributes:
        plan: The plan.
        rules: What it says, layer by layer.
        fingerprint: Of the plan.
        impl: What attends, as in `apply_plan`.
        streaming: As in `apply_plan`.
        attention: The attention implementation before.
        parameters: Of the model's ``forward``, in order.
        overridden: Instance attributes before, by name; absent where the class's own method was in use.
        giving: What stops `give_cache`.
        max_length: Of the largest cache of fixed size that `generate` has made.
        told_of_positions: Whether `_tell_of_positions` has warned.
    """

    plan: Plan
    rules: tuple[LayerRules, ...]
    fingerprint: str
    impl: Impl
    streaming: bool | int
    attention: str | None
    parameters: tuple[str, ...]
    overridden: dict[str, Any]
    giving: RemovableHandle | None = None
    max_length: int | None = None
    told_of_positions: bool = False


class Hook:
    """Stands in for a method of one model, as an attribute of that model.

    A bound method would be pickled as a name to look up on a model that doesn't have it yet, and a closure not at all.
    This is pickled and deep-copied with its model, and makes the plan's attention known where it is loaded.

    Args:
        model: The model.
        name: Of the method; a key of `HOOKS`.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.__self__ = model
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what stands in."""
        return self.__func__(self.__self__, *args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        return HOOKS[self.__name__]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_original(self.__self__, self.__name__))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        register()


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
    given = model_kwargs.get(cache_name())
    drafting = getattr(generation_config, "is_assistant", False)
    # Drafts of a model for another one are taken back whole; those that this one gets ask for room themselves.
    rollback = ROLLBACK_TOKENS + (generation_config.max_new_tokens or 0) if drafting else ROLLBACK_TOKENS
    rolls_back = drafting or generation_mode == GenerationMode.ASSISTED_GENERATION
    if under_plan:
        # While PEFT generates, it stands in for this method.
        require_no_prefix(getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None))
        _check_checkpointing(model, generation_config)
    if not under_plan or given is not None:
        if under_plan and isinstance(given, MoACache):
            if given.is_compileable:
                _check_room(given, max_cache_length)
            if rolls_back:
                given.activate_past_recording(rollback)
        return original(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    kind = generation_config.cache_implementation
    if kind not in CACHES:
        raise UnsupportedInputError(f'cache_implementation "{kind}" can\'t run under a plan: {_why_not(kind)}')
    plain = copy.copy(generation_config)
    plain.cache_implementation = None
    result = original(plain, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache = model_kwargs.get(cache_name())
    if cache is None:
        unknown = [name for name, value in model_kwargs.items() if isinstance(value, Cache)]
        if unknown:
            raise UnsupportedInputError(
                f"transformers {transformers.__version__} calls the cache {unknown[0]}, which this moa-search doesn't "
                "know; upgrade it, or take an older transformers"
            )
        return result
    if type(cache) is not DynamicCache:
        raise UnsupportedInputError(f"{type(model).__name__} generates with a {type(cache).__name__}, not a plan's")
    config, text = model.config, text_config(model.config)
    if drafting and text.num_hidden_layers < len(state.rules):
        # For a model that drafts for itself with its first layers, transformers hides the others meanwhile.
        config = copy.copy(text)
        config.num_hidden_layers = len(state.rules)
    length = None
    if kind == "static":
        # As large as any before: what was compiled for that stays good.
        asked = getattr(generation_config, "max_cache_len", None) or 0
        length = state.max_length = max(max_cache_length, asked, state.max_length or 0)
    made = model_kwargs[cache_name()] = MoACache.following(state.rules, config, state.fingerprint, max_length=length)
    if rolls_back:
        made.activate_past_recording(rollback)
    return result


def _check_checkpointing(model: Any, generation_config: Any) -> None:
    """Refuse what transformers only warns of: its layers drop the cache, and each token follows the last one alone."""
    dropping = model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if dropping and generation_config.use_cache:
        raise UnsupportedInputError(
            "gradient checkpointing drops the cache in training mode; call model.eval() to generate, or pass "
            "use_cache=False"
        )


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
    if isinstance(model_kwargs.get(cache_name()), MoACache):
        _check_continues(input_ids, generation_config, model_kwargs)
        # Learned prompts of PEFT, for one, count the tokens of a pass to know what to put in front.
        foreign = _has_foreign(model, "prepare_inputs_for_generation")
        chunked = not foreign and chunks.wants_chunks(model, input_ids, generation_config, model_kwargs)
        if generation_config.prefill_chunk_size is not None:
            chunks.warn_of_chunks(model, input_ids, generation_config.prefill_chunk_size, model_kwargs)
        generation_config = copy.copy(generation_config)
        generation_config.disable_compile = True
        if chunked:
            generation_config.prefill_chunk_size = chunks.PREFILL_CHUNK_TOKENS
    return _original(model, PREFILL)(input_ids, generation_config, model_kwargs, *args, **kwargs)


def _check_continues(input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Refuse inputs that leave no new token behind what the cache holds, which transformers cuts wrongly in silence."""
    past = int(model_kwargs[cache_name()].get_seq_length())
    embeddings, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    given = input_ids.shape[1] if embeddings is None else embeddings.shape[1]
    # A mask without padding is dropped but for its length; one that was never made stands for new tokens only.
    masked = mask_length_of(generation_config) if mask is None else mask.shape[1]
    only_new = embeddings is None and masked in (None, -1, past + given)
    if past and given <= past and not only_new:
        raise UnsupportedInputError(
            f"{given} tokens are given and the cache holds {past}: pass the whole sequence, past and new tokens, or "
            "the new ones with an attention_mask of past and new tokens together"
        )


def _prepare_inputs_for_generation(model: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Let transformers prepare a pass; where it drops the cache to start over, empty the cache instead.

    Phi-3 does that where its rotary table changes. A new cache would forget its fixed size and its room for rollbacks,
    and leave the one that the user handed over behind.
    """
    original = _original(model, "prepare_inputs_for_generation")
    inputs, cache = original(input_ids, *args, **kwargs), kwargs.get(cache_name())
    if isinstance(cache, MoACache):
        if inputs.get(cache_name()) is None and inputs.get("use_cache", True):
            cache.reset()
            inputs[cache_name()] = cache
        elif kwargs.get("is_first_iteration"):
            mask = kwargs.get("attention_mask")
            tokens = input_ids.shape[1] if mask is None else mask.shape[-1]
            chunks.warn_of_continuing(model, cache.get_seq_length(), tokens)
    return inputs


def _get_candidate_generator(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Let every draft be preceded by room in the cache to roll back all of it."""
    generator = _original(model, CANDIDATES)(*args, **kwargs)
    cache, propose = kwargs["model_kwargs"].get(cache_name()), generator.get_candidates

    def propose_with_room(input_ids: torch.Tensor, *others: Any, **options: Any) -> Any:
        candidates, scores = propose(input_ids, *others, **options)
        cache.activate_past_recording(candidates.shape[1] - input_ids.shape[1] + 1)
        return candidates, scores

    if isinstance(cache, MoACache):
        generator.get_candidates = propose_with_room
    return generator


def _has_foreign(model: Any, name: str) -> bool:
    """Whether someone else has put a method of their own in the place of a model's."""
    return name in getattr(model, STATE_ATTRIBUTE).overridden or not isinstance(vars(model).get(name), Hook)


def give_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a forward pass that would make a cache of transformers' kind by itself, hand it a `MoACache`."""
    if not torch.compiler.is_compiling():
        _tell_of_positions(model, args, kwargs)
    if any(kwargs.get(name) is not None for name in CACHE_NAMES):
        return args, kwargs
    state: Applied = getattr(model, STATE_ATTRIBUTE)
    use_cache = {**dict(zip(state.parameters, args, strict=False)), **kwargs}.get("use_cache")
    text = text_config(model.config)
    wanted = getattr(text, "use_cache", False) if use_cache is None else use_cache
    name = next((name for name in CACHE_NAMES if name in state.parameters[len(args) :]), None)
    if wanted and name is not None and attention_of(text) == NAME:
        return args, {**kwargs, name: _new_cache(state.rules, model.config, state.fingerprint)}
    return args, kwargs


def _tell_of_positions(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Warn, once, where padding stands before tokens and nothing says their positions.

    Models then count padding as positions, which their own attention doesn't mind: distances stay. Keys in few bits are
    taken to stand where they do without padding, and are coded less precisely elsewhere.
    """
    state: Applied = getattr(model, STATE_ATTRIBUTE)
    if state.told_of_positions or not any(rules.codecs and rules.codecs.turns.turns_keys for rules in state.rules):
        return
    given = {**dict(zip(state.parameters, args, strict=False)), **kwargs}
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    if ids is not None and ids.shape[-1] == 1:
        return  # a step: reading the mask would make it wait for the device, and the prompt's was read
    if given.get("position_ids") is not None or "position_ids" not in state.parameters:
        return
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or _finds_positions(text_config(model.config)):
        return
    padding = mask == 0
    if bool((padding[:, :-1] & ~padding[:, 1:]).any()):
        state.told_of_positions = True
        logger.warning(
            "attention_mask has padding before tokens and no position_ids are given: keys in few bits are stored less "
            "precisely so; pass position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0) of the new tokens, as "
            "generate() does, or pad on the right"
        )


def _finds_positions(text: Any) -> bool:
    """Whether a model works its positions out from the mask (those with positions of several dimensions)."""
    return "mrope_section" in (getattr(text, "rope_parameters", None) or {})


# A graph serves many caches, so that none can be made in it.
_new_cache: Callable[..., MoACache] = torch.compiler.disable(MoACache.following)


def _init_continuous_batching(model: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse: transformers would switch to another attention and so drop the plan in silence."""
    raise UnsupportedInputError("continuous batching can't run under a plan; call remove_plan(model) first")


def _save_pretrained(
    model: Any, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
) -> Any:
    """Save the model as ever, its plan beside it, and what keeps others from loading it dense in silence."""
    result = _original(model, "save_pretrained")(save_directory, is_main_process, *args, **kwargs)
    if is_main_process and Path(save_directory).is_dir():
        refuse_plain_reload(Path(save_directory))
        getattr(model, STATE_ATTRIBUTE).plan.save(Path(save_directory) / PLAN_FILE)
    return result


HOOKS: dict[str, Callable[..., Any]] = {
    PREPARE_CACHE: _prepare_cache_for_generation,
    PREFILL: _prefill,
    CANDIDATES: _get_candidate_generator,
    "prepare_inputs_for_generation": _prepare_inputs_for_generation,
    "init_continuous_batching": _init_continuous_batching,
    "save_pretrained": _save_pretrained,
}
