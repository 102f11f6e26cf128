"""Generation past a model's context: the sink's positions move along with the newest tokens.

After StreamingLLM (arXiv 2309.17453). Within the context nothing changes. A query beyond it attends its window as ever,
at true distances, and the sink as if the query stood at the context's last position: no distance is longer than those
that the model was trained on. Keys stay as they are: rotary scores depend on distances alone, so that turning the query
back for the sink is the same as turning the sink forward, and needs nothing stored anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from moa_search.errors import BackendUnavailableError, ConfigError, ModelUnsupportedError
from moa_search.modeling.text import context_length, text_config, text_decoders

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moa_search.runtime.rules import LayerRules

MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""Whose rotary embeddings `Stream.at_sink` turns back; each is tested."""

ROPE_TYPES = ("default", "linear", "llama3")
"""Of one table for every length, whose cosines aren't scaled."""


@dataclass(frozen=True)
class Stream:
    """How queries beyond the context see the sink.

    Attributes:
        context: Tokens.
        frequencies: Radians per token of each pair of numbers, ``[head_dim / 2]``; a number pairs with the one half a
            head further on.
    """

    context: int
    frequencies: torch.Tensor = field(repr=False, compare=False)

    def at_sink(self, query: torch.Tensor, position: torch.Tensor) -> torch.Tensor | None:
        """Queries as the sink sees them, or None where none is beyond the context.

        Args:
            query: ``[batch, heads, query, head_dim]``, after rotary embedding.
            position: ``[batch or 1, query]``, int64.
        """
        beyond = (position - (self.context - 1)).clamp(min=0)
        if not bool(beyond.any()):
            return None
        angle = beyond[:, None, :, None] * self.frequencies.to(query.device, torch.float64)
        cos, sin = (part.to(query.dtype) for part in (angle.cos(), angle.sin()))
        first, second = query.chunk(2, -1)
        return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)


def by_part(key: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Keys beside which queries lie twice, for windows and for the sink: ``[batch, keys, 2 * head_dim]``.

    Args:
        key: ``[batch, keys, head_dim]``.
        sink: Boolean ``[batch or 1, keys]``.
    """
    sink = sink[..., None]
    return torch.cat([key.masked_fill(sink, 0), key.masked_fill(~sink, 0)], -1)


def stream_of(model: Any, rules: Sequence[LayerRules], streaming: bool | int, impl: str) -> Stream | None:
    """What `apply_plan` puts into the rules of a model's layers.

    Args:
        model: The model.
        rules: What its plan says, layer by layer.
        streaming: The context in tokens, True for the model's own, False for no streaming.
        impl: What attends, as in `apply_plan`.

    Raises:
        ConfigError: The context isn't positive or longer than the model's, or a head's span isn't fixed within it.
        ModelUnsupportedError: The model's positions can't be moved along, or it names no context.
        BackendUnavailableError: ``impl`` isn't ``"auto"`` or ``"torch"``.
    """
    if streaming is False:
        return None
    text = text_config(model.config)
    longest = context_length(model.config)
    if text.model_type not in MODELS:
        raise ModelUnsupportedError(
            f"streaming: positions of {text.model_type} can't be moved along; those of {', '.join(MODELS)} can"
        )
    kind = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ModelUnsupportedError(f"streaming: a {kind} rotary table depends on the length or scales its cosines")
    if longest is None:
        raise ModelUnsupportedError("streaming: the model's configuration names no max_position_embeddings")
    context = longest if streaming is True else streaming
    if not 1 <= context <= longest:
        raise ConfigError(f"streaming: {context} tokens; it must be from 1 to the model's context, {longest}")
    if impl not in ("auto", "torch"):
        raise BackendUnavailableError(f"impl is {impl}, but streaming runs in torch only; leave it at auto")
    _require_fixed(rules, context)
    decoder = next(part for part in text_decoders(model) if hasattr(part, "rotary_emb"))
    return Stream(context, decoder.rotary_emb.inv_freq.detach().cpu())


def _require_fixed(rules: Sequence[LayerRules], context: int) -> None:
    """Check that no head attends further than the context, however long the text grows."""
    for layer, of_layer in enumerate(rules):
        if of_layer.codecs is not None:
            raise ConfigError(f"streaming: layer {layer} stores fewer than 16 bits; take a plan that stores 16")
        if of_layer.sliding_window is not None and of_layer.sliding_window <= context:
            continue
        for head, rule in enumerate(of_layer.rules):
            what = None
            if rule.is_dense:
                what = "is dense"
            elif rule.beta_256:
                what = f"grows with the context ({rule})"
            elif max(rule.alpha, of_layer.sink + of_layer.block) > context:
                what = f"spans more than {context} tokens ({rule})"
            if what is not None:
                raise ConfigError(
                    f"streaming: KV head {head} of layer {layer} {what}; every span must be fixed: apply "
                    f"plan.anchored_at({context})"
                )
