"""A plan as another tool will do it, where that is less than the plan says: what is kept, and what is lost in words."""

from __future__ import annotations

from moa_search.formats.engines import Engine
from moa_search.formats.engines.windows import LayerWindows
from moa_search.formats.imported import imported
from moa_search.formats.layer_bits import LayerBits, layer_tiers, whole_plan
from moa_search.formats.plan import Plan
from moa_search.formats.tiers import PLAIN


def as_engine_runs(plan: Plan, engine: Engine, length: int) -> Plan:
    """The plan with one constant window per layer, as the engine's file holds it.

    Args:
        plan: The plan.
        engine: The engine.
        length: Context in tokens whose spans become the windows.

    Returns:
        A plan that does in this runtime what the engine does, its notes saying what was lost.
    """
    windows = LayerWindows.of(plan, length, sinks=engine.keeps_sink)
    done = windows.plan(plan.model, engine.title)
    if plan.native_layers and done.native_layers != plan.native_layers:
        done = _with_natives(done, plan)
    choices = [
        (list(zip(heads, rules, strict=True)))
        for layer, (heads, rules) in enumerate(zip(plan.spans(length), plan.rules, strict=True))
        if layer not in plan.native_layers
    ]
    notes = [
        f"as {engine.title} runs it: one constant window per layer, the longest of its heads' spans at {length} tokens"
    ]
    unequal = sum(len({span for span, _ in heads}) > 1 for heads in choices)
    if unequal:
        notes.append(
            f"{unequal} of {len(choices)} layers have KV heads of different spans; density {plan.density(length):.3f} "
            f"-> {done.density(length):.3f} at {length} (moa-search --rules-per-layer 1 chooses for whole layers)"
        )
    growing = sum(any(rule.beta_256 and span < length for span, rule in heads) for heads in choices)
    if growing:
        notes.append(f"{growing} of {len(choices)} layers' spans grow with the context; windows don't")
    if plan.sink and not engine.keeps_sink and any(windows.spans):
        notes.append(f"no sink: windows are {plan.sink} tokens longer instead of keeping the first {plan.sink}")
    if not plan.is_plain:
        notes.append(f"keys and values in 16 bits; share of bytes {plan.share(length):.3f} -> {done.share(length):.3f}")
    return imported(done, engine.title, notes, plan.lengths)


def as_layers_store(plan: Plan, layer_bits: LayerBits) -> Plan:
    """The plan with whole spans and one precision per layer, as the format holds it.

    Args:
        plan: The plan.
        layer_bits: The format.

    Returns:
        A plan that stores in this runtime what the format says, its notes saying what was lost.
    """
    tiers = layer_tiers(plan, layer_bits.tiers)
    done = whole_plan(
        [[tier] * plan.model.num_key_value_heads for tier in tiers],
        plan.model,
        native_layers=plan.native_layers,
        transforms=plan.key_transforms,
    )
    notes = [f"as {layer_bits.title} stores it: one precision per layer, the least that is enough for every KV head"]
    searched = [layer for layer in range(len(tiers)) if layer not in plan.native_layers]
    finer = sum(set(plan.tiers[layer]) != {tiers[layer]} for layer in searched)
    if finer:
        notes.append(f"{finer} of {len(searched)} layers store some KV head in more bits than the plan")
    if any(not rule.is_dense for layer in searched for rule in plan.rules[layer]):
        notes.append("spans aren't kept: every head attends everything")
    if plan.sink and any(tiers[layer] != PLAIN for layer in searched):
        notes.append(f"the first {plan.sink} tokens are stored in as few bits as the others")
    shares = ", ".join(f"{plan.share(n):.3f} -> {done.share(n):.3f} at {n}" for n in plan.lengths)
    notes.append(f"share of a 16-bit cache's bytes: {shares}")
    return imported(done, layer_bits.title, notes, plan.lengths)


def _with_natives(done: Plan, plan: Plan) -> Plan:
    """``done`` with the native layers of ``plan``, which keep the model's own window under any engine."""
    return Plan.from_rules(
        done.rules, done.model, native_layers=plan.native_layers, sink=done.sink, block=done.block
    )  # fmt: skip
