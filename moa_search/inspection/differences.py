"""Two plans side by side, in a terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from rich.table import Table

from moa_search.formats import Plan
from moa_search.inspection.charts import chart
from moa_search.inspection.grids import HOW_TO_READ, grid_block
from moa_search.inspection.pages import Page, figure_block, paragraph, table_block
from moa_search.inspection.sections import heading, new_page, origin_facts, share
from moa_search.pictures import draw_lines, hex_colours

__all__ = ["change_table", "diff_lengths", "diff_line", "diff_page", "pair_table"]

LARGEST = 12
"""Changes in a terminal's table."""


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


def pair_table(plans: Sequence[Plan], names: Sequence[str], lengths: Sequence[int]) -> Table:
    """What both keep and compute, by length."""
    table = Table(title="What they keep", title_justify="left")
    table.add_column("length", justify="right")
    for name in names:
        for what in ("KV cache kept", "KV MiB", "prefill computed"):
            table.add_column(f"{what}\n{name}", justify="right")
    for length in lengths:
        table.add_row(str(length), *(cell for plan in plans for cell in _kept(plan, length)))
    return table


def change_table(plans: Sequence[Plan], names: Sequence[str], length: int, most: int = LARGEST) -> Table:
    """The largest changes of spans at one length."""
    found = _sorted_changes(plans, length)
    shown = f"the {most} largest of {len(found)}" if len(found) > most else f"all {len(found)}"
    table = Table(title=f"Changed heads at {length} tokens, {shown}", title_justify="left")
    for name in ("layer", "KV head"):
        table.add_column(name, justify="right")
    for name in names:
        table.add_column(f"rule\n{name}")
        table.add_column(f"span\n{name}", justify="right")
    table.add_column("change", justify="right")
    for row in found.head(most).to_dict("records"):
        cells = [row["layer"], row["kv_head"], row["rule"], row["span"], row["other_rule"], row["other_span"]]
        table.add_row(*map(str, cells), f"{row['change']:+d}")
    return table


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
        lambda ax: draw_lines(over, lines, ax, title="", xlabel="context (tokens)", ylabel="KV cache kept (%)")
    )
    kept = [
        {
            "plan": name,
            "tokens": n,
            "KV cache kept": cells[0],
            "KV MiB (16 bit)": cells[1],
            "prefill computed": cells[2],
        }
        for n in at
        for name, plan in zip(names, plans, strict=True)
        for cells in [_kept(plan, n)]
    ]
    page.add(
        "Density against length",
        figure_block(density, "Share of the KV cache that each plan keeps, over the context length"),
        table_block(pd.DataFrame(kept), "What they keep and compute"),
    )
    page.add("Changed heads", *(_changes_folded(plans, names, n) for n in at))
    for name, plan in zip(names, plans, strict=True):
        page.add(f"Provenance of {name}", origin_facts(plan))
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
    kept = " to ".join(share(plan.density(length)) for plan in plans)
    return [
        heading(f"{length} tokens: {kept} of the KV cache"),
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
    found = _sorted_changes(plans, length)
    if found.empty:
        return paragraph(f"No head differs at {length} tokens.")
    first, second = names
    columns = {
        "layer": "layer",
        "kv_head": "KV head",
        "rule": f"rule, {first}",
        "span": f"span, {first}",
        "other_rule": f"rule, {second}",
        "other_span": f"span, {second}",
        "change": "change",
    }
    table = table_block(found[list(columns)].rename(columns=columns), f"Changes at {length} tokens, the largest first")
    return f"<details><summary>{len(found)} heads at {length} tokens</summary>\n{table}\n</details>"


def _kept(plan: Plan, length: int) -> list[str]:
    """KV cache kept, its MiB at 16 bits, prefill computed."""
    return [
        share(plan.density(length)),
        f"{plan.kv_bytes(length) / 2**20:.1f}",
        share(plan.attention_density(length)),
    ]


def _sorted_changes(plans: Sequence[Plan], length: int) -> pd.DataFrame:
    found = plans[0].diff(plans[1], [length])
    return found.sort_values("change", key=lambda change: -change.abs(), kind="stable").reset_index(drop=True)
