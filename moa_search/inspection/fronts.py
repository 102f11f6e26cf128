"""A front that was written to a folder, in a terminal, as a picture and as a page."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.table import Table

from moa_search.errors import ConfigError
from moa_search.inspection.charts import chart, draw_front
from moa_search.inspection.pages import Page, paragraph
from moa_search.inspection.plots import save_figure
from moa_search.inspection.sections import front_blocks, front_rows, new_page, origin_facts, span_blocks
from moa_search.search import Front

__all__ = ["front_page", "save_front_plot", "stored_front_table"]


def stored_front_table(front: Front) -> Table:
    """The plans with density, predicted and, where measured, held-out loss; the chosen one marked."""
    rows = front_rows(front)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title="Front", title_justify="left")
    for name in columns:
        table.add_column(name.replace(" @", "\n@"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(row.get(name) or "") for name in columns))
    return table


def save_front_plot(front: Front, path: str | os.PathLike[str]) -> None:
    """Write the front's chart as PNG, atomically.

    Raises:
        ConfigError: The plans predict no losses to draw.
    """
    if any(not plan.predicted or plan.predicted[-1].loss is None for plan in front.plans):
        raise ConfigError("output: a plan of the front predicts no loss, so there is no chart to draw")
    save_figure(chart(lambda ax: draw_front(ax, front.plans, front.names, front.chosen_index)), path)


def front_page(front: Front, *, title: str = "Front", lengths: Sequence[int] = ()) -> Page:
    """The page of a front.

    Args:
        front: The plans.
        title: Of the page.
        lengths: Context lengths in tokens for the chosen plan's spans; by default those that it was made for.
    """
    model = front.plans[0].model
    page = new_page(
        title,
        f"{len(front.plans)} plans for {model.architecture}, {model.num_hidden_layers} layers of "
        f"{model.num_key_value_heads} KV heads",
    )
    page.add("Front", *front_blocks(front))
    if front.chosen_index is None:
        page.add("Chosen plan", paragraph("The folder holds no plan.json, so no plan is chosen."))
        return page
    plan = front.chosen
    page.add("Chosen plan", *span_blocks(plan, list(lengths) or plan.lengths))
    page.add("Provenance", origin_facts(plan))
    return page
