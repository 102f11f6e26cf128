"""A plan as a page: spans with their rules, density over length, cost per layer, masks, its front, where it is from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moa_search.formats import Plan, Profile
from moa_search.inspection.charts import chart, draw_layers
from moa_search.inspection.frames.plans import layer_frame, layer_losses, plan_frame, validated_frame
from moa_search.inspection.pages.front import front_blocks
from moa_search.inspection.pages.page import (
    HOW_TO_READ,
    Page,
    figure_block,
    folded,
    masks,
    new_page,
    origin_blocks,
    paragraph,
    span_blocks,
)
from moa_search.inspection.printing import percent, to_html
from moa_search.search import Front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MASKS = 4
"""Heads whose masks are shown unless some are chosen."""


def plan_page(
    plan: Plan,
    *,
    title: str = "Plan",
    lengths: Sequence[int] = (),
    heads: Sequence[tuple[int, int]] = (),
    front: Front | None = None,
    profile: Profile | None = None,
) -> Page:
    """The page of a plan.

    Args:
        plan: The plan.
        title: Of the page.
        lengths: Context lengths in tokens; by default those that the plan was made for.
        heads: Layers and KV heads to show masks of; by default some from the longest to the shortest span.
        front: The plans it was chosen from.
        profile: That predicts what each layer loses.

    Raises:
        ConfigError: The model has no such head, or the profile's sink or block isn't the plan's.
        ModelMismatchError: The profile is of another model.
    """
    for layer, head in heads:
        plan.model.require_head(layer, head)
    at = list(lengths) or plan.lengths
    longest = max(at)
    model, size = plan.model, _size(plan.kv_bytes(longest)) + " of keys and values" + " (16 bit)" * plan.is_plain
    page = new_page(
        title,
        f"{model.architecture}, {model.num_hidden_layers} layers of {model.num_key_value_heads} KV heads: keeps "
        f"{plan.kept_text(longest)} at {longest} tokens, {size}",
    )
    page.add("Spans", paragraph(_formula(plan)), paragraph(HOW_TO_READ), *span_blocks(plan, at))
    page.add("Density against length", *_density_blocks(plan, at))
    page.add("Cost per layer", *_layer_blocks(plan, longest, profile))
    shown = list(heads) or representative_heads(plan, longest)
    page.add(
        "Masks",
        paragraph(f"Which keys (across) each query (down) attends, at {longest} tokens."),
        masks([_mask(plan, layer, head, longest) for layer, head in shown]),
    )
    if front is not None:
        page.add("Front", *front_blocks(front))
    validated = [to_html(validated_frame(plan))] if plan.validated else []
    page.add("Provenance", *origin_blocks(plan), *validated)
    return page


def representative_heads(plan: Plan, length: int, count: int = MASKS) -> list[tuple[int, int]]:
    """Heads with different rules, from the longest span to the shortest at equal distances."""
    first: dict[str, tuple[int, int, int]] = {}
    for layer, spans in enumerate(plan.spans(length)):
        for head, tokens in enumerate(spans):
            first.setdefault(plan.rule_text(layer, head), (-tokens, layer, head))
    ranked = sorted(first.values())
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [ranked[place][1:] for place in places]


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _formula(plan: Plan) -> str:
    anchor = "at every query's own position" if plan.anchor == "position" else "once, at the total length n"
    return (
        f"A rule is evaluated {anchor}. It gives the keys that a query of a context of n tokens attends: the first "
        f"{plan.sink} and the newest, never fewer than {plan.min_span} in all (or n), and never more than n. "
        "0.25n-512 is a quarter of the context, rounded down, less 512."
    )


def _density_blocks(plan: Plan, lengths: Sequence[int]) -> list[str]:
    at = sorted({*lengths, *plan.model.usual_lengths})
    figure = chart(lambda ax: plan.plot_density(ax=ax))
    alt = "Shares kept and of the prefill computed, over the context length"
    return [figure_block(figure, alt), to_html(plan_frame(plan, at))]


def _layer_blocks(plan: Plan, length: int, profile: Profile | None) -> list[str]:
    """Memory per layer and, by a profile, predicted loss."""
    losses = layer_losses(plan, profile) if profile is not None else {}
    table = layer_frame(plan, length, losses)
    kept, native = table.frame["kv_bytes"].to_numpy() / 2**20, plan.native_layers
    draw = partial(draw_layers, per_layer=kept, native=native, ylabel=f"KV MiB at {length} tokens")
    blocks = [figure_block(chart(draw, height=2.6), f"Keys and values that each layer keeps at {length} tokens")]
    for n, values in losses.items():
        draw = partial(draw_layers, per_layer=values, native=native, ylabel=f"predicted loss at {n}")
        blocks.append(figure_block(chart(draw, height=2.6), f"Predicted loss of each layer at {n} tokens"))
    return [*blocks, folded("Data as a table", to_html(table))]


def _mask(plan: Plan, layer: int, head: int, length: int) -> str:
    def draw(ax: Axes) -> None:
        plan.plot_mask(layer, head, length, ax=ax).set_title("", loc="left")  # the caption says it, and can wrap

    kept = percent(plan.spans(length)[layer][head] / length)
    says = f"layer {layer}, KV head {head}: {plan.rule_text(layer, head)}; {kept} kept"
    return figure_block(chart(draw, width=3.1, height=3), f"Mask of {says}", caption=says)
