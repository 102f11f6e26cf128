"""Sections that several pages share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import pandas as pd

from moa_search.formats import Plan
from moa_search.inspection.charts import chart, draw_front
from moa_search.inspection.grids import GRID_SCRIPT, GRID_STYLE, grid_block
from moa_search.inspection.pages import Page, facts, figure_block, paragraph, table_block
from moa_search.inspection.tables import origin_lines, predicted_loss
from moa_search.pictures import hex_colours
from moa_search.search import Front

__all__ = [
    "front_blocks",
    "front_rows",
    "heading",
    "new_page",
    "origin_facts",
    "share",
    "span_blocks",
]


def new_page(title: str, subtitle: str) -> Page:
    """A page whose heat maps answer to mouse and keyboard."""
    return Page(title, subtitle=subtitle, style=GRID_STYLE, script=GRID_SCRIPT)


def share(value: float) -> str:
    """A share of something, in percent."""
    return f"{value:.1%}"


def span_blocks(plan: Plan, lengths: Sequence[int]) -> list[str]:
    """One heat map of spans per length, each cell with its exact rule."""
    blocks = []
    for length in lengths:
        label = f"Share of a context of {length} tokens that each layer (across) and KV head (down) keeps"
        blocks += [
            heading(f"{length} tokens: {share(plan.density(length))} of the KV cache"),
            grid_block(
                hex_colours(plan.shares(length), low=0, high=1),
                plan.cell_texts(length),
                label,
                colours="viridis",
                scale=("0 %", "100 %", "span / n"),
                native=bool(plan.native_layers),
            ),
        ]
    return blocks


def origin_facts(plan: Plan) -> str:
    """All that a plan says about where it is from."""
    entries: dict[str, object] = {}
    for line in origin_lines(plan):
        name, _, value = line.partition("  ")
        if name != "note":
            entries[name] = value.strip()
    origin = plan.provenance
    if origin is not None:
        entries["profile"] = origin.profile
        entries["weights of lengths"] = ", ".join(f"{n}: {w:.4g}" for n, w in origin.length_weights.items())
        entries["loss, bound, gap"] = ", ".join(
            f"{value:.6g}" for value in (origin.objective, origin.dual_bound, origin.gap) if value is not None
        )
        entries["knobs"] = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in origin.knobs.items()
        )
        entries["versions"] = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    entries["written by"] = f"moa-search {plan.library_version}"
    entries["checksum"] = plan.checksum
    entries["fingerprint"] = f"{plan.fingerprint} (of what decides the model's output)"
    entries["configuration"] = json.dumps({**plan.model.rope, **plan.model.config}, sort_keys=True)
    listed = facts({name: value for name, value in entries.items() if value})
    return listed + "".join(paragraph(f"Note: {note}") for note in (origin.notes if origin else ()))


def front_rows(front: Front) -> list[dict[str, str]]:
    """One row per plan: density, predicted and held-out loss at each length, and gap; the chosen one marked."""
    rows = []
    for index, (name, plan) in enumerate(zip(front.names, front.plans, strict=True)):
        row = {"plan": f"{name} (plan.json)" if front.is_chosen(index) else name}
        for metrics in plan.predicted:
            row[f"kept @{metrics.length}"] = share(metrics.density)
            row[f"predicted loss @{metrics.length}"] = predicted_loss(metrics)
        for entry in plan.validated:
            above = "" if entry.dense_loss is None else f" (dense {entry.dense_loss:.3f})"
            row[f"held-out loss @{entry.length}"] = f"{entry.loss:.3f}{above}"
        gap = plan.provenance.gap if plan.provenance else None
        rows.append(row | ({} if gap is None else {"gap": f"{gap:.2%}"}))
    return rows


def front_blocks(front: Front) -> list[str]:
    """The plans of a front as chart and table, the chosen one marked."""
    guessed = any(metrics.extrapolated for plan in front.plans for metrics in plan.predicted)
    caption = "Plans of the front" + ("; ≈ is extrapolated" if guessed else "")
    table = table_block(pd.DataFrame(front_rows(front)), caption)
    drawn = [i for i, plan in enumerate(front.plans) if plan.predicted and plan.predicted[-1].loss is not None]
    if len(drawn) < 2:
        return [table]
    plans, names = [front.plans[index] for index in drawn], [front.names[index] for index in drawn]
    marked = drawn.index(front.chosen_index) if front.chosen_index in drawn else None
    figure = chart(lambda ax: draw_front(ax, plans, names, marked), height=3.8)
    alt = f"Predicted losses of {len(drawn)} plans" + ("" if marked is None else ", a ring around the chosen one")
    beaten = "Plans that look beaten here lose less at another length." if len(plans[0].predicted) > 2 else ""
    return [figure_block(figure, alt, caption=beaten), table]


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>"
