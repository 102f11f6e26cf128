"""Whether a prompt may be prefilled in chunks: where that changes nothing but memory."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from moa_search.modeling.private import cache_name
from moa_search.modeling.rope import constant_rope_tokens
from moa_search.runtime.layer import MoACacheLayer

PREFILL_CHUNK_TOKENS = 4096
"""Tokens per sample that `generate` prefills at once, unless its ``prefill_chunk_size`` says otherwise.

A forward pass frees each layer's keys and values once the layer's rings have taken theirs. What still grows with the
prompt is the activations of one layer, and chunks bound those."""


def wants_chunks(model: Any, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether to prefill in chunks: the user set no chunk size, and chunking changes nothing but memory."""
    cache = model_kwargs[cache_name()]
    if generation_config.prefill_chunk_size is not None:
        return False
    # Not every linear-attention layer goes on from its state when it gets several tokens.
    if any(not isinstance(layer, MoACacheLayer) or hasattr(layer, "update_conv_state") for layer in cache.layers):
        return False
    # Up to some version, transformers starts over where a cache holds tokens already.
    if input_ids.shape[1] <= PREFILL_CHUNK_TOKENS or cache.get_seq_length() > 0:
        return False
    if _exceeded_rope(model, _context(input_ids, model_kwargs)) is not None:
        return False
    # It splits these two; images or embeddings would be repeated with every chunk.
    inputs = {name for name, value in model_kwargs.items() if isinstance(value, torch.Tensor)}
    return inputs <= {"attention_mask", "position_ids"} and not generation_config.output_hidden_states


def warn_of_chunks(model: Any, input_ids: torch.Tensor, chunk_tokens: int, model_kwargs: dict[str, Any]) -> None:
    """Tell the user who has chosen a chunk size where it changes the output."""
    exceeded = _exceeded_rope(model, _context(input_ids, model_kwargs))
    if exceeded is not None and input_ids.shape[1] > chunk_tokens:
        warnings.warn(
            f"prefill_chunk_size={chunk_tokens} changes the output: beyond {exceeded} tokens the model's rotary table "
            "depends on the length of each forward pass; leave it unset for what one pass gives",
            stacklevel=2,
        )


def warn_of_continuing(model: Any, past_tokens: int, tokens: int) -> None:
    """Tell the user who continues a cache where that isn't what one pass over everything gives."""
    exceeded = _exceeded_rope(model, tokens)
    if exceeded is not None and 0 < past_tokens <= exceeded:
        warnings.warn(
            f"the cache holds {past_tokens} tokens and grows to {tokens}: beyond {exceeded} tokens the model's rotary "
            "table changes, but not for keys in the cache; start without it for what one pass gives",
            stacklevel=2,
        )


def _exceeded_rope(model: Any, tokens: int) -> int | None:
    """The length up to which the rotary table is constant, if ``tokens`` are more."""
    limit = constant_rope_tokens(model.config)
    return limit if limit is not None and tokens > limit else None


def _context(input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> int:
    """Tokens of the longest sample, those in the cache included."""
    given = [model_kwargs[name].shape[-1] for name in ("attention_mask",) if model_kwargs.get(name) is not None]
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        given.append(int(positions.max()) + 1)
    return max(input_ids.shape[1], *given) if given else input_ids.shape[1]
