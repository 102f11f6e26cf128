"""Tables of plans: what they keep, their rules and spans, what each layer takes, and how two differ."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from moa_search.errors import ConfigError
from moa_search.formats import Plan, Profile
from moa_search.formats.paged import grouped
from moa_search.formats.provenance import Budget
from moa_search.head_groups import GROUPS
from moa_search.inspection.frames.bits import tiers_text
from moa_search.inspection.printing import (
    Column,
    Table,
    column,
    digits,
    is_missing,
    mebibytes,
    percent,
    plain,
    with_error,
)
from moa_search.search.losses import plan_losses

DEFAULT_CRITERION = "signed"

HELD_GROUPS = (1, 3, 6, 15)
"""Numbers of groups to show beside the default."""

HEADS_PER_LINE = 8
"""KV heads in one line of a table: as many as a terminal shows."""


def plan_frame(plans: Plan | Mapping[str, Plan], lengths: Sequence[int]) -> Table:
    """What is kept and computed, and predicted loss, by length; shares leave native layers out, MiB don't.

    Args:
        plans: A plan, or several by name, of which no losses are shown: they may be in different units.
        lengths: Context lengths in tokens.
    """
    named = {"": plans} if isinstance(plans, Plan) else plans
    frame = pd.concat([plan.by_length(lengths).assign(plan=name) for name, plan in named.items()])
    columns = [
        column("length", "tokens"),
        *_kept_columns(named.values()),
        column("attention_density", "prefill computed", percent),
    ]
    if isinstance(plans, Plan):
        columns.append(Column("predicted loss", predicted_text))
        return Table(frame, columns, "What it keeps, computes and is predicted to lose")
    frame = frame.sort_values("length", kind="stable")
    return Table(frame, [column("plan", left=True), *columns], "What they keep and compute", group=["length"])


def _kept_columns(plans: Collection[Plan]) -> list[Column]:
    """Tokens kept, bytes kept where they are another share, and the size of that."""
    columns = [column("density", "tokens kept", percent)]
    if not all(plan.is_plain for plan in plans):
        columns.append(column("share", "bytes kept", percent))
    return [*columns, column("kv_bytes", _size_heading(plans), mebibytes)]


def _size_heading(plans: Iterable[Plan]) -> str:
    return "KV MiB (16 bit)" if all(plan.is_plain for plan in plans) else "KV MiB"


def plans_frame(plans: Mapping[str, Plan], lengths: Sequence[int] = ()) -> Table:
    """One row per plan and length: what it keeps, is predicted to lose and was measured to lose.

    Args:
        plans: By name.
        lengths: Context lengths in tokens; by default those that each plan was made for.
    """
    rows = []
    for name, plan in plans.items():
        frame = plan.by_length(list(lengths) or plan.lengths).assign(plan=name)
        measured = {entry.length: entry for entry in plan.validated}
        for field in ("loss", "dense_loss"):
            frame[f"true_{field}"] = [getattr(measured.get(length), field, None) for length in frame["length"]]
        rows.append(frame)
    frame = pd.concat(rows)
    first = next(iter(plans.values())).model

    def held_out(row: Any) -> str:
        loss, dense = row["true_loss"], row["true_dense_loss"]
        return "" if is_missing(loss) else f"{loss:.3f}" + ("" if is_missing(dense) else f" (dense {dense:.3f})")

    columns = [
        column("plan", left=True),
        column("length", "tokens"),
        column("density", "tokens kept", percent),
        column("share", "bytes kept", percent),
        column("kv_bytes", _size_heading(plans.values()), mebibytes),
        Column("predicted loss", predicted_text),
        Column("held-out loss", held_out),
    ]
    title = f"Plans for {first.architecture}, {first.num_hidden_layers} layers of {first.num_key_value_heads} KV heads"
    return Table(frame, columns, title, group=["plan"])


def held_frame(plan: Plan, lengths: Sequence[int]) -> Table:
    """Share of a dense cache that vLLM holds under a plan, by length and number of groups of KV heads.

    Args:
        plan: The plan.
        lengths: Context lengths in tokens; heads are grouped for the longest.
    """
    by_groups = {
        len(found.sizes): found
        for found in (grouped(plan, max(lengths), most) for most in sorted({*HELD_GROUPS, GROUPS}))
    }
    rows = [
        {"length": length, "kept": plan.density(length), **{f"+{n}": by_groups[n].held(length) for n in by_groups}}
        for length in lengths
    ]
    columns = [
        column("length", "tokens"),
        column("kept", "plan keeps", percent),
        *(column(f"+{n}", f"{n} group{'s' * (n > 1)}", percent) for n in by_groups),
    ]
    return Table(pd.DataFrame(rows), columns, f"What vLLM holds, {GROUPS} groups at most by default; blocks aside")


def rule_frame(plan: Plan, most: int = 8) -> Table:
    """The commonest rules, then the heads of native layers, which follow none."""
    native = plan.native_layers
    counts = Counter(str(rule) for layer, rules in enumerate(plan.rules) if layer not in native for rule in rules)
    rows: list[tuple[str, int]] = counts.most_common(most)
    if native:
        rows.append((own_window_text(plan), len(native) * plan.model.num_key_value_heads))
    columns = [column("rule", "span(n)", left=True), column("heads", "KV heads")]
    return Table(pd.DataFrame(rows, columns=["rule", "heads"]), columns, f"Commonest of {len(counts)} rules")


def span_frame(plan: Plan, length: int) -> Table:
    """Span in tokens of every layer and KV head at one length; dense ones stand out, many heads take several lines.

    Native layers show how many tokens their own window keeps, and that it is their own.
    """
    heads = plan.model.num_key_value_heads
    width = min(heads, HEADS_PER_LINE)
    rows = []
    for layer, spans in enumerate(plan.spans(length)):
        native = layer in plan.native_layers
        kept = own_window_text(plan) if native else f"{sum(spans) / heads / length:.0%}"
        for first in range(0, heads, width):
            line: dict[str, object] = {f"+{place}": tokens for place, tokens in enumerate(spans[first : first + width])}
            rows.append({"layer": layer, "first": first, "native": native, "kept": kept, **line})

    def once(name: str) -> Column:
        return Column(name, lambda row: "" if row["first"] else str(row[name]))

    def head(place: int) -> Column:
        name = f"+{place}"
        return Column(
            name if heads > width else f"KV head {place}",
            lambda row: plain(row[name], lambda tokens: f"{tokens:.0f}"),
            stands_out=lambda row: row[name] == length and not row["native"],
        )

    columns = [once("layer"), *([column("first", "KV head")] if heads > width else [])]
    columns += [*map(head, range(width)), once("kept")]
    return Table(pd.DataFrame(rows), columns, f"Span in tokens at {length}")


def layer_frame(plan: Plan, length: int, losses: Mapping[int, npt.NDArray[np.float64]]) -> Table:
    """What each layer keeps and is predicted to lose.

    Args:
        plan: The plan.
        length: Context length in tokens.
        losses: As `layer_losses` returns them.
    """
    tokens = np.array(plan.spans(length)).sum(1)
    frame = pd.DataFrame(
        {
            "layer": range(len(tokens)),
            "kv_bytes": plan.bytes_by_layer(length),
            "density": tokens / (length * plan.model.num_key_value_heads),
        }
    )
    columns = [
        column("layer"),
        column("kv_bytes", _size_heading([plan]), lambda count: f"{count / 2**20:.4g}"),
        column("density", "tokens kept", percent),
    ]
    for n, values in losses.items():
        frame[f"loss@{n}"] = values
        columns.append(column(f"loss@{n}", f"predicted loss @{n}", "{:.4g}".format))
    return Table(frame, columns, f"Memory at {length} tokens" + (" and predicted loss" if losses else ""))


def layer_losses(plan: Plan, profile: Profile) -> dict[int, npt.NDArray[np.float64]]:
    """The loss that a profile predicts for each layer, by profiled length, by the plan's own criterion.

    Returns:
        ``[layer]``, 0 in native layers.

    Raises:
        ConfigError: The profile's sink or block isn't the plan's.
        ModelMismatchError: The profile is of another model.
    """
    plan.model.require(profile.header.model, "the plan (beside the profile's model)")
    for name in ("sink", "block"):
        mine, measured = getattr(plan, name), getattr(profile.header, name)
        if mine != measured:
            raise ConfigError(f"profile: it was measured with {name} {measured}, the plan has {mine}")
    criterion = (plan.provenance.criterion if plan.provenance else None) or DEFAULT_CRITERION
    searched = profile.header.searchable_layers
    by_length, choice = plan_losses(profile, plan, criterion)
    found = {}
    for losses in by_length:
        per_layer = np.zeros(plan.model.num_hidden_layers)
        per_layer[searched] = losses.mean[np.arange(len(choice)), choice].reshape(len(searched), -1).sum(1)
        found[losses.length] = per_layer
    return found


def validated_frame(plan: Plan) -> Table:
    """What the plan lost on held-out samples."""
    frame = pd.DataFrame([entry.model_dump() for entry in plan.validated])
    columns = [
        column("length", "tokens"),
        column("samples"),
        Column("loss", lambda row: with_error(row["loss"], row["loss_error"], ".4f", ".4f")),
        column("dense_loss", "dense", digits(4)),
        column("data", left=True),
    ]
    return Table(frame, columns, "Held-out loss, nats per answer token")


def change_frame(plans: Sequence[Plan], names: Sequence[str], length: int, most: int | None = None) -> Table:
    """The changes of spans at one length, the largest first; ``most`` of them."""
    found = changed_heads(plans, length)
    shown = f"the {most} largest of {len(found)}" if most is not None and len(found) > most else f"all {len(found)}"
    first, second = names
    columns = [
        column("layer"),
        column("kv_head", "KV head"),
        column("rule", f"rule, {first}", left=True),
        column("span", f"span, {first}"),
        column("other_rule", f"rule, {second}", left=True),
        column("other_span", f"span, {second}"),
        column("change", None, "{:+d}".format),
    ]
    return Table(
        found.head(len(found) if most is None else most), columns, f"Changed heads at {length} tokens, {shown}"
    )


def changed_heads(plans: Sequence[Plan], length: int) -> pd.DataFrame:
    """`Plan.diff` of two plans at one length, the largest change first."""
    found = plans[0].diff(plans[1], [length])
    return found.sort_values("change", key=lambda change: -change.abs(), kind="stable").reset_index(drop=True)


def plan_facts(plan: Plan) -> dict[str, str]:
    """What the plan is for and how it was found."""
    model = plan.model
    facts = {
        "model": f"{model.architecture}: {model.num_hidden_layers} layers, {model.num_attention_heads} query heads, "
        f"{model.num_key_value_heads} KV heads of {model.head_dim}",
        "spans": f"{plan.sink} sink tokens, at least {plan.min_span} tokens, anchored at the {plan.anchor}",
    }
    if plan.native_layers:
        layers = f"{len(plan.native_layers)} of {model.num_hidden_layers} layers"
        facts["native"] = f"{layers}: {own_window_text(plan)}; not counted in densities"
    if not plan.is_plain:
        facts["bits"] = f"of keys/values: {tiers_text(plan)} KV heads"
    origin = plan.provenance
    if origin is not None:
        bounds = itertools.groupby(origin.budgets, key=_bound_text)
        budgets = "; ".join(bound + _lengths_text(held) for bound, held in bounds)
        gap = "" if origin.gap is None else f"; proven within {origin.gap:.2%} of the optimum"
        facts["found by"] = origin.how + (f"; {budgets}" if budgets else "") + gap
    return facts


def _bound_text(budget: Budget) -> str:
    """What a budget bounds, without its length unless the user's own words are shown."""
    if budget.asked is not None:
        return budget.asked
    what, most = ("density", budget.density) if budget.share is None else ("share of bytes", budget.share)
    return f"{what} at most {most:.4g}"


def _lengths_text(budgets: Iterable[Budget]) -> str:
    lengths = ", ".join(str(budget.length) for budget in budgets if budget.asked is None)
    return f" at {lengths}" if lengths else ""


def provenance_facts(plan: Plan) -> dict[str, str]:
    """All that a plan says about where it is from, notes aside."""
    facts, origin = plan_facts(plan), plan.provenance
    if origin is not None:
        proof = (origin.objective, origin.dual_bound, origin.gap)
        facts["profile"] = origin.profile or ""
        facts["weights of lengths"] = ", ".join(f"{n}: {w:.4g}" for n, w in origin.length_weights.items())
        facts["loss, bound, gap"] = ", ".join(f"{value:.6g}" for value in proof if value is not None)
        facts["knobs"] = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in origin.knobs.items()
        )
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    facts["written by"] = f"moa-search {plan.library_version}"
    facts["checksum"] = plan.checksum
    facts["fingerprint"] = f"{plan.fingerprint} (of what decides the model's output)"
    facts["configuration"] = json.dumps({**plan.model.rope, **plan.model.config}, sort_keys=True)
    return {name: value for name, value in facts.items() if value}


def own_window_text(plan: Plan) -> str:
    """What stands in the place of a rule in native layers."""
    return f"own window, {plan.native_window}"


def predicted_text(row: Mapping[str, object]) -> str:
    """A predicted loss with its standard error, as far as they are known; ``~`` where it is extrapolated.

    Args:
        row: With ``loss``, ``loss_error`` and ``extrapolated``.
    """
    text = with_error(row["loss"], row["loss_error"])  # type: ignore[arg-type]
    return f"~ {text}" if text and row["extrapolated"] else text
