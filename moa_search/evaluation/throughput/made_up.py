"""Plans for models that have no profile: for speed and memory, never for quality."""

from __future__ import annotations

from collections.abc import Collection

from moa_search.errors import ConfigError
from moa_search.formats import ModelSignature, Plan
from moa_search.spans import BETA_ONE, SpanRule

SHORT_256 = 16
"""Growth of a short head in 1/256: it keeps a sixteenth of the context."""


def made_up_plan(model: ModelSignature, density: float, *, native_layers: Collection[int] = ()) -> Plan:
    """A plan that keeps ``density`` of the KV cache: some heads dense, the others short.

    Short heads keep a sixteenth of the context (``beta_256 = 16``), one head takes what is left over, so that the mean
    growth is the density within half of 1/256 of a head. Dense heads are dealt out to the layers in turn, so that no
    two layers differ by more than one. Below a sixteenth no head is dense: all grow alike, within 1/256. Contexts so
    short that a sixteenth is under the smallest span keep more; `Plan.density` says how much.

    Args:
        model: Signature of the model.
        density: Share of the KV cache to keep, ``0 < density <= 1``.
        native_layers: Layers that keep their own sliding window.

    Raises:
        ConfigError: ``density`` is out of range.
    """
    if not 0 < density <= 1:
        raise ConfigError(f"density: {density:g} is out of range; it must be over 0 and at most 1")
    layers = [layer for layer in range(model.num_hidden_layers) if layer not in native_layers]
    heads = len(layers) * model.num_key_value_heads
    total = round(density * BETA_ONE * heads)
    if total >= SHORT_256 * heads:
        dense, left = divmod(total - SHORT_256 * heads, BETA_ONE - SHORT_256)
        growth = [BETA_ONE] * dense + [SHORT_256 + left] * (dense < heads) + [SHORT_256] * (heads - dense - 1)
    else:
        base, left = divmod(total, heads)
        growth = [base + 1] * left + [base] * (heads - left)
    rules = [[SpanRule(0, BETA_ONE)] * model.num_key_value_heads for _ in range(model.num_hidden_layers)]
    for index, beta_256 in enumerate(growth):
        rules[layers[index % len(layers)]][index // len(layers)] = SpanRule(0, beta_256)
    return Plan.from_rules(rules, model, native_layers=native_layers)
