"""The correctness gate: no speed is reported for a plan whose output is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moa_search.errors import VerificationError
from moa_search.evaluation.throughput.ways import Way
from moa_search.formats import Plan
from moa_search.masks import head_masks
from moa_search.modeling.attention import swapped
from moa_search.modeling.private import cache_name
from moa_search.modeling.text import dtype_name, text_config
from moa_search.runtime import MoACache
from moa_search.runtime.codecs import layer_codecs

PROMPT_TOKENS, DECODE_TOKENS, SAMPLES = 384, 40, 2
"""Long enough for spans to bite and rings to wrap, short enough for whole masks; decoding crosses a block."""

ALLOWED = 2.0
"""The error may be this many times that of attention computed plainly in the model's own type."""

CODED_TRIES = 4
"""Draws of tokens of which one has to pass under fewer than 16 bits: rounding may carry a number over to the next code,
by chance and as far in float32 as in bfloat16, while a wrong output is wrong on all tokens."""

NAME = "moa_masked_reference"
ATTRIBUTE = "_moa_reference"


@dataclass(frozen=True)
class Gate:
    """How far logits are from those of plain attention in float64 under whole masks; root mean squares, relative.

    Attributes:
        variant: Name of the way.
        error: Of the way: prefill, then decoding token by token through its cache.
        yardstick: Of plain attention in the model's own type under the same masks.
        dense: Of dense attention: what ignoring the plan would give.
    """

    variant: str
    error: float
    yardstick: float
    dense: float


def verify(model: Any, way: Way, seed: int) -> Gate:
    """Compare a plan at work with its definition on random tokens.

    Raises:
        VerificationError: The error is over `ALLOWED` times the yardstick.
    """
    plan = way.plan_at(PROMPT_TOKENS)
    assert plan is not None
    for again in range(1 if plan.is_plain else CODED_TRIES):
        gate = _measure(model, way, plan, seed + again)
        if gate.error <= ALLOWED * max(gate.yardstick, torch.finfo(model.dtype).eps):
            return gate
    raise VerificationError(
        f"plan {gate.variant}: its logits are off by {gate.error:.2g} of their size where attention under whole masks "
        f"in {dtype_name(model)} is off by {gate.yardstick:.2g}; nothing was timed, please report it"
    )


@torch.no_grad()
def _measure(model: Any, way: Way, plan: Plan, seed: int) -> Gate:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = text_config(model.config).vocab_size
    length = PROMPT_TOKENS + DECODE_TOKENS
    ids = torch.randint(vocabulary, (SAMPLES, length), generator=generator).to(model.device)
    with masked_reference(model, plan, torch.float64):
        truth = model(ids, use_cache=False).logits.double()
    with masked_reference(model, plan, model.dtype):
        plain = model(ids, use_cache=False).logits
    dense = model(ids, use_cache=False).logits
    with way.on(model, PROMPT_TOKENS):
        at_work = _step_by_step(model, way, plan, ids)
    error, yardstick, without = (_distance(logits, truth) for logits in (at_work, plain, dense))
    return Gate(f"{way.name} static" if way.is_compiled else way.name, error, yardstick, without)


@contextmanager
def masked_reference(model: Any, plan: Plan, dtype: torch.dtype) -> Iterator[None]:
    """A model whose attention is a plain softmax in ``dtype`` under whole per-head masks; no cache, no padding.

    It sees keys and values as the plan's codes give them back.
    """
    codecs = layer_codecs(plan)
    with swapped(model, NAME, _masked_attention, lambda *args, **kwargs: None) as modules:
        for module in modules:
            layer = module.layer_idx
            setattr(module, ATTRIBUTE, (plan.rules[layer], plan.sink, plan.min_span, dtype, codecs[layer]))
        try:
            yield
        finally:
            for module in modules:
                delattr(module, ATTRIBUTE)


def _masked_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    rules, sink, min_span, dtype, codecs = getattr(module, ATTRIBUTE)
    length, group = query.shape[2], query.shape[1] // key.shape[1]
    if codecs is not None:
        positions = torch.arange(length, device=key.device)[None]
        key, value = codecs.on(key.device).seen(key, value, positions, sink)
    mask = torch.from_numpy(head_masks(rules, group, length, sink=sink, min_span=min_span)).to(query.device)
    if sliding_window is not None:
        position = torch.arange(length, device=query.device)
        mask = mask & (position[:, None] - position < sliding_window)
    queries, keys, values = query.to(dtype), key.to(dtype), value.to(dtype)
    scores = queries @ keys.repeat_interleave(group, 1).mT * (scaling or query.shape[3] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.to(dtype).view(1, -1, 1, 1).expand(len(query), -1, length, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., :length]
    return (weights @ values.repeat_interleave(group, 1)).to(query.dtype).transpose(1, 2).contiguous(), None


def _step_by_step(model: Any, way: Way, plan: Plan, ids: Tensor) -> Tensor:
    """Logits ``[batch, length, vocabulary]`` of a prefill and single steps through the way's cache."""
    cached = {cache_name(): way.cache(model, PROMPT_TOKENS, ids.shape[1]) or MoACache(model.config, plan)}
    pieces = [model(ids[:, :PROMPT_TOKENS], **cached).logits]
    for index in range(PROMPT_TOKENS, ids.shape[1]):
        pieces.append(model(ids[:, index : index + 1], **cached).logits)
    return torch.cat(pieces, 1)


def _distance(logits: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference, relative to that of ``truth``."""
    return float((logits.double() - truth).norm() / truth.norm())
