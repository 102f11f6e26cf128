"""A front that was written to a folder, in a terminal, as a picture and as a page."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.table import Table

from moa_search.errors import ConfigError
from moa_search.inspection.charts import chart, draw_front
from moa_search.inspection.pages import Page, paragraph
from moa_search.inspection.plots import save_figure
from moa_search.inspection.sections import front_blocks, front_rows, new_page, origin_facts, plan_names, span_blocks
from moa_search.search.output import StoredPlan

__all__ = ["front_page", "save_front_plot", "stored_front_table"]


def stored_front_table(plans: Sequence[StoredPlan], chosen: str | None) -> Table:
    """The plans with density, predicted and, where measured, held-out loss; the chosen one marked."""
    rows = front_rows(plans, chosen)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title="Front", title_justify="left")
    for name in columns:
        table.add_column(name.replace(" @", "\n@"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(row.get(name) or "") for name in columns))
    return table


def save_front_plot(plans: Sequence[StoredPlan], chosen: str | None, path: str | os.PathLike[str]) -> None:
    """Write the front's chart as PNG, atomically.

    Raises:
        ConfigError: The plans predict no losses to draw.
    """
    if any(not stored.plan.predicted or stored.plan.predicted[-1].loss is None for stored in plans):
        raise ConfigError("output: a plan of the front predicts no loss, so there is no chart to draw")
    names, marked = plan_names(plans), _index_of(plans, chosen)
    save_figure(chart(lambda ax: draw_front(ax, [stored.plan for stored in plans], names, marked)), path)


def front_page(
    plans: Sequence[StoredPlan], chosen: str | None, *, title: str = "Front", lengths: Sequence[int] = ()
) -> Page:
    """The page of a front.

    Args:
        plans: Of the front.
        chosen: Fingerprint of the chosen one, or None.
        title: Of the page.
        lengths: Context lengths in tokens for its spans; by default those that it was made for.
    """
    index = _index_of(plans, chosen)
    model = plans[0].plan.model
    page = new_page(
        title,
        f"{len(plans)} plans for {model.architecture}, {model.num_hidden_layers} layers of "
        f"{model.num_key_value_heads} KV heads",
    )
    page.add("Front", *front_blocks(plans, chosen))
    if index is None:
        page.add("Chosen plan", paragraph("The folder holds no plan.json, so no plan is chosen."))
        return page
    plan = plans[index].plan
    page.add("Chosen plan", *span_blocks(plan, list(lengths) or plan.lengths))
    page.add("Provenance", origin_facts(plan))
    return page


def _index_of(plans: Sequence[StoredPlan], chosen: str | None) -> int | None:
    return next((index for index, stored in enumerate(plans) if stored.plan.fingerprint == chosen), None)
