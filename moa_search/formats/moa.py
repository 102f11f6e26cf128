"""MoA's own plan files: ``{"alphas": [layer][query head], "betas": [layer][query head]}``.

A head's span is ``alpha + beta * N`` tokens with N the total length, prompt and answer. It includes MoA's sink of 64
tokens and is at least 128 tokens (thu-nics/MoA, as its key-value cache computes it; its cache then rounds up to
multiples of 64, which a plan doesn't). The file names no model, no sink and no block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from moa_search.errors import ConfigError, ModelMismatchError, PlanFormatError
from moa_search.formats.files import nearest, one_line, parse_plan_json, sha256_of
from moa_search.formats.gqa import envelope, to_kv_heads
from moa_search.formats.imported import imported
from moa_search.formats.plan import Plan
from moa_search.formats.signature import ModelSignature
from moa_search.spans import BETA_ONE, SpanRule, density

MOA_KEYS = ("alphas", "betas")
MOA_SINK_TOKENS = 64
MOA_BLOCK_TOKENS = 64
"""Beside the sink, what MoA's cache keeps at least."""

ALPHA_BOUND = 2.0**30
"""Alphas beyond it in either direction are no numbers of tokens."""


def read_moa(text: str | bytes, model: ModelSignature, *, source: str, fold_lengths: Sequence[int] = ()) -> Plan:
    """A plan with ``anchor: prompt`` from the text of a file of MoA's.

    Rules are rounded to whole tokens and multiples of 1/256, to the nearest and from the middle upwards. Query heads
    that share a KV head get the least rule that is enough for all of them (see `merge_rules`). The plan's notes say
    what either changed, and the densities before and after.

    Args:
        text: The file's content.
        model: The model that the file was made for.
        source: Names the file in errors.
        fold_lengths: Contexts in tokens between which folded rules have to be enough; everywhere, if there are none.

    Raises:
        PlanFormatError: The text is no such file.
        ModelMismatchError: It has other numbers of layers or query heads than ``model``.
    """
    alphas, betas = _read_values(text, source)
    _require_shape(alphas, betas, model, source)
    values = [[*zip(*layer, strict=True)] for layer in zip(alphas, betas, strict=True)]
    rules = [[SpanRule(_round(alpha), _round(BETA_ONE * beta)) for alpha, beta in layer] for layer in values]
    min_span = MOA_SINK_TOKENS + MOA_BLOCK_TOKENS
    folded = to_kv_heads(rules, model.group, min_span, fold_lengths)
    plan = Plan.from_rules(folded, model, sink=MOA_SINK_TOKENS, block=MOA_BLOCK_TOKENS, anchor="prompt")
    lengths = sorted(set(fold_lengths)) or model.usual_lengths
    raw = text.encode() if isinstance(text, str) else text
    notes = [f"MoA's alphas and betas, {sha256_of(raw)}", *_rounding_note(values, rules, lengths)]
    if model.group > 1:
        notes += _fold_notes(rules, plan, fold_lengths, lengths)
    return imported(plan, "MoA", notes, lengths)


def write_moa(plan: Plan, *, reanchor: bool = False) -> str:
    """The text of a file of MoA's that says the same as ``plan``.

    Args:
        plan: The plan; every query head gets its KV head's rule.
        reanchor: Write a plan that is anchored at positions all the same: MoA evaluates its rules once, at the total
            length, so that earlier queries attend more than under the plan.

    Raises:
        ConfigError: MoA's format can't say what the plan says.
    """
    if not plan.is_plain:
        raise _inexpressible("some heads store fewer than 16 bits")
    if plan.native_layers:
        raise _inexpressible(f"layer {plan.native_layers[0]} keeps the model's own sliding window")
    for name, own, theirs in (("sink", plan.sink, MOA_SINK_TOKENS), ("block", plan.block, MOA_BLOCK_TOKENS)):
        if own != theirs:
            raise _inexpressible(f"its {name} is {own} tokens and MoA's is always {theirs}")
    if plan.anchor == "position" and not reanchor:
        raise _inexpressible(
            "its rules are evaluated at every position and MoA's once, at the total length; "
            "reanchor=True writes them all the same"
        )
    rules = [[rule for rule in layer for _ in range(plan.model.group)] for layer in plan.rules]
    content = {
        "alphas": [[float(rule.alpha) for rule in layer] for layer in rules],
        "betas": [[rule.beta for rule in layer] for layer in rules],
    }
    return json.dumps(content) + "\n"


def _inexpressible(reason: str) -> ConfigError:
    return ConfigError(f"the plan can't be written in MoA's format: {reason}")


def _read_values(text: str | bytes, source: str) -> tuple[list[list[float]], list[list[float]]]:
    content = parse_plan_json(text, source)
    if not isinstance(content, dict):
        raise PlanFormatError(f'{source}: not a file of MoA\'s, which is {{"alphas": ..., "betas": ...}}')
    for key in content:
        if key not in MOA_KEYS:
            raise PlanFormatError(f"{source}: {one_line(key)}: unknown key{nearest(key, MOA_KEYS)}")
    alphas, betas = (_numbers(content.get(key), key, source) for key in MOA_KEYS)
    for layer, heads in enumerate(alphas):
        for head, alpha in enumerate(heads):
            if abs(alpha) > ALPHA_BOUND:
                raise PlanFormatError(f"{source}: alphas[{layer}][{head}] is {alpha:g}, no number of tokens")
    for layer, heads in enumerate(betas):
        for head, beta in enumerate(heads):
            if not 0 <= beta <= 1:
                raise PlanFormatError(f"{source}: betas[{layer}][{head}] is {beta:g}; it must lie in 0..1")
    return alphas, betas


def _numbers(value: Any, key: str, source: str) -> list[list[float]]:
    if not isinstance(value, list) or not all(isinstance(layer, list) for layer in value):
        raise PlanFormatError(f"{source}: {key} is no list of layers, each a list with a number for every query head")
    for layer, heads in enumerate(value):
        for head, number in enumerate(heads):
            if type(number) not in (int, float) or abs(number) >= 2.0**1000:
                raise PlanFormatError(f"{source}: {key}[{layer}][{head}] is {one_line(number)}, no number")
    return [[float(number) for number in heads] for heads in value]


def _require_shape(alphas: list[list[float]], betas: list[list[float]], model: ModelSignature, source: str) -> None:
    layers, heads = model.num_hidden_layers, model.num_attention_heads
    if [len(layer) for layer in alphas] != [len(layer) for layer in betas]:
        raise PlanFormatError(f"{source}: alphas and betas differ in shape")
    if len(alphas) != layers:
        raise ModelMismatchError(f"{source}: it has {len(alphas)} layers, the model {layers}")
    for layer, values in enumerate(alphas):
        if len(values) != heads:
            raise ModelMismatchError(f"{source}: layer {layer} has {len(values)} heads, the model {heads} query heads")


def _round(value: float) -> int:
    """The nearest whole number, the larger of two."""
    return math.floor(value + 0.5)


def _rounding_note(
    values: list[list[tuple[float, float]]], rules: list[list[SpanRule]], lengths: Sequence[int]
) -> list[str]:
    pairs = [
        (alpha, beta, rule)
        for asked, found in zip(values, rules, strict=True)
        for (alpha, beta), rule in zip(asked, found, strict=True)
    ]
    moved = [(alpha, beta, rule) for alpha, beta, rule in pairs if (alpha, beta) != (rule.alpha, rule.beta)]
    if not moved:
        return []
    far = {n: max(abs(rule.alpha - alpha + (rule.beta - beta) * n) for alpha, beta, rule in moved) for n in lengths}
    where = ", ".join(f"{tokens:.3g} tokens at {length}" for length, tokens in far.items())
    return [f"{len(moved)} of {len(pairs)} rules rounded to whole tokens and 1/256; spans move by at most {where}"]


def _fold_notes(
    rules: list[list[SpanRule]], plan: Plan, fold_lengths: Sequence[int], lengths: Sequence[int]
) -> list[str]:
    group = plan.model.group
    sets = [set(layer[first : first + group]) for layer in rules for first in range(0, len(layer), group)]
    unequal = sum(len(members) > 1 for members in sets)
    note = f"{group} query heads share a KV head, which keeps what any of them does: {unequal} of {len(sets)} unequal"
    crossing = sum(envelope(members) not in members for members in sets)
    if crossing:
        where = f"from {min(fold_lengths)} to {max(fold_lengths)} tokens" if fold_lengths else "at every length"
        note += f", {crossing} with rules that cross, joined so that they are enough {where}"
    before = [rule for layer in rules for rule in layer]
    costs = ", ".join(
        f"{density(before, length, plan.min_span):.3f} -> {plan.density(length):.3f} at {length}" for length in lengths
    )
    return [note, f"density per query head -> per KV head: {costs}"]
