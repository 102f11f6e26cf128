"""The attention and mask functions that transformers calls under a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.masking_utils import causal_mask_function

from moa_search.errors import UnsupportedInputError
from moa_search.modeling import attention as modeling
from moa_search.modeling.private import is_causal_mask
from moa_search.runtime import compiled, dispatch
from moa_search.runtime.rules import LayerRules
from moa_search.runtime.staged import Staged

if TYPE_CHECKING:
    from moa_kernels.backends import Impl

    from moa_search.runtime.layer import MoACacheLayer

NAME = "moa"
"""What ``config._attn_implementation`` says under a plan."""

RULES_ATTRIBUTE = "_moa_rules"
"""Attribute of attention modules that holds their `LayerRules`."""

IMPL_ATTRIBUTE = "_moa_impl"
"""Attribute of attention modules that says what runs them: ``"triton"``, ``"cpu"``, ``"torch"`` or ``"auto"``."""


def register() -> None:
    """Make both functions known to transformers under `NAME`."""
    modeling.register(NAME, moa_attention, moa_mask)


def moa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Check that a forward pass is plainly causal and return its padding.

    Returns:
        Boolean ``[batch, kv_length]``, False for padding, or None if there is none.

    Raises:
        UnsupportedInputError: The cache or mask is one that a plan can't honour.
    """
    fixed = isinstance(q_offset, torch.Tensor) and isinstance(kv_offset, torch.Tensor)  # a MoACache of fixed size
    if not fixed:
        _check_offsets(q_offset, q_length, kv_offset, kv_length)
    # A compiler can't look into a model's mask; what isn't causal shows in the prompt's pass, which isn't compiled.
    if not torch.compiler.is_compiling() and not is_causal_mask(mask_function):
        raise UnsupportedInputError("a plan runs on causal masks only, not on packed, bidirectional or custom ones")
    if attention_mask is None:
        return None
    if fixed:
        # Whether it's all True is for the device to know. A view would have another stride at every step, for which
        # a compiled step is compiled again.
        return attention_mask[:, -kv_length:].bool().clone(memory_format=torch.contiguous_format)
    if attention_mask.ndim != 2 or attention_mask.shape[1] not in (kv_length, kv_offset + kv_length):
        raise UnsupportedInputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; under a plan it must be "
            f"[batch, {kv_offset + kv_length}], past and new tokens together"
        )
    real = attention_mask[:, -kv_length:].bool()
    if torch.compiler.is_compiling():  # whether it's all True is found out where it is used
        return real.contiguous()
    return None if bool(real.all()) else real


def moa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Staged,
    value: torch.Tensor | Staged,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer under its rules, called by transformers.

    With a `MoACache`, reads the ring and the new tokens, then stores the latter; a few new tokens that fit into the
    rings are stored first where Triton kernels run. With any other cache, or none, keys and values are complete and
    the rules only mask them: same output, no memory saved. Gradients flow, except into the past of a `MoACache`.

    Args:
        module: The attention module; carries its `LayerRules`.
        query: ``[batch, heads, query, head_dim]``, of the newest tokens.
        key: ``[batch, kv_heads, keys, head_dim]``, or what `MoACacheLayer.update` returned.
        value: As ``key``.
        attention_mask: What `moa_mask` returned.
        scaling: Factor on the logits; ``head_dim ** -0.5`` by default.
        dropout: Must be 0.
        sliding_window: The model's own window, already among the rules.
        softcap: Bound of the logits (Gemma 2).
        s_aux: ``[heads]``, logits of attention sinks (GPT-OSS).
        **kwargs: Whatever else the model passes; checked for what can't be honoured.

    Returns:
        ``[batch, query, heads, value_dim]``, and no attention weights.

    Raises:
        UnsupportedInputError: An argument can't be honoured.
        BackendUnavailableError: What was asked for can't run.
    """
    rules = getattr(module, RULES_ATTRIBUTE, None)
    if not isinstance(rules, LayerRules):
        raise UnsupportedInputError(f'attention "{NAME}" is set but no plan is applied; call apply_plan(model, plan)')
    _check_arguments(attention_mask, dropout, kwargs)
    past = None
    if isinstance(key, Staged):
        past = key.layer
        if past.rules is not rules and past.rules != rules:
            raise UnsupportedInputError("the MoACache was made for another plan than the one applied")
        past.rules = rules  # from now on they are found equal at a glance
        key, value = key.take()
    assert isinstance(value, torch.Tensor)
    if key.shape[1] != len(rules.rules):
        raise UnsupportedInputError(
            f"the layer has {key.shape[1]} KV heads here, the plan {len(rules.rules)}; "
            "slice the plan for each rank of a tensor-parallel model"
        )
    if sliding_window is not None and sliding_window != rules.sliding_window:
        raise UnsupportedInputError(
            f"the layer attends {sliding_window} tokens but its configuration says {rules.sliding_window}"
        )
    valid = None
    if attention_mask is not None:
        if attention_mask.shape[1] < key.shape[2]:
            raise UnsupportedInputError("layers with and without a MoACache see different lengths")
        valid = attention_mask[:, -key.shape[2] :]
    impl: Impl = getattr(module, IMPL_ATTRIBUTE)
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "sink_logits": s_aux,
    }
    narrow = _autocast_type(query.device.type)
    if narrow is None:
        return _attend(query, key, value, valid, rules, past, impl, options), None
    if query.dtype != torch.float64:
        query, key, value = (states.to(narrow) for states in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):  # it is one operation, as PyTorch's own attention is
        return _attend(query, key, value, valid, rules, past, impl, options), None


def _autocast_type(device_type: str) -> torch.dtype | None:
    """What autocast gives PyTorch's own attention, float64 aside; None where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    rules: LayerRules,
    past: MoACacheLayer | None,
    impl: Impl,
    options: dict[str, Any],
) -> torch.Tensor:
    """`dispatch.attend`, or what a compiler takes in its place."""
    if not query.dtype == key.dtype == value.dtype:
        raise UnsupportedInputError(
            f"queries, keys and values are {query.dtype}, {key.dtype} and {value.dtype}; they must be of one type, or "
            "autocast on"
        )
    if torch.compiler.is_compiling() and rules.stream is not None:
        raise UnsupportedInputError("streaming can't be compiled; apply the plan without it, or don't compile")
    if not torch.compiler.is_compiling():
        return dispatch.attend(query, key, value, valid, rules, past, impl, **options)
    if past is None and rules.codecs is not None:  # which tokens are the sink's depends on padding
        return compiled.uncompiled(query, key, value, valid, rules, past, impl, **options)
    if past is None:
        return compiled.attend_whole(query, key, value, valid, rules, **options)
    if past.is_compileable and past.is_initialized and past.decodes(query.shape[2], valid):
        return dispatch.attend(query, key, value, valid, rules, past, impl, **options)
    past.settle()
    return compiled.attend_past(query, key, value, valid, past, impl, **options)


def _check_offsets(q_offset: Any, q_length: int, kv_offset: int, kv_length: int) -> None:
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise UnsupportedInputError(
            "keys and attention_mask must end with the newest token: a plan can't run on a StaticCache, nor with "
            "a mask of another length"
        )
    if kv_offset not in (0, q_offset):
        raise UnsupportedInputError(
            "this sliding-window cache has dropped tokens whose count the plan needs; use MoACache"
        )


def _check_arguments(attention_mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedInputError("a plan can't honour a 4-D attention mask; pass the 2-D padding mask")
    if kwargs.get("cache") is not None or kwargs.get("block_table") is not None:
        raise UnsupportedInputError("a plan can't run under continuous batching or with a paged cache")
    if kwargs.get("output_attentions"):
        raise UnsupportedInputError("output_attentions: attention weights aren't computed under a plan")
    if kwargs.get("position_bias") is not None:
        raise UnsupportedInputError("a plan can't honour position biases")
    if kwargs.get("is_causal") is False:
        raise UnsupportedInputError("a plan runs on causal attention only")
    if kwargs.get("cu_seq_lens_q") is not None:
        raise UnsupportedInputError("a plan can't run on packed sequences (cu_seq_lens_q)")
    if dropout:
        raise UnsupportedInputError("attention dropout isn't applied under a plan; call model.eval() or set it to 0")
