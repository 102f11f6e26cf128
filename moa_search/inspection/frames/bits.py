"""What a plan stores in how many bits, in one line each."""

from __future__ import annotations

from collections import Counter

from moa_search.formats import Plan
from moa_search.formats.tiers import PLAIN_BITS, SCALE_BYTES, token_bytes
from moa_search.inspection.printing import percent


def tiers_text(plan: Plan) -> str:
    """Key/value bits with the number of KV heads that have them, commonest first; native layers aside."""
    native = plan.native_layers
    counts = Counter(tier for layer, tiers in enumerate(plan.tiers) if layer not in native for tier in tiers)
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{keys}/{values}: {heads}" for (keys, values), heads in ordered)


def byte_parts(plan: Plan, length: int) -> dict[str, float]:
    """What codes, their scales, sinks and heads in 16 bits take of a dense 16-bit cache's bytes at ``length`` tokens.

    They add up to `Plan.share`. Of a head with fewer bits for keys or values alone, the side in 16 bits counts among
    the heads in 16 bits; sinks are those of sides with fewer bits.
    """
    width, native = plan.model.head_dim, plan.native_layers
    whole = token_bytes(PLAIN_BITS, width)
    parts = {"codes": 0, "scales": 0, "sinks": 0, "16 bits": 0}
    heads = 0
    for layer, (spans, tiers) in enumerate(zip(plan.spans(length), plan.tiers, strict=True)):
        if layer in native:
            continue
        heads += len(spans)
        for tokens, tier in zip(spans, tiers, strict=True):
            plain = min(tokens, plan.sink)
            for bits in tier:
                if bits == PLAIN_BITS:
                    parts["16 bits"] += tokens * whole
                    continue
                parts["sinks"] += plain * whole
                parts["scales"] += (tokens - plain) * SCALE_BYTES
                parts["codes"] += (tokens - plain) * (token_bytes(bits, width) - SCALE_BYTES)
    return {name: size / (2 * whole * length * heads) for name, size in parts.items()}


def bits_lines(plan: Plan, length: int) -> list[str]:
    """The bits that heads have, and what their parts take at ``length`` tokens; nothing for a plan in 16 bits."""
    if plan.is_plain:
        return []
    parts = ", ".join(f"{name} {percent(part)}" for name, part in byte_parts(plan, length).items() if part)
    return [
        f"bits of keys/values: {tiers_text(plan)} of {_searchable_heads(plan)} KV heads",
        f"bytes at {length} tokens: {percent(plan.share(length))} of a 16-bit cache ({parts})",
    ]


def _searchable_heads(plan: Plan) -> int:
    layers = plan.model.num_hidden_layers - len(plan.native_layers)
    return layers * plan.model.num_key_value_heads
