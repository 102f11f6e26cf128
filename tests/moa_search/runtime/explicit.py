"""Tiny random models, and the reference: plain softmax under whole per-head masks, without a cache."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import transformers
from moa_kernels.codes import Codec, Transform
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from moa_search.formats import ModelSignature, Plan
from moa_search.formats.transforms import KeyTransforms
from moa_search.masks import head_masks
from moa_search.spans import DENSE, SpanRule

RULES = (
    SpanRule(12, 0),
    SpanRule(0, 64),
    SpanRule(-20, 128),
    DENSE,
    SpanRule(20, 32),
    SpanRule(5, 0),
)
"""Constant, growing and dense: at a few hundred tokens most rings have wrapped several times."""

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def tiny_model(kind: str = "Llama", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random decoder whose attention is sharp enough for masks to matter."""
    config_class = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    config = config_class(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def tiny_plan(model: Any, *, sink: int = 4, block: int = 8, shift: int = 0) -> Plan:
    """A plan with different rules in every layer and head."""
    signature = ModelSignature.of(model.config)
    heads = signature.num_key_value_heads
    rules = [
        [RULES[(layer * heads + head + shift) % len(RULES)] for head in range(heads)]
        for layer in range(signature.num_hidden_layers)
    ]
    return Plan.from_rules(rules, signature, sink=sink, block=block)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random prompts ``[batch, length]`` without the padding token."""
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def explicit(model: Any, plan: Plan) -> Any:
    """A copy of a model without a plan, attending under explicit masks; for whole, unpadded sequences.

    The model's own sliding windows come from the masks that transformers makes for its eager attention.
    """
    AttentionInterface.register("explicit", _explicit_attention)
    AttentionMaskInterface.register("explicit", eager_mask)
    reference = copy.deepcopy(model)
    nested = reference.config.get_text_config(decoder=True) is not reference.config
    reference.set_attn_implementation({"text_config": "explicit"} if nested else "explicit")
    for module in reference.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            module.explicit = (plan.rules[layer], plan.sink, plan.min_span)
            module.stored = None if plan.is_plain else (plan, layer)
    return reference


def as_stored(plan: Plan, layer: int, states: torch.Tensor, side: int) -> torch.Tensor:
    """Keys (side 0) or values (1) ``[batch, kv_heads, length, width]`` from position 0 on, as codes give them back."""
    found, given = states.clone(), plan.key_transforms
    for head, tier in enumerate(plan.tiers[layer]):
        bits, width = tier[side], states.shape[-1]
        if bits == 16:
            continue
        transform = None
        if bits < 8 and side == 1:
            transform = Transform.rotation(1, width)
        elif bits < 8:
            statics = {name: torch.from_numpy(array) for name, array in given.layer(layer).items()}
            transform = Transform.of_keys(**statics, bits=bits).of([head])
        codec, positions = Codec(bits, transform), torch.arange(states.shape[2])[plan.sink :]
        coded = codec.encode(states[:, head : head + 1, plan.sink :], positions)
        found[:, head : head + 1, plan.sink :] = codec.decode(coded, states.dtype, positions)
    return found


def key_transforms(signature: ModelSignature, seed: int = 0) -> KeyTransforms:
    """Transforms that differ in every head and are far from doing nothing."""
    rng = np.random.default_rng(seed)
    shape = (signature.num_hidden_layers, signature.num_key_value_heads, signature.head_dim)
    balance = np.eye(shape[-1]) + 0.2 * rng.standard_normal((*shape, shape[-1]))
    frequencies = rng.uniform(0, 1, (shape[0], shape[-1] // 2))
    return KeyTransforms(
        rng.standard_normal(shape).astype(np.float32),
        balance.astype(np.float32),
        frequencies.astype(np.float32),
        rng.permutation(shape[-1]).astype(np.int32),
        # From channels that are all alike to steep ones, a fourth of which get two digits.
        np.exp(-rng.uniform(0, 8, shape[:2])[..., None] * np.linspace(0, 1, shape[-1])).astype(np.float32),
    )


@torch.no_grad()
def logits(reference: Any, sequence: torch.Tensor) -> torch.Tensor:
    """Logits ``[batch, length, vocabulary]`` of whole sequences in one forward pass without a cache."""
    return reference(sequence, use_cache=False).logits


def greedy(reference: Any, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy decoding by a whole forward pass per token."""
    sequence = prompt
    for _ in range(new_tokens):
        following = logits(reference, sequence)[:, -1:].argmax(-1)
        sequence = torch.cat([sequence, following], 1)
    return sequence


def _explicit_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    rules, sink, min_span = module.explicit
    length, group = query.shape[2], query.shape[1] // key.shape[1]
    assert key.shape[2] == length
    if module.stored is not None:
        key, value = (as_stored(*module.stored, states, side) for side, states in enumerate((key, value)))
    mask = torch.from_numpy(head_masks(rules, group, length, sink=sink, min_span=min_span))
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask | (attention_mask < 0), -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(len(query), -1, length, 1)], -1)
    weights = scores.softmax(-1)[..., :length]
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None
