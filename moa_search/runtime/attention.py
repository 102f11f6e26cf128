"""The attention and mask functions that transformers calls under a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from moa_kernels import span_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from moa_search.errors import UnsupportedInputError
from moa_search.runtime.rules import LayerRules
from moa_search.runtime.staged import Staged

if TYPE_CHECKING:
    from moa_search.runtime.cache import MoACacheLayer

__all__ = ["NAME", "RULES_ATTRIBUTE", "moa_attention", "moa_mask", "register"]

NAME = "moa"
"""What ``config._attn_implementation`` says under a plan."""

RULES_ATTRIBUTE = "_moa_rules"
"""Attribute of attention modules that holds their `LayerRules`."""

ROW_BLOCK = 128
"""Queries handled at once: bounds the memory of masks, and how many keys are read in vain."""


def register() -> None:
    """Make both functions known to transformers under `NAME`."""
    AttentionInterface.register(NAME, moa_attention)
    AttentionMaskInterface.register(NAME, moa_mask)


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
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise UnsupportedInputError(
            "keys and attention_mask must end with the newest token: a plan can't run on a StaticCache, nor with "
            "a mask of another length"
        )
    if kv_offset not in (0, q_offset):
        raise UnsupportedInputError(
            "this sliding-window cache has dropped tokens whose count the plan needs; use MoACache"
        )
    if not _is_causal(mask_function):
        raise UnsupportedInputError("a plan runs on causal masks only, not on packed, bidirectional or custom ones")
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] not in (kv_length, kv_offset + kv_length):
        raise UnsupportedInputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; under a plan it must be "
            f"[batch, {kv_offset + kv_length}], past and new tokens together"
        )
    real = attention_mask[:, -kv_length:].bool()
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

    With a `MoACache`, reads the ring and the new tokens, then stores the latter. With any other cache, or
    none, keys and values are complete and the rules only mask them: same output, no memory saved. Gradients
    flow, except into the past of a `MoACache`.

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
    """
    rules = getattr(module, RULES_ATTRIBUTE, None)
    if not isinstance(rules, LayerRules):
        raise UnsupportedInputError(f'attention "{NAME}" is set but no plan is applied; call apply_plan(model, plan)')
    _check_arguments(attention_mask, dropout, kwargs)
    past = None
    if isinstance(key, Staged):
        past = key.layer
        if past.rules != rules:
            raise UnsupportedInputError("the MoACache was made for another plan than the one applied")
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
        key, value = _pack(key, valid), _pack(value, valid)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _attend(query, key, value, valid, rules, past, scale, softcap, s_aux)
    if past is not None:
        past.commit(key, value, valid)
    return out.transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    rules: LayerRules,
    past: MoACacheLayer | None,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Attention over ring and new tokens, ``[batch, heads, query, value_dim]``.

    Positions are ``[batch, ...]``, or ``[1, ...]`` where all samples agree, so that they share one mask.
    """
    rows, keys = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    start = torch.zeros(1, dtype=torch.int64, device=query.device) if past is None else past.start
    key_at = start[:, None] + torch.arange(keys, device=query.device)
    query_at = key_at[:, keys - rows :]
    if valid is not None:
        # Padding rows take their predecessor's position: nobody reads them, and positions stay sorted.
        query_at = start[:, None] + (valid.cumsum(1) - 1)[:, keys - rows :].clamp(min=0)
    ring = None if past is None or past.is_empty else past
    ring_key, ring_value, ring_at = (None,) * 3 if ring is None else (ring.keys, ring.values, ring.positions())
    tops = list(range(0, rows, ROW_BLOCK))
    last_rows = [min(top + ROW_BLOCK, rows) - 1 for top in tops]
    ends = (query_at[:, last_rows] - start[:, None] + 1).amax(0).tolist()
    sink_end = min(max(rules.sink - int(start.min()), 0), keys)

    blocks: list[list[torch.Tensor]] = [[] for _ in rules.rules]
    for rule, heads in rules.heads_by_rule.items():
        oldest = rules.oldest_key(query_at, rule)
        begins = (oldest[:, tops] - start[:, None]).amin(0).tolist()
        for top, begin, end in zip(tops, begins, ends, strict=True):
            block = slice(top, top + ROW_BLOCK)
            new = _columns(begin, end, sink_end)
            old = [slice(0)] * len(rules.rules) if ring is None else ring.slots(only_sink=begin >= 0)
            at = _join(ring_at, old[heads[0]], key_at, new)
            mask = _mask(query_at[:, block], oldest[:, block], at, rules)
            for head in heads:
                group_heads = slice(head * group, (head + 1) * group)
                out = span_attention(
                    query[:, group_heads, block],
                    _join(ring_key, old[head], key[:, head], new),
                    _join(ring_value, old[head], value[:, head], new),
                    mask,
                    scale=scale,
                    softcap=softcap,
                    sink_logits=None if sink_logits is None else sink_logits[group_heads],
                )
                blocks[head].append(out)
    return torch.cat([torch.cat(parts, 2) for parts in blocks], 1)


def _columns(begin: int, end: int, sink_end: int) -> list[slice]:
    """The new tokens that a block of rows may attend: the sink, and from its first row's window on."""
    if begin <= sink_end:
        return [slice(0 if sink_end else max(begin, 0), end)]
    return [slice(0, sink_end), slice(begin, end)] if sink_end else [slice(begin, end)]


def _join(ring: torch.Tensor | None, old: slice, fresh: torch.Tensor, new: list[slice]) -> torch.Tensor:
    """Slots ``old`` of a ring, if there is one, then columns ``new`` of new tokens; keys are dimension 1."""
    parts = [fresh[:, part] for part in new]
    if ring is not None:
        parts.insert(0, ring[:, old])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _mask(at: torch.Tensor, oldest: torch.Tensor, key_at: torch.Tensor, rules: LayerRules) -> torch.Tensor:
    """Boolean ``[batch or 1, query, key]`` from positions: queries, their windows' starts, and keys."""
    # Half the width of int64 makes these comparisons twice as fast.
    i, first, j = at.int()[:, :, None], oldest.int()[:, :, None], key_at.int()[:, None, :]
    mask = (j <= i) & ((j >= first) | (j < rules.sink))
    return mask if rules.sliding_window is None else mask & (j > i - rules.sliding_window)


def _pack(states: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, keys, dim]`` with each sample's real tokens in front: columns become positions."""
    order = (~valid).long().argsort(dim=1, stable=True)
    return states.gather(2, order[:, None, :, None].expand_as(states))


def _is_causal(mask_function: Any) -> bool:
    """Whether a mask function of transformers is causal, perhaps with a sliding window, and nothing else."""
    if mask_function is causal_mask_function:
        return True
    parts = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    if getattr(mask_function, "__qualname__", "").startswith("and_masks.") and len(parts) == 1:
        return (
            all(
                part is causal_mask_function or part.__qualname__.startswith("sliding_window_overlay.")
                for part in parts[0]
            )
            and causal_mask_function in parts[0]
        )
    return False


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
