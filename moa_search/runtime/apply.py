"""Put a model under a plan, and take it off again."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationMixin

from moa_search.errors import BackendUnavailableError, ModelUnsupportedError
from moa_search.formats import Plan
from moa_search.formats.checkpoint import CONFIG_ATTRIBUTE
from moa_search.modeling.attention import attention_choice, set_attention
from moa_search.modeling.private import attention_of, generates_with_dynamic_cache, tensor_parallel_ranks
from moa_search.modeling.support import require_attention_interface
from moa_search.modeling.text import attention_modules, text_config
from moa_search.modeling.wrappers import decoder_within
from moa_search.runtime.attention import IMPL_ATTRIBUTE, NAME, RULES_ATTRIBUTE, register
from moa_search.runtime.hooks import HOOKS, STATE_ATTRIBUTE, Applied, Hook, give_cache
from moa_search.runtime.kernels import chosen
from moa_search.runtime.rules import layer_rules
from moa_search.runtime.streaming import stream_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moa_kernels.backends import Impl

    from moa_search.formats.plan import PlanLike

SAVED_ATTENTION_ATTRIBUTE = "attn_implementation"
"""Attribute of the configuration that, once saved, `from_pretrained` of transformers takes for the attention to use.

Without it, a plain reload of a model that doesn't generate would run dense in silence (others: `modeling.generation`).
With it, the reload asks for `NAME`: an error where nobody has registered that, and an error in the first forward pass
otherwise, since no plan is applied."""


def apply_plan(model: Any, plan: PlanLike, *, impl: Impl = "auto", streaming: bool | int = False) -> Any:
    """Make a model attend as a plan says, in place.

    From then on `generate` and forward passes build a `MoACache` by themselves, and `save_pretrained` writes the plan
    beside the weights, as ``moa_plan.json``, and into the configuration; `moa_search.from_pretrained` loads such a
    folder. A plan that was applied before is replaced.

    Args:
        model: A transformers decoder, or a PEFT model of one, whose inner model is then put under the plan.
        plan: The plan, made for this model: a `Plan`, its file, or the content of such a file.
        impl: What attends: ``"triton"`` kernels, the ``"cpu"`` library, plain ``"torch"``, or ``"auto"``, which is
            Triton on CUDA devices and the library on CPUs for whatever they can do and no gradient is asked of, and
            torch otherwise. The library is compiled at first use where the package doesn't carry it.
        streaming: Whether text may grow past the model's context, or past so many tokens of it: the sink's positions
            then move along with the newest tokens. Needs a plan in which every span is fixed, such as
            ``plan.anchored_at(length)`` is. It isn't saved with the model.

    Returns:
        ``model``.

    Raises:
        ConfigError: The plan's rules aren't anchored at positions, ``impl`` is unknown, or there is no such file.
        PlanFormatError: The file or content is no valid plan.
        ModelMismatchError: The plan was made for another model.
        ModelUnsupportedError: The model's attention can't be replaced, or it is wrapped in something other than PEFT.
        BackendUnavailableError: What ``impl`` names can't run on the model's device or type.
    """
    plan, given, model = Plan.of(plan), model, decoder_within(model)
    text = text_config(model.config)
    rules = layer_rules(plan, model.config)
    stream = stream_of(model, rules, streaming, impl)
    if stream is not None:
        rules = tuple(replace(layer, stream=stream) for layer in rules)
    modules = _attention_modules(model)
    if model.device.type != "meta":  # as offloaded weights are: then the first forward pass tells
        chosen(impl, torch.empty(0, plan.model.head_dim, dtype=model.dtype, device=model.device))
    coded = any(layer.codecs is not None for layer in rules)
    if impl == "triton" and coded and model.dtype not in (torch.float16, torch.bfloat16):
        raise BackendUnavailableError(
            f"impl is triton, whose kernels read codes in float16 and bfloat16, not {model.dtype}; take auto or torch"
        )
    register()
    state: Applied | None = getattr(model, STATE_ATTRIBUTE, None)
    if state is None:
        if attention_of(text) == NAME:  # a plain reload of a model that was saved under a plan
            set_attention(model, None)
        names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        state = Applied(
            plan,
            rules,
            plan.fingerprint,
            impl,
            streaming,
            attention=attention_of(text),
            parameters=names,
            overridden={},
        )
    set_attention(model, NAME)
    state.plan, state.rules, state.fingerprint = plan, rules, plan.fingerprint
    state.impl, state.streaming = impl, streaming
    for module in modules:
        setattr(module, RULES_ATTRIBUTE, rules[module.layer_idx])
        setattr(module, IMPL_ATTRIBUTE, impl)
    setattr(text, CONFIG_ATTRIBUTE, plan.model_dump(mode="json", by_alias=True))
    setattr(model.config, SAVED_ATTENTION_ATTRIBUTE, attention_choice(model, NAME))
    if getattr(model, STATE_ATTRIBUTE, None) is None:
        for name in HOOKS:
            if name in vars(model):
                state.overridden[name] = vars(model)[name]
            setattr(model, name, Hook(model, name))
        setattr(model, STATE_ATTRIBUTE, state)
    if give_cache not in model._forward_pre_hooks.values():
        state.giving = model.register_forward_pre_hook(give_cache, with_kwargs=True)
    return given


def remove_plan(model: Any) -> Any:
    """Give a model back the attention and cache it had before `apply_plan`; without a plan, do nothing.

    Returns:
        ``model``.
    """
    given, model = model, decoder_within(model)
    state: Applied | None = getattr(model, STATE_ATTRIBUTE, None)
    if state is None:
        return given
    text = text_config(model.config)
    if attention_of(text) == NAME:
        set_attention(model, state.attention)
    for module in model.modules():
        for name in (RULES_ATTRIBUTE, IMPL_ATTRIBUTE):
            vars(module).pop(name, None)
    vars(text).pop(CONFIG_ATTRIBUTE, None)
    vars(model.config).pop(SAVED_ATTENTION_ATTRIBUTE, None)
    for name in HOOKS:
        if isinstance(vars(model).get(name), Hook):  # someone else may have put something in its place
            delattr(model, name)
            if name in state.overridden:
                setattr(model, name, state.overridden[name])
    assert state.giving is not None
    state.giving.remove()
    delattr(model, STATE_ATTRIBUTE)
    return given


@contextmanager
def applied(model: Any, plan: PlanLike, *, impl: Impl = "auto", streaming: bool | int = False) -> Iterator[Any]:
    """Put a model under a plan for the duration of a ``with`` block, then under what it had before.

    Args:
        model: As in `apply_plan`.
        plan: As in `apply_plan`.
        impl: As in `apply_plan`.
        streaming: As in `apply_plan`.

    Raises:
        ConfigError: The plan's rules aren't anchored at positions.
        ModelMismatchError: The plan was made for another model.
        ModelUnsupportedError: The model's attention can't be replaced.
    """
    state: Applied | None = getattr(decoder_within(model), STATE_ATTRIBUTE, None)
    before = None if state is None else (state.plan, state.impl, state.streaming)
    apply_plan(model, plan, impl=impl, streaming=streaming)
    try:
        yield model
    finally:
        if before is None:
            remove_plan(model)
        else:
            apply_plan(model, before[0], impl=before[1], streaming=before[2])


def _attention_modules(model: Any) -> list[Any]:
    """The attention modules that a plan's rules are for.

    Raises:
        ModelUnsupportedError: They can't follow it.
    """
    name = type(model).__name__
    require_attention_interface(model)
    ranks = tensor_parallel_ranks(model)
    if ranks > 1:
        raise ModelUnsupportedError(
            f"{name}: tensor parallelism splits its KV heads over {ranks} processes, and a plan isn't sliced for each; "
            "spread layers with device_map instead"
        )
    if isinstance(model, GenerationMixin) and not generates_with_dynamic_cache(model):
        raise ModelUnsupportedError(f"{name}: it keeps a cache of its own, which a plan can't take the place of")
    found = attention_modules(model)
    if not found:
        raise ModelUnsupportedError(f"{name}: its attention modules don't say which layer they belong to")
    if any(getattr(module, "is_causal", True) is False for module in found):
        raise ModelUnsupportedError(f"{name}: its attention isn't causal")
    return found
