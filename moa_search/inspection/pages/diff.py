"""Two plans side by side as a page: which heads change, what both keep, where they are from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moa_search.formats import Plan
from moa_search.inspection.charts import chart
from moa_search.inspection.frames.plans import change_frame, plan_frame
from moa_search.inspection.pages.page import (
    HOW_TO_READ,
    Page,
    figure_block,
    folded,
    grid_block,
    heading,
    new_page,
    origin_blocks,
    paragraph,
)
from moa_search.inspection.printing import to_html
from moa_search.pictures import draw_lines, hex_colours


def diff_lengths(plans: Sequence[Plan], lengths: Sequence[int]) -> list[int]:
    """The lengths asked for, or those of both plans."""
    return sorted(lengths or {length for plan in plans for length in plan.lengths})


def diff_line(plans: Sequence[Plan], lengths: Sequence[int]) -> str:
    """How many heads differ, in one line."""
    first, second = plans
    if first.fingerprint == second.fingerprint:
        return "the plans act the same: every rule, sink, block and anchor is equal"
    found = first.diff(second, lengths)
    heads = len(found[["layer", "kv_head"]].drop_duplicates())
    settings = [
        f"{name} {getattr(first, name)} and {getattr(second, name)}"
        for name in ("sink", "block", "anchor")
        if getattr(first, name) != getattr(second, name)
    ]
    counted = f"{heads} of {first.model.num_hidden_layers * first.model.num_key_value_heads} KV heads differ"
    return "; ".join([counted, *settings])


def diff_page(plans: Sequence[Plan], names: Sequence[str], *, lengths: Sequence[int] = ()) -> Page:
    """The page of two plans for one model.

    Args:
        plans: Both.
        names: What to call them.
        lengths: Context lengths in tokens; by default those of both.

    Raises:
        ModelMismatchError: They are for different models.
    """
    at = diff_lengths(plans, lengths)
    page = new_page(f"{names[0]} and {names[1]}", diff_line(plans, at))
    page.add(
        "Change of spans", paragraph(HOW_TO_READ), *(block for n in at for block in _change_blocks(plans, names, n))
    )
    over = plans[0].density_lengths
    lines = {name: [100 * plan.density(n) for n in over] for name, plan in zip(names, plans, strict=True)}
    density = chart(
        lambda ax: draw_lines(over, lines, ax, title="", xlabel="context (tokens)", ylabel="tokens kept (%)")
    )
    kept = plan_frame(dict(zip(names, plans, strict=True)), at)
    page.add(
        "Density against length",
        figure_block(density, "Share of the tokens that each plan keeps, over the context length"),
        to_html(kept),
    )
    page.add("Changed heads", *(_changes_folded(plans, names, n) for n in at))
    for name, plan in zip(names, plans, strict=True):
        page.add(f"Provenance of {name}", *origin_blocks(plan))
    return page


def _change_blocks(plans: Sequence[Plan], names: Sequence[str], length: int) -> list[str]:
    spans = [np.array(plan.spans(length)) for plan in plans]
    changes = (spans[1] - spans[0]) / length
    texts = [
        [
            f"layer {layer}, KV head {head}: {plans[0].rule_text(layer, head)} to {plans[1].rule_text(layer, head)}; "
            f"{spans[0][layer, head]} to {spans[1][layer, head]} of {length} tokens"
            for head in range(changes.shape[1])
        ]
        for layer in range(changes.shape[0])
    ]
    kept = " to ".join(plan.kept_text(length) for plan in plans)
    return [
        heading(f"{length} tokens: from {kept}"),
        grid_block(
            hex_colours(changes, low=-1, high=1, colours="PuOr"),
            texts,
            f"Change from {names[0]} to {names[1]} of the share of {length} tokens that each head keeps",
            colours="PuOr",
            scale=("all less", "all more", "change"),
        ),
    ]


def _changes_folded(plans: Sequence[Plan], names: Sequence[str], length: int) -> str:
    """The changed heads at one length, as a table that unfolds: it can have thousands of rows."""
    table = change_frame(plans, names, length)
    if table.frame.empty:
        return paragraph(f"No head differs at {length} tokens.")
    return folded(f"{len(table.frame)} heads at {length} tokens", to_html(table))
